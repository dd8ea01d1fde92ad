"""Checks whether the compressed pixels of a PNG are complete. Decoders leave missing rows black without an error."""

import zlib
from collections.abc import Iterator
from typing import IO

from mmray.images.readers import PNG_SIGNATURE

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""The passes of an interlaced image: first column, first row, columns apart, rows apart."""
_BLOCK_BYTES = 1 << 20


def lacks_rows(file: IO[bytes]) -> bool:
    """Tells whether the compressed data of a PNG ends before its last row. The pixels are decompressed, but not kept.

    file: an open PNG whose header can be read.
    """
    file.seek(len(PNG_SIGNATURE) + 8)
    header = file.read(13)
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    bits = header[8] * _CHANNELS.get(header[9], 1)
    passes = _PASSES if header[12] else ((0, 0, 1, 1),)
    needed = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        needed += rows * (1 + -(-columns * bits // 8)) if columns > 0 and rows > 0 else 0
    decoder, length = zlib.decompressobj(), 0
    for data in _compressed(file):
        rest = data
        while rest and length < needed and not decoder.eof:
            length += len(decoder.decompress(rest, _BLOCK_BYTES))
            rest = decoder.unconsumed_tail
    return length < needed


def _compressed(file: IO[bytes]) -> Iterator[bytes]:
    """Yields the data of the IDAT chunks."""
    file.seek(len(PNG_SIGNATURE))
    while len(head := file.read(8)) == 8:
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"IDAT":
            yield file.read(length)
            file.seek(4, 1)
        else:
            file.seek(length + 4, 1)
