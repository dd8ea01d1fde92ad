"""Whole and broken JPEGs: lost pixels are told from what only looks like it."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from mmray.errors import RowError
from mmray.images import TilingPolicy, jpeg, load_image, plan_tiles, render_tiles


def scan(width: int = 320, height: int = 240) -> Image.Image:
    """A page with print on it, and blank parts."""
    page = Image.new("RGB", (width, height), (250, 250, 246))
    pen = ImageDraw.Draw(page)
    random = np.random.default_rng(0)
    for y in range(20, height - 40, 12):
        for x in range(20, width - 60, 6):
            if random.random() < 0.7:
                pen.rectangle((x, y, x + int(random.integers(1, 5)), y + int(random.integers(2, 8))), fill=(20, 20, 30))
    return page


def encoded(page: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    page.save(file, "JPEG", **options)
    return file.getvalue()


KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "optimized": {"optimize": True},
    "progressive": {"progressive": True, "quality": 90},
    "restarts": {"restart_marker_rows": 1},
    "full colour": {"subsampling": 0},
}
WHOLE = {name: encoded(scan(), **options) for name, options in KINDS.items()}
WHOLE["grey"] = encoded(scan().convert("L"))
BLANK = {
    f"blank {name}": encoded(Image.new("RGB", (2000, 2600), "white"), **options) for name, options in KINDS.items()
}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("name", [*WHOLE, *BLANK])
@pytest.mark.parametrize("kept", [1, 0])
def test_a_file_without_its_end_marker_is_whole(name: str, kept: int) -> None:
    data = (WHOLE | BLANK)[name]
    assert data.endswith(b"\xff\xd9")
    assert np.array_equal(np.asarray(load_image(data[: len(data) - 2 + kept])), pixels(data))


@pytest.mark.parametrize("name", WHOLE)
@given(share=st.floats(0.35, 0.995))
@settings(max_examples=40, deadline=None)
def test_a_file_cut_anywhere_is_broken(name: str, share: float) -> None:
    """Within the pixels that show something; a cut within the last bytes may leave all that can be seen."""
    data = WHOLE[name]
    cut = data[: int(share * len(data))]
    with contextlib.suppress(RowError):
        assert np.array_equal(np.asarray(load_image(cut)), pixels(data)), "it shows something else"


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_zeros_up_to_the_end_are_no_pixels(name: str, share: float) -> None:
    data = WHOLE[name]
    at = int(share * len(data))
    with pytest.raises(RowError, match="image_corrupt"):
        load_image(data[:at] + bytes(len(data) - at))


@pytest.mark.parametrize("name", ["plain", "full colour", "grey", "restarts"])
def test_a_block_of_zeros_within_is_no_pixels(name: str) -> None:
    """As file systems leave it where a block was never written: the end of the file is there."""
    data = WHOLE[name]
    at = len(data) // 2
    with pytest.raises(RowError, match=r"image_corrupt.*zeros stand in the place of its pixels, from byte"):
        load_image(data[:at] + bytes(512) + data[at + 512 :])


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_an_end_marker_in_the_place_of_the_rest_is_no_pixels(name: str, share: float) -> None:
    """As programs that repair files write it; decoders make the rest grey. What the last scan of a progressive image
    adds cannot be seen; `mmray verify` finds that it is cut."""
    data = WHOLE[name]
    if (name, share) == ("progressive", 0.8):
        assert jpeg.lacks_pixels(data[: int(share * len(data))] + b"\xff\xd9")
        return
    with pytest.raises(RowError, match="image_corrupt"):
        load_image(data[: int(share * len(data))] + b"\xff\xd9")


@pytest.mark.parametrize("filler", [b"\xff", b"\x55"])
def test_lost_restart_markers_are_lost_pixels(filler: bytes) -> None:
    data = WHOLE["restarts"]
    at = len(data) // 2
    with pytest.raises(
        RowError, match=r"image_corrupt.*of its \d+ restart markers, so a part of its pixels is missing"
    ):
        load_image(data[:at] + filler * (len(data) - at - 2) + data[-2:])


@pytest.mark.parametrize("place", [5, 7])
def test_a_header_that_announces_more_than_there_is(place: int) -> None:
    """More rows, or more columns, by the frame header (ITU T.81, B.2.2)."""
    data = WHOLE["plain"]
    at = data.index(b"\xff\xc0") + place
    larger = (3 * int.from_bytes(data[at : at + 2], "big") // 2).to_bytes(2, "big")
    with pytest.raises(RowError, match="image_corrupt"):
        load_image(data[:at] + larger + data[at + 2 :])


def test_grey_pictures_are_whole() -> None:
    """Their last pixel is the grey that stands for lost ones."""
    for options in KINDS.values():
        data = encoded(Image.new("RGB", (300, 200), (128, 128, 128)), **options)
        assert np.array_equal(np.asarray(load_image(data)), pixels(data))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 7}])
@pytest.mark.parametrize("size", [(1, 1), (17, 9), (64, 48), (321, 243)])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_whole_files_of_any_size_and_sampling_lack_nothing(options, size, subsampling) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    for page in (noise, noise.convert("L"), noise.convert("CMYK")):
        data = encoded(page, subsampling=subsampling, **options)
        assert jpeg.loss(data) is None
        load_image(data)


@pytest.mark.parametrize("name", [*WHOLE, *BLANK])
def test_whole_files_have_no_hole(name: str) -> None:
    data = (WHOLE | BLANK)[name]
    assert jpeg.loss(data) is None
    assert np.array_equal(np.asarray(load_image(data)), pixels(data))


def test_long_runs_of_zeros_are_right_where_they_mean_blank() -> None:
    assert any(bytes(64) in data for data in BLANK.values()), "else this test shows nothing"


@pytest.mark.parametrize("name", WHOLE)
def test_zeros_outside_the_pixels_are_right(name: str) -> None:
    data = WHOLE[name]
    padding = b"\xff\xe1" + (4002).to_bytes(2, "big") + bytes(4000)
    padded = data[:2] + padding + data[2:] + bytes(3000)
    assert np.array_equal(np.asarray(load_image(padded)), pixels(data))


def test_a_reduced_page_without_its_end_marker() -> None:
    data = encoded(scan(1600, 1200))
    plan = plan_tiles((1600, 1200), TilingPolicy(grid=(2, 2), tile_size=(128, 128)))
    for whole, cut in zip(render_tiles(data, plan), render_tiles(data[:-2], plan), strict=True):
        assert np.array_equal(np.asarray(whole), np.asarray(cut))


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_bytes_may_stand_for_a_jpeg(data: st.DataObject) -> None:
    whole = bytearray(WHOLE["progressive"])
    for at, byte in data.draw(st.lists(st.tuples(st.integers(2, 700), st.integers(0, 255)), max_size=8)):
        whole[at] = byte
    lost = jpeg.loss(bytes(whole) + bytes(200))
    assert lost is None or "missing" in lost or "zeros" in lost
