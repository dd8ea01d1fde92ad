"""Whether a JPEG is whole. Decoders fill what is missing with grey and say nothing.

Two kinds of damage look alike to a decoder and are not: a file that lacks its end marker and nothing else (some
scanners, downloads cut by two bytes) is a sound picture, and one whose pixels were lost is not. Zeros in the place of
lost bytes, as file systems leave them, are mostly valid code; what they decode to is no picture.
"""

import io
import re
from collections.abc import Callable

import numpy as np
from PIL import Image

SIGNATURE = b"\xff\xd8\xff"
_END = b"\xff\xd9"
_HOLE = bytes(64)
"""So many zero bytes among compressed pixels are no picture, unless 512 bits of 0 mean blank blocks there."""
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""What ends the compressed pixels of a scan."""
_REFINEMENT_FREE_FRAMES = {0xC0, 0xC1, 0xC2}
"""Frames in Huffman code: baseline, extended, progressive."""
_TAILS = (b"", b"\x55" * 1024, b"\xaa" * 1024)


def hole(data: bytes) -> int | None:
    """Where zeros stand in the place of compressed pixels; None where they do nowhere.

    A long run of zeros is right only where the scan's codes make it blank blocks (a zero difference, an end of
    block), and never right up to the end of a file without its end marker.
    """
    if _HOLE not in data:
        return None
    at, frame, tables = 2, 0, dict[int, int]()
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at + 4 : at + 2 + length]
        at += 2 + length
        if marker == 0xD9:
            return None
        if marker == 0xC4:
            tables |= _first_symbols(segment)
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC8, 0xCC):
            frame = marker
        elif marker == 0xDA:
            end = _MARKER.search(data, at)
            stop = end.start() if end else len(data)
            zeros = data.find(_HOLE, at, stop)
            is_end_lost = end is None and data.endswith(_HOLE)
            if zeros >= 0 and (is_end_lost or not _zeros_are_blank(segment, frame, tables)):
                return zeros
            at = stop
    return None


def _first_symbols(segment: bytes) -> dict[int, int]:
    """Of each Huffman table, by class and number in one byte: what the code of zero bits alone stands for."""
    symbols, at = {}, 0
    while at + 17 < len(segment):
        symbols[segment[at]] = segment[at + 17]
        at += 17 + sum(segment[at + 1 : at + 17])
    return symbols


def _zeros_are_blank(scan: bytes, frame: int, tables: dict[int, int]) -> bool:
    """Whether bits of 0 alone are blank blocks of a scan (ITU T.81, B.2.3). scan: its header."""
    count = scan[0] if scan else 0
    if frame not in _REFINEMENT_FREE_FRAMES or len(scan) < 4 + 2 * count:
        return True
    first, last, approximation = scan[1 + 2 * count : 4 + 2 * count]
    if approximation >> 4:  # refines what is there by single bits, which may all be 0
        return True
    for number in range(count):
        selectors = scan[2 + 2 * number]
        if first == 0 and tables.get(selectors >> 4, 0):
            return False
        symbol = tables.get(0x10 | (selectors & 15), 0)
        if last > 0 and (symbol & 15 or symbol == 0xF0):
            return False
    return True


def completed(data: bytes, load: Callable[[Image.Image], object] = Image.Image.load) -> Image.Image | None:
    """The decoded picture of a JPEG that lacks its end marker and nothing else; None where pixels are missing.

    Whatever would follow the pixels leaves a whole picture as it is, and becomes part of one that is not. load: decodes
    the opened picture.
    """
    body = data.removesuffix(b"\xff")
    pictures = []
    for tail in _TAILS:
        picture = Image.open(io.BytesIO(body + tail + _END), formats=["JPEG"])
        load(picture)
        pictures.append(picture)
    first, *others = (np.asarray(picture) for picture in pictures)
    return pictures[0] if all(np.array_equal(first, other) for other in others) else None
