"""Finds holes in image files: blocks of zeros where a file system, a disk or a download never wrote the pixels.

Most formats have no checksum. A hole in an uncompressed picture is black, or white; in WebP and in the finer scans of a
progressive JPEG it is valid code for other pixels. But a hole begins where a block of the file begins, and ends where
one ends, or where the file does. Zeros that are meant as pixels stand at any place: one run of them in 17 million
begins and ends like a hole.
"""

from typing import BinaryIO

import numpy as np

BLOCK_BYTES = 4096
LEAST_BYTES = 1024
"""Shortest hole at the end of a file, in its last block, which is not whole."""
_READ_BYTES = 256 * BLOCK_BYTES


def hole(file: BinaryIO) -> tuple[int, int] | None:
    """Returns the first hole of a file as (first byte, number of bytes), None where there is none.

    file: open at its beginning; it is read through in pieces of 1 MiB.
    """
    zero, first, last = ([np.zeros(0, np.uint8)] for _ in range(3))
    size = 0
    while data := file.read(_READ_BYTES):
        size += len(data)
        blocks = np.frombuffer(data.ljust(-(-len(data) // BLOCK_BYTES) * BLOCK_BYTES, b"\0"), np.uint8)
        blocks = blocks.reshape(-1, BLOCK_BYTES)
        zero.append((blocks.max(axis=1) == 0).astype(np.uint8))
        first.append(blocks[:, 0])
        last.append(blocks[:, -1])
    before = np.concatenate([[0], *last])  # the byte before each block, and the last byte
    after = np.concatenate([*first, [1]])  # the byte behind each block, from the second on
    borders = np.flatnonzero(np.diff(np.concatenate(zero), prepend=0, append=0)).reshape(-1, 2)
    for start, stop in borders.tolist():
        length = min(stop * BLOCK_BYTES, size) - start * BLOCK_BYTES
        if before[start] and after[stop] and length >= LEAST_BYTES:
            return start * BLOCK_BYTES, length
    return None
