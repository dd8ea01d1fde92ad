"""Blocks of zeros that were never written are found; zeros that are pixels are not taken for them."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmray.images.holes import BLOCK_BYTES, LEAST_BYTES, hole

KINDS = {
    "bmp": {"format": "BMP"}, "tiff": {"format": "TIFF"}, "webp": {"format": "WEBP", "quality": 80},
    "lossless webp": {"format": "WEBP", "lossless": True}, "progressive jpeg": {"format": "JPEG", "progressive": True},
    "ppm": {"format": "PPM"}, "gif": {"format": "GIF"}, "jpeg2000": {"format": "JPEG2000"},
}  # fmt: skip


def encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, **KINDS[kind])
    return file.getvalue()


def scan(seed: int) -> Image.Image:
    """A page: grain on white, with black bars and a black border, as of a scanner."""
    pixels = np.random.default_rng(seed).integers(200, 256, (700, 500, 3), dtype=np.uint8)
    pixels[100:180, 50:450], pixels[400:403], pixels[:, :20], pixels[-30:] = 0, 0, 0, 0
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_was_lost_is_found_in_every_format(kind: str) -> None:
    """In the middle, and up to the end of the file; next to pixels that are zero too it cannot be told from them."""
    data = encoded(scan(1), kind)
    assert hole(io.BytesIO(data)) is None
    starts = [at for at in range(BLOCK_BYTES, len(data) - LEAST_BYTES, BLOCK_BYTES) if data[at - 1]]
    holes = [(start, min(start + length, len(data))) for start in starts for length in (BLOCK_BYTES, len(data))]
    holes = [(start, stop) for start, stop in holes if stop == len(data) or data[stop]]
    assert len(holes) > 8
    for start, stop in holes[:: len(holes) // 8]:
        lost = data[:start] + bytes(stop - start) + data[stop:]
        assert hole(io.BytesIO(lost)) == (start, stop - start)


@given(
    size=st.integers(1, 5 * BLOCK_BYTES),
    runs=st.lists(st.tuples(st.integers(0, 5 * BLOCK_BYTES), st.integers(0, 3 * BLOCK_BYTES)), max_size=3),
    aligned=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), max_size=2),
)
def test_holes_are_runs_of_zeros_that_are_blocks(
    size: int, runs: list[tuple[int, int]], aligned: list[tuple[int, int]]
) -> None:
    """The oracle looks at every run of zeros, byte by byte."""
    data = bytearray(b"x" * size)
    for start, length in runs + [(first * BLOCK_BYTES, count * BLOCK_BYTES) for first, count in aligned]:
        data[start : start + length] = bytes(len(data[start : start + length]))
    holes = []
    for part in bytes(data).split(b"x"):
        start = holes[-1][1] + 1 if holes else 0
        holes.append((start, start + len(part)))
    expected = [
        (start, stop - start)
        for start, stop in holes
        if stop - start >= LEAST_BYTES
        and start
        and start % BLOCK_BYTES == 0
        and (stop % BLOCK_BYTES == 0 or stop == size)
    ]
    assert hole(io.BytesIO(bytes(data))) == (expected[0] if expected else None)
