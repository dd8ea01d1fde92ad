"""Checks whether a JPEG is complete. Decoders fill missing pixels with grey without an error.

A decoder cannot tell two kinds of damage apart: a file that lacks only its end marker (some scanners, downloads cut by
two bytes) holds a sound image, and one whose pixels were lost does not. Zeros in the place of lost bytes, as file
systems leave them, are mostly valid code, but what they decode to is not the image.
"""

import io
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

SIGNATURE = b"\xff\xd8\xff"
_END = b"\xff\xd9"
_HOLE = bytes(64)
"""A run of zero bytes that means lost pixels, unless 512 bits of 0 encode blank blocks there."""
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""Matches the marker that ends the compressed pixels of a scan."""
_DCT_FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)
"""Frames whose data units are blocks of 8 x 8."""
_COEFFICIENTS = 64
_REFINEMENT_FREE_FRAMES = {0xC0, 0xC1, 0xC2}
"""Frames in Huffman code: baseline, extended, progressive."""
_SCAN, _INTERVAL, _TABLES = 0xDA, 0xDD, 0xC4
_PROGRESSIVE = (0xC2, 0xCA)
_TAILS = (b"", b"\x55" * 1024, b"\xaa" * 1024)


def loss(data: bytes) -> str | None:
    """Describes which compressed pixels are missing, as far as markers and zeros tell it; None where nothing is.

    Zeros stand where file systems never wrote a block: a long run of them is valid only where the scan's codes make it
    blank blocks (a zero difference, an end of block), and never up to the end of a file without its end marker. A scan
    has as many restart markers as its size needs, and the scans of a progressive image send every bit of every
    coefficient.
    """
    frame, tables, interval = _Frame(), dict[int, int](), 0
    for marker, segment, start, stop in _segments(data):
        if marker == _TABLES:
            tables |= _first_symbols(segment)
        elif marker == _INTERVAL:
            interval = int.from_bytes(segment[:2], "big")
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC8, 0xCC):
            frame = _Frame.parsed(marker, segment)
        elif marker == _SCAN:
            zeros = data.find(_HOLE, start, stop)
            is_end_lost = stop == len(data) and data.endswith(_HOLE)
            if zeros >= 0 and (is_end_lost or not _zeros_are_blank(segment, frame.marker, tables)):
                return f"zeros stand in the place of its pixels, from byte {zeros} of {len(data)}"
            restarts = -(-frame.num_units(segment) // interval) - 1 if interval else 0
            if restarts > 0 and (markers := _num_restarts(data, start, stop)) < restarts:
                return f"a scan has {markers} of its {restarts} restart markers, so a part of its pixels is missing"
            frame.take(segment)
    return "its last scans are missing" if frame.lacks_scans else None


@dataclass
class _Frame:
    """The frame of a JPEG (ITU T.81, B.2.2), and the bits of its coefficients that are still to come.

    sampling: (horizontal, vertical) sampling by component; missing_bits: lowest bit sent so far of each coefficient, by
    component, for progressive frames.
    """

    marker: int = 0
    width: int = 0
    height: int = 0
    sampling: dict[int, tuple[int, int]] = field(default_factory=dict)
    missing_bits: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def parsed(cls, marker: int, segment: bytes) -> "_Frame":
        count = segment[5] if len(segment) > 5 else 0
        parts = [segment[6 + 3 * number : 9 + 3 * number] for number in range(count)]
        if len(segment) < 6 + 3 * count or not all(part[1] >> 4 and part[1] & 15 for part in parts):
            return cls()
        height, width = struct.unpack_from(">HH", segment, 1)
        is_progressive = marker in _PROGRESSIVE
        return cls(
            marker, width, height, {part[0]: (part[1] >> 4, part[1] & 15) for part in parts},
            {part[0]: [1] * _COEFFICIENTS for part in parts} if is_progressive else {},
        )  # fmt: skip

    def num_units(self, scan: bytes) -> int:
        """Counts the units that restart markers separate in a scan, by its header; 0 where it is not known."""
        components = [scan[1 + 2 * number] for number in range(scan[0])] if len(scan) >= 1 + 2 * scan[0] else []
        if self.marker not in _DCT_FRAMES or not components or any(name not in self.sampling for name in components):
            return 0
        most = tuple(max(values) for values in zip(*self.sampling.values(), strict=True))
        if len(components) > 1:
            return -(-self.width // (8 * most[0])) * -(-self.height // (8 * most[1]))
        shares = self.sampling[components[0]]
        width, height = -(-self.width * shares[0] // most[0]), -(-self.height * shares[1] // most[1])
        return -(-width // 8) * -(-height // 8)

    def take(self, scan: bytes) -> None:
        """Notes what a scan of a progressive frame sends."""
        count = scan[0] if scan else 0
        if len(scan) < 4 + 2 * count:
            return
        first, last, approximation = scan[1 + 2 * count : 4 + 2 * count]
        for number in range(count):
            bits = self.missing_bits.get(scan[1 + 2 * number], [])
            for coefficient in range(first, min(last + 1, len(bits))):
                bits[coefficient] = approximation & 15

    @property
    def lacks_scans(self) -> bool:
        return any(bit for bits in self.missing_bits.values() for bit in bits)


def _num_restarts(data: bytes, start: int, stop: int) -> int:
    return sum(data.count(bytes((0xFF, 0xD0 + number)), start, stop) for number in range(8))


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
    body = data.rstrip(b"\xff")
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
    is_progressive = any(marker in _PROGRESSIVE for marker, _ in segments)

    def load(picture: Image.Image) -> None:
        if not is_progressive:
            picture.draft(None, (max(1, picture.width // 8), max(1, picture.height // 8)))
        picture.load()

    return completed(data[: stops[-1]], load) is None
