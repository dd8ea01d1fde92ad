"""Pixels as they are seen: orientations, modes, transparency, depths, and broken files."""

import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from mmray.errors import RowError
from mmray.images import image_size, load, load_image

EXIF_PHOTOS = Path(__file__).resolve().parents[4] / "shared/data/exif"
needs_photos = pytest.mark.skipif(not EXIF_PHOTOS.is_dir(), reason="the shared test data is not here")

HOW_STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""What a camera does to the upright picture before storing it with an orientation."""

LOSSLESS: dict[str, list[dict[str, object]]] = {
    "PNG": [{}],
    "WEBP": [{"lossless": True}],
    "TIFF": [{}, {"compression": "tiff_lzw"}],
}


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def loaded(image: Image.Image, image_format: str = "PNG", **options: object) -> Image.Image:
    data = encoded(image, image_format, **options)
    result = load_image(data)
    assert result.mode == "RGB"
    assert result.size == image_size(data)
    return result


def picture(width: int = 7, height: int = 4) -> Image.Image:
    """No two pixels are equal, so any wrong turn shows."""
    values = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    return Image.fromarray(values)


def quadrants(width: int = 64, height: int = 32) -> Image.Image:
    """Four flat colours, which survive JPEG."""
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.paste((0, 255, 0), (width // 2, 0, width, height // 2))
    image.paste((0, 0, 255), (0, height // 2, width // 2, height))
    image.paste((40, 40, 40), (width // 2, height // 2, width, height))
    return image


def stored(upright: Image.Image, orientation: int) -> tuple[Image.Image, Image.Exif]:
    exif = Image.Exif()
    exif[274] = orientation
    how = HOW_STORED[orientation]
    return (upright if how is None else upright.transpose(how)), exif


def pixels(image: Image.Image) -> list[list[list[int]]]:
    return np.asarray(image).tolist()


def difference(one: Image.Image, other: Image.Image) -> float:
    """The mean absolute difference of the values, 0 to 255."""
    return float(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).mean())


# ------------------------------------------------------------ orientations


@pytest.mark.parametrize("orientation", HOW_STORED)
@pytest.mark.parametrize(
    ("image_format", "options"), [(name, each) for name, several in LOSSLESS.items() for each in several]
)
def test_every_orientation_of_every_lossless_format(
    image_format: str, options: dict[str, object], orientation: int
) -> None:
    image, exif = stored(picture(), orientation)
    data = encoded(image, image_format, exif=exif, **options)
    assert image_size(data) == load_image(data).size == (7, 4)
    assert pixels(load_image(data)) == pixels(picture())


@pytest.mark.parametrize("orientation", HOW_STORED)
@pytest.mark.parametrize(
    ("image_format", "options"),
    [("JPEG", {}), ("TIFF", {"compression": "jpeg"}), ("WEBP", {}), ("AVIF", {})],
)
def test_every_orientation_of_every_lossy_format(
    image_format: str, options: dict[str, object], orientation: int
) -> None:
    image, exif = stored(quadrants(), orientation)
    data = encoded(image, image_format, exif=exif, quality=95, **options)
    assert image_size(data) == load_image(data).size == (64, 32)
    assert difference(load_image(data), quadrants()) < 8


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_no_later_reader_turns_the_picture_again(image_format: str) -> None:
    image, exif = stored(quadrants(), 6)
    upright = load_image(encoded(image, image_format, exif=exif))
    assert pixels(ImageOps.exif_transpose(upright)) == pixels(upright)
    assert upright.info == {}


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_result_travels_between_processes(image_format: str) -> None:
    image = load_image(encoded(quadrants(), image_format))
    assert pixels(pickle.loads(pickle.dumps(image))) == pixels(image)


@needs_photos
@pytest.mark.parametrize(("kind", "size"), [("Landscape", (1800, 1200)), ("Portrait", (1200, 1800))])
def test_photos_of_every_orientation_show_one_picture(kind: str, size: tuple[int, int]) -> None:
    reference = load_image(EXIF_PHOTOS / f"{kind}_1.jpg")
    assert reference.size == size
    small = reference.resize((60, 60))
    for orientation in range(9):
        path = EXIF_PHOTOS / f"{kind}_{orientation}.jpg"
        image = load_image(path)
        assert image_size(path) == image.size == size
        assert difference(image.resize((60, 60)), small) < 2, path.name
        if orientation == 7:  # an independent reader says the same
            with Image.open(path) as opened:
                assert ImageOps.exif_transpose(opened).tobytes() == image.tobytes()


# ------------------------------------------------------------ modes


def test_rgb_is_unchanged() -> None:
    assert pixels(loaded(picture())) == pixels(picture())


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "BMP"])
def test_grey_and_one_bit(image_format: str) -> None:
    grey = Image.fromarray(np.array([[0, 100, 255]], np.uint8))
    assert pixels(loaded(grey, image_format)) == [[[0] * 3, [100] * 3, [255] * 3]]
    assert pixels(loaded(grey.point(lambda v: 255 * (v > 99), "1"), image_format)) == [[[0] * 3, [255] * 3, [255] * 3]]


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_over_white(image_format: str) -> None:
    image = Image.new("RGBA", (3, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    first, hidden, half = pixels(loaded(image, image_format, **options))[0]
    assert (first, hidden, half) == ([10, 20, 30], [255, 255, 255], [127, 127, 127])


def test_an_opaque_alpha_channel_changes_nothing() -> None:
    image = picture().copy()
    image.putalpha(255)
    assert pixels(loaded(image)) == pixels(picture())


def test_grey_with_alpha() -> None:
    image = Image.new("LA", (2, 1), (60, 255))
    image.putpixel((1, 0), (60, 0))
    assert pixels(loaded(image)) == [[[60] * 3, [255] * 3]]


def palette_image() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 9, 99, 199])
    image.putpixel((1, 0), 1)
    return image


def test_palettes_with_and_without_transparency() -> None:
    black, colour, white = [0, 0, 0], [9, 99, 199], [255, 255, 255]
    assert pixels(loaded(palette_image())) == [[black, colour]]
    assert pixels(loaded(palette_image(), transparency=0)) == [[white, colour]]
    assert pixels(loaded(palette_image(), transparency=b"\x00\xff")) == [[white, colour]]
    assert pixels(loaded(palette_image(), "GIF", transparency=1)) == [[black, white]]


def test_palette_with_alpha_channel() -> None:
    image = palette_image().convert("PA")
    image.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
    assert pixels(loaded(image, "TIFF")) == [[[255, 255, 255], [9, 99, 199]]]


@pytest.mark.parametrize(
    ("image", "key"), [(picture(3, 1), (3, 4, 5)), (Image.fromarray(np.array([[7, 8, 9]], np.uint8)), 8)]
)
def test_a_transparent_colour_is_white(image: Image.Image, key: object) -> None:
    expected = pixels(image.convert("RGB"))
    expected[0][1] = [255, 255, 255]
    assert pixels(loaded(image, transparency=key)) == expected


@pytest.mark.parametrize("image_format", ["JPEG", "TIFF"])
def test_cmyk_of_every_polarity(image_format: str) -> None:
    """Pillow writes CMYK JPEGs inverted with Adobe's marker, as Adobe's programs do."""
    image = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    image.paste((255, 255, 0, 0), (0, 0, 8, 16))
    data = encoded(image, image_format)
    assert (b"Adobe" in data) == (image_format == "JPEG")
    result = load_image(data)
    assert result.mode == "RGB"
    blue, white = np.asarray(result)[8, 3], np.asarray(result)[8, 13]
    assert np.abs(blue.astype(int) - [0, 0, 255]).max() < 6
    assert np.abs(white.astype(int) - 255).max() < 6


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "JPEG2000"])
def test_16_bits_are_scaled(image_format: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = [[[v] * 3 for v in (0, 0, 1, 1, 128, 255)]]
    assert pixels(loaded(Image.fromarray(values), image_format)) == expected


def test_16_bits_of_either_byte_order() -> None:
    image = Image.new("I;16B", (2, 2), 32896)
    assert pixels(loaded(image, "TIFF"))[0][0] == [128] * 3


def test_16_bits_with_a_transparent_value() -> None:
    values = np.array([[256, 257, 258]], np.uint16)
    assert pixels(loaded(Image.fromarray(values), transparency=257)) == [[[1] * 3, [255] * 3, [1] * 3]]


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("I", [0, 100, 255], [0, 100, 255]),
        ("I", [0, 257, 65535], [0, 1, 255]),
        ("I", [-100, 0, 100], [0, 128, 255]),
        ("I", [0, 1_000_000, 2_000_000], [0, 128, 255]),
        ("F", [0.0, 0.5, 1.0], [0, 128, 255]),
        ("F", [0.0, 100.4, 200.0], [0, 100, 200]),
        ("F", [0.0, 25700.0, 65535.0], [0, 100, 255]),
        ("F", [-1.0, 0.0, 1.0], [0, 128, 255]),
        ("F", [float("nan"), float("inf"), 1.0], [0, 0, 255]),
        ("F", [-7.0, -7.0, -7.0], [0, 0, 0]),
    ],
)
def test_32_bits_take_the_smallest_range_that_holds_them(mode: str, values: list, expected: list) -> None:
    array = np.array([values], np.int32 if mode == "I" else np.float32)
    assert pixels(loaded(Image.fromarray(array), "TIFF")) == [[[v] * 3 for v in expected]]


def test_a_dark_16_bit_pgm_stays_dark() -> None:
    assert pixels(load_image(b"P5 2 1 65535\n" + bytes([0, 200, 0, 100]))) == [[[1] * 3, [0] * 3]]


def test_ycbcr() -> None:
    assert difference(loaded(quadrants().convert("YCbCr"), "TIFF"), quadrants()) < 2


def test_lab() -> None:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    muted = Image.blend(quadrants(), Image.new("RGB", (64, 32), (128, 128, 128)), 0.5)
    lab = ImageCms.applyTransform(muted, to_lab)
    assert lab is not None
    assert difference(loaded(lab, "TIFF"), muted) < 2


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "TIFF", "WEBP", "MPO"])
def test_the_first_of_several_frames(image_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "green")]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert difference(load_image(data), frames[0]) < 6
    assert image_size(data) == (16, 16)


# ------------------------------------------------------------ broken files


def test_pixels_of_another_size_than_the_headers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_decode", lambda image, header, reduction: picture(5, 5))
    with pytest.raises(RowError, match=r"image_corrupt.*\(7, 4\).*\(5, 5\)"):
        load_image(encoded(picture(7, 4)))


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(7).integers(0, 256, (48, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "GIF", "BMP", "PPM"])
def test_a_truncated_file_has_a_size_and_no_pixels(image_format: str) -> None:
    whole = encoded(noise(), image_format)
    half = whole[: len(whole) * 2 // 3]
    if image_format == "TIFF":  # its directory stands at the end, or at the start
        half = encoded(noise(), image_format, compression="tiff_lzw")
        half = half[:400] + bytes(len(half) - 800) + half[-400:]
    assert image_size(half) == (64, 48)
    with pytest.raises(RowError, match="image_corrupt") as caught:
        load_image(half)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("image_format", ["WEBP", "AVIF"])
def test_a_truncated_file_of_one_piece_is_refused(image_format: str) -> None:
    whole = encoded(noise(), image_format)
    with pytest.raises(RowError, match=r"image_corrupt|image_unreadable"):
        load_image(whole[: len(whole) // 2])


def damaged() -> Iterator[tuple[str, bytes]]:
    image, exif = stored(quadrants(24, 16), 6)
    for image_format in ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF"]:
        options = {"exif": exif} if image_format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
        yield image_format, encoded(image, image_format, **options)
    yield "TIFF of JPEG", encoded(image, "TIFF", exif=exif, compression="jpeg")


DAMAGED = dict(damaged())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DAMAGED)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damage_gives_a_page_or_a_row_error_and_never_two_sizes(name: str, data: st.DataObject) -> None:
    whole = DAMAGED[name]
    places = st.integers(0, len(whole) - 1) | st.integers(0, min(len(whole) - 1, 120))
    changes = dict(data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6)))
    end = data.draw(st.just(len(whole)) | places)
    broken = bytes(changes.get(at, byte) for at, byte in enumerate(whole[:end]))
    size = reason_or(lambda: image_size(broken, max_pixels=10**6))
    mode_and_size = reason_or(lambda: mode_size(load_image(broken, max_pixels=10**6)))
    if isinstance(size, str):
        assert mode_and_size == size
    else:
        assert mode_and_size in ("image_corrupt", ("RGB", size))


def mode_size(image: Image.Image) -> tuple[str, tuple[int, int]]:
    return image.mode, image.size


def reason_or(read: Callable[[], object]) -> object:
    try:
        return read()
    except RowError as error:
        return error.reason
