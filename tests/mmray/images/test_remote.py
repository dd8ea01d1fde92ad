"""Images in remote storage: how much of them is read, and in how many requests."""

import pytest
from PIL import Image

from mmray.images import TilingPolicy, image_size, load_image, plan_tiles, render_tiles
from mmray.images.source import HEADER_BLOCK_BYTES, REMOTE_BLOCK_BYTES
from tests.mmray.images.counted import CountedFileSystem
from tests.mmray.images.test_load import encoded, stored
from tests.mmray.noise import noise

SIZE = (1600, 1100)


@pytest.fixture
def page(request: pytest.FixtureRequest, remote: CountedFileSystem) -> str:
    """The URI of a page of at least 1 MB, stored turned, in a format with options."""
    image_format, options = request.param
    image, exif = stored(noise(SIZE), 6)
    remote.contents["pages/one"] = encoded(image, image_format, exif=exif, **options)
    assert len(remote.contents["pages/one"]) > 1_000_000
    return "counted://pages/one"


FORMATS = [("JPEG", {}), ("JPEG", {"progressive": True, "quality": 95}), ("PNG", {}), ("TIFF", {})]


@pytest.mark.parametrize("page", FORMATS, indirect=True, ids=str)
def test_a_header_is_a_request_or_two(page: str, remote: CountedFileSystem) -> None:
    assert image_size(page) == SIZE
    assert remote.num_stats == 1, "the file is opened once"
    assert len(remote.ranges) <= 2
    assert remote.num_bytes <= 2 * HEADER_BLOCK_BYTES


def test_a_jpegs_header_is_one_request_with_all_its_exif(remote: CountedFileSystem) -> None:
    image, exif = stored(noise(SIZE), 6)
    exif[0x010E] = "x" * 60_000
    remote.contents["one"] = encoded(image, "JPEG", exif=exif)
    assert image_size("counted://one") == SIZE
    assert len(remote.ranges) == 1


@pytest.mark.parametrize("large", ["", "icc"])
def test_the_end_of_a_png_is_asked_for_where_its_beginning_has_no_exif(large: str, remote: CountedFileSystem) -> None:
    remote.contents["one"] = encoded(noise(SIZE), "PNG", icc_profile=bytes(300_000) if large else None)
    assert image_size("counted://one") == SIZE
    assert len(remote.ranges) <= (3 if large else 2)
    assert remote.num_bytes < 700_000 < len(remote.contents["one"])


@pytest.mark.parametrize("page", FORMATS[:3], indirect=True, ids=str)
def test_pixels_are_read_once_in_large_pieces(page: str, remote: CountedFileSystem) -> None:
    whole = len(remote.contents["pages/one"])
    image = load_image(page)
    assert image.size == SIZE
    assert remote.num_bytes <= 1.2 * whole + HEADER_BLOCK_BYTES
    assert len(remote.ranges) <= whole / REMOTE_BLOCK_BYTES + 2
    remote.ranges.clear()
    plan = plan_tiles(SIZE, TilingPolicy(grid=(2, 2), tile_size=(100, 100)))
    assert [tile.size for tile in render_tiles(page, plan)] == [(100, 100)] * 4
    assert remote.num_bytes <= 1.2 * whole + HEADER_BLOCK_BYTES


def test_a_small_page_is_one_request(remote: CountedFileSystem) -> None:
    remote.contents["one"] = encoded(Image.new("RGB", (850, 1100), "white"), "JPEG")
    assert load_image("counted://one").size == (850, 1100)
    assert remote.ranges == [(0, len(remote.contents["one"]))]
