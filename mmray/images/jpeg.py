"""Checks whether a JPEG is complete. Decoders fill missing pixels with grey without an error.

A decoder cannot tell two kinds of damage apart: a file that lacks only its end marker (some scanners, downloads cut by
two bytes) holds a sound image, and one whose pixels were lost does not. Zeros in the place of lost bytes, as file
systems leave them, are mostly valid code, but what they decode to is not the image.
"""

import io
import re
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

SIGNATURE = b"\xff\xd8\xff"
_END = b"\xff\xd9"
_HOLE = bytes(64)
"""A run of zero bytes that means lost pixels, unless 512 bits of 0 encode blank blocks there."""
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""Matches the marker that ends the compressed pixels of a scan."""
_REFINEMENT_FREE_FRAMES = {0xC0, 0xC1, 0xC2}
"""Frames in Huffman code: baseline, extended, progressive."""
_SCAN, _PROGRESSIVE = 0xDA, 0xC2
_TAILS = (b"", b"\x55" * 1024, b"\xaa" * 1024)


def hole(data: bytes) -> int | None:
    """Returns the byte at which zeros stand in the place of compressed pixels; None where there are no such zeros.

    A long run of zeros is valid only where the scan's codes make it blank blocks (a zero difference, an end of block),
    and never valid up to the end of a file without its end marker.
    """
    if _HOLE not in data:
        return None
    frame, tables = 0, dict[int, int]()
    for marker, segment, start, stop in _segments(data):
        if marker == 0xC4:
            tables |= _first_symbols(segment)
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC8, 0xCC):
            frame = marker
        elif marker == _SCAN:
            zeros = data.find(_HOLE, start, stop)
            is_end_lost = stop == len(data) and data.endswith(_HOLE)
            if zeros >= 0 and (is_end_lost or not _zeros_are_blank(segment, frame, tables)):
                return zeros
    return None


def _segments(data: bytes) -> Iterator[tuple[int, bytes, int, int]]:
    """Yields (marker, its segment, first byte behind the segment, first byte of the next marker) of each segment."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != _END[1]:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        start = at + 2 + length
        end = _MARKER.search(data, start) if marker == _SCAN else None
        stop = start if marker != _SCAN else end.start() if end else len(data)
        yield marker, data[at + 4 : start], start, stop
        at = stop


def _first_symbols(segment: bytes) -> dict[int, int]:
    """Returns the symbol that the code of zero bits alone stands for, by table (class and number in one byte)."""
    symbols, at = {}, 0
    while at + 17 < len(segment):
        symbols[segment[at]] = segment[at + 17]
        at += 17 + sum(segment[at + 1 : at + 17])
    return symbols


def _zeros_are_blank(scan: bytes, frame: int, tables: dict[int, int]) -> bool:
    """Tells whether bits of 0 alone encode blank blocks of a scan (ITU T.81, B.2.3). scan: the scan's header."""
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
    """Decodes a JPEG that lacks only its end marker; returns None where pixels are missing.

    Different bytes are appended in turn: they do not change a complete image, and become part of an incomplete one.
    load: decodes the opened image.
    """
    body = data.removesuffix(b"\xff")
    pictures = []
    for tail in _TAILS:
        picture = Image.open(io.BytesIO(body + tail + _END), formats=["JPEG"])
        load(picture)
        pictures.append(picture)
    first, *others = (np.asarray(picture) for picture in pictures)
    return pictures[0] if all(np.array_equal(first, other) for other in others) else None


def lacks_pixels(data: bytes) -> bool:
    """Tells whether a JPEG that can be decoded ends before its pixels do, with or without an end marker.

    The image is decoded three times, at an eighth of its size where that is enough, so this is meant for checking
    images once and not for training.
    """
    segments = [(marker, stop) for marker, _, _, stop in _segments(data)]
    stops = [stop for marker, stop in segments if marker == _SCAN]
    if not stops:
        return True
    is_progressive = any(marker == _PROGRESSIVE for marker, _ in segments)

    def load(picture: Image.Image) -> None:
        if not is_progressive:
            picture.draft(None, (picture.width // 8, picture.height // 8))
        picture.load()

    return completed(data[: stops[-1]], load) is None
