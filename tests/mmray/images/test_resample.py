"""Resizing: Pillow's result for every size and box, and the detail of the whole page from a reduced one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmray.images.resample import resample
from tests.mmray.noise import noise

sides = st.integers(1, 60)


@st.composite
def boxes(draw: st.DrawFn, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A part of a picture, at least a quarter of a pixel wide and high."""

    def span(length: int) -> tuple[float, float]:
        start = draw(st.integers(0, 4 * length - 1))
        return start / 4, draw(st.integers(start + 1, 4 * length)) / 4

    left, right = span(size[0])
    top, bottom = span(size[1])
    return left, top, right, bottom


def apart(one: Image.Image, other: Image.Image) -> np.ndarray:
    assert one.size == other.size
    assert one.mode == other.mode == "RGB"
    return np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16))


def pillow(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
    """Pillow's bicubic, columns first. By itself it takes first what is less work, which rounds otherwise."""
    left, top, right, bottom = box
    columns = image.resize((size[0], image.height), Image.Resampling.BICUBIC, (left, 0, right, image.height))
    return columns.resize(size, Image.Resampling.BICUBIC, (0, top, size[0], bottom))


@given(data=st.data(), page=st.tuples(sides, sides), size=st.tuples(sides, sides))
@settings(max_examples=150, deadline=None)
def test_the_same_as_pillow(data: st.DataObject, page: tuple[int, int], size: tuple[int, int]) -> None:
    image, box = noise(page), data.draw(boxes(page))
    assert apart(resample(image, size, box), pillow(image, size, box)).max() <= 2, "each of two passes rounds"
    soft = image.point(lambda value: 80 + value * 96 // 255)  # so that nothing overshoots 0 or 255
    assert apart(resample(soft, size, box), soft.resize(size, Image.Resampling.BICUBIC, box)).max() <= 3


def test_a_picture_that_pillow_holds_in_pieces() -> None:
    """Of more than 16 MB, and so not to be shared without a copy."""
    image = noise((3000, 1500))
    with pytest.raises(ValueError, match="contiguous"):
        image.__arrow_c_array__()
    size, box = (50, 40), (0, 0, 3000, 1500)
    assert apart(resample(image, size, box), pillow(image, size, box)).max() <= 1


def test_the_picture_is_not_changed() -> None:
    image = noise((40, 30))
    before = image.tobytes()
    resample(image, (20, 20), (0, 0, 40, 30))
    resample(image, (20, 20), (0, 0, 40, 30), reduction=2)
    assert image.tobytes() == before


# ------------------------------------------------------------ reduced pages


def waves(width: int, height: int, period: float) -> Image.Image:
    """Smooth grey waves in both directions; `period` in pixels."""
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    values = 127.5 + 60 * np.sin(2 * np.pi * x / period) + 60 * np.sin(2 * np.pi * y / (1.3 * period))
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_reduced_page_gives_the_detail_of_the_whole_one(reduction: int) -> None:
    """Without taking back the blur of the means, the difference is more than twice as large."""
    page = waves(800, 640, 5.0 * reduction)
    reduced = page.reduce(reduction)
    box = (100.0, 60.0, 700.0, 540.0)
    size = (round(600 / reduction / 1.3), round(480 / reduction / 1.3))
    scaled = tuple(edge / reduction for edge in box)
    whole = page.resize(size, Image.Resampling.BICUBIC, box)
    own = apart(resample(reduced, size, scaled, reduction=reduction), whole).mean()
    uncorrected = apart(resample(reduced, size, scaled), whole).mean()
    assert own < 2
    assert uncorrected > 2 * own


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_reduced_ramps_stay_where_they_are(reduction: int) -> None:
    """Flat and steadily rising grey needs no correction: the weights keep sums and centres."""
    ramp = Image.fromarray(np.tile(np.arange(0, 200, dtype=np.uint8), (60, 1))).convert("RGB")
    size, box = (90, 20), (10.25, 3.0, 190.75, 57.0)
    assert apart(resample(ramp, size, box, reduction=reduction), resample(ramp, size, box)).max() <= 1
