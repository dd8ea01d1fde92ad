"""Sizes from headers: nothing is decoded, every format and orientation, limits, and broken EXIF."""

import io
import struct
import threading
import warnings
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from mmray.errors import RowError
from mmray.images import header, image_size, load_image, read_header, readers
from mmray.images.source import PASS_THROUGH_ERRORS

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at < len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        chunks.append((kind, png[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return PNG_SIGNATURE + b"".join(png_chunk(kind, data) for kind, data in chunks)


def refusal(data: bytes, **options: int) -> RowError:
    with pytest.raises(RowError) as caught:
        image_size(data, **options)
    assert "\n" not in caught.value.message
    return caught.value


PAGE = Image.new("RGB", (60, 40), (200, 30, 30))
UPRIGHT = {image_format: encoded(PAGE, image_format) for image_format in readers.FORMATS}
ROTATED = {
    image_format: encoded(PAGE, image_format, exif=exif_of(6))
    for image_format in ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"]
}


def plugin_classes() -> list[type]:
    Image.init()
    found, pending = [], [ImageFile.ImageFile]
    while pending:
        pending += (subclasses := pending.pop().__subclasses__())
        found += subclasses
    return found


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decodes(self: Image.Image) -> None:
        raise AssertionError("an image was decoded to learn its size")

    for kind in [Image.Image, ImageFile.ImageFile, *plugin_classes()]:
        if "load" in vars(kind):
            monkeypatch.setattr(kind, "load", decodes)


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("image_format", readers.FORMATS)
def test_the_size_of_every_format_without_decoding(image_format: str) -> None:
    data = UPRIGHT[image_format]
    found = read_header(data)
    assert (found.width, found.height) == found.size == image_size(data) == (60, 40)
    assert (found.format, found.orientation) == (image_format, 1)


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("image_format", ROTATED)
def test_the_upright_size_without_decoding(image_format: str) -> None:
    found = read_header(ROTATED[image_format])
    assert (found.size, found.orientation) == ((40, 60), 6)


def exif_behind_the_pixels() -> list[tuple[bytes, bytes]]:
    chunks = png_chunks(ROTATED["PNG"])
    return [c for c in chunks if c[0] not in (b"eXIf", b"IEND")] + [c for c in chunks if c[0] == b"eXIf"]


@pytest.mark.usefixtures("no_decoding")
def test_the_exif_of_a_png_behind_its_pixels() -> None:
    chunks = exif_behind_the_pixels()
    assert image_size(png_of([*chunks, (b"IEND", b"")])) == (40, 60)
    assert image_size(png_of(chunks)) == (40, 60), "without the end of the file"


def test_the_exif_of_a_png_behind_its_pixels_turns_them() -> None:
    assert load_image(png_of([*exif_behind_the_pixels(), (b"IEND", b"")])).size == (40, 60)


def test_looking_for_exif_leaves_the_file_where_pillow_had_it() -> None:
    file = io.BytesIO(encoded(PAGE))
    file.seek(41)
    assert header._png_exif(file) == b""
    assert file.tell() == 41


def test_the_exif_of_a_png_as_hexadecimal_text() -> None:
    exif = exif_of(6).tobytes().hex()
    text = f"\nexif\n{len(exif) // 2:8}\n{exif[:72]}\n{exif[72:]}\n"
    chunks = png_chunks(encoded(PAGE))
    chunks.insert(1, (b"tEXt", b"Raw profile type exif\0" + text.encode()))
    assert image_size(png_of(chunks)) == load_image(png_of(chunks)).size == (40, 60)
    chunks[1] = (b"tEXt", b"Raw profile type exif\0\nexif\n 9\nno digits\n")
    assert image_size(png_of(chunks)) == load_image(png_of(chunks)).size == (60, 40)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("xmp", [b'<x tiff:Orientation="8"/>', b"<tiff:Orientation>8</tiff:Orientation>"])
def test_the_orientation_of_xmp_where_there_is_none_of_exif(image_format: str, xmp: bytes) -> None:
    data = with_xmp(image_format, xmp)
    assert image_size(data) == load_image(data).size == (40, 60)


def with_xmp(image_format: str, xmp: bytes) -> bytes:
    if image_format == "PNG":
        chunks = png_chunks(encoded(PAGE))
        chunks.insert(1, (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
        return png_of(chunks)
    if image_format == "TIFF":
        return encoded(PAGE, image_format, tiffinfo={700: xmp})
    return encoded(PAGE, image_format, xmp=xmp)


@pytest.mark.parametrize("image_format", ROTATED)
@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_an_orientation_that_does_not_exist_is_none(image_format: str, orientation: int) -> None:
    data = encoded(PAGE, image_format, exif=exif_of(orientation))
    assert read_header(data).orientation == 1
    assert image_size(data) == load_image(data).size == (60, 40)


def broken_exif() -> st.SearchStrategy[bytes]:
    """EXIF of orientation 6 with bytes changed, cut off, or of nothing known."""
    whole = exif_of(6).tobytes()
    changed = st.lists(st.tuples(st.integers(6, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=4).map(
        lambda changes: bytes(dict(changes).get(at, byte) for at, byte in enumerate(whole))
    )
    cut = st.integers(7, len(whole) - 1).map(lambda end: whole[:end])
    return changed | cut | st.binary(min_size=1, max_size=60).map(lambda tail: b"Exif\0\0" + tail)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@given(exif=broken_exif())
@settings(max_examples=60, deadline=None)
def test_broken_exif_is_no_error_and_both_readers_agree(image_format: str, exif: bytes) -> None:
    data = encoded(PAGE, image_format, exif=exif)
    assert image_size(data) == load_image(data).size


@given(st.binary(max_size=80).map(lambda tail: b"MM\0*\0\0\0\x08" + tail) | st.binary(max_size=80))
def test_any_bytes_may_stand_for_exif(exif: bytes) -> None:
    found = header._exif_orientation(exif)
    assert found is None or -1 <= found < 2**32


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "code"), [(1, "B3x"), (3, "H2x"), (4, "I")])
def test_orientations_of_every_integer_kind_and_byte_order(order: str, kind: int, code: str) -> None:
    magic = b"II*\0" if order == "<" else b"MM\0*"
    entries = struct.pack(order + "HHI4x", 271, 2, 0) + struct.pack(order + "HHI" + code, 274, kind, 1, 8)
    assert header._exif_orientation(magic + struct.pack(order + "IH", 8, 2) + entries) == 8


def test_a_file_object_can_be_read_again() -> None:
    file = io.BytesIO(ROTATED["PNG"])
    assert image_size(file) == image_size(file) == load_image(file).size == (40, 60)
    assert not file.closed


def test_a_path_and_its_open_files(tmp_path: Path) -> None:
    path = tmp_path / "page.jpg"
    PAGE.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        assert image_size(path) == image_size(str(path)) == (60, 40)


def test_frames() -> None:
    two = [PAGE.resize((30, 20))]
    frames = {f: read_header(encoded(PAGE, f, save_all=True, append_images=two)).num_frames for f in ["GIF", "TIFF"]}
    assert frames == {"GIF": None, "TIFF": None}
    same = [Image.new("RGB", (60, 40), "blue")]
    assert read_header(encoded(PAGE, "WEBP", save_all=True, append_images=same)).num_frames == 2
    assert read_header(encoded(PAGE, "PNG", save_all=True, append_images=same)).num_frames == 2
    assert {read_header(encoded(PAGE, f)).num_frames for f in ["JPEG", "TIFF", "PNG", "BMP"]} == {1}


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"no picture \0", "JPEG, PNG"),
        (b"\xff\xd8\xff", ""),
        (PNG_SIGNATURE, ""),
        (b"P6 0 9 255\n", ""),
    ],
)
def test_no_image(data: bytes, word: str) -> None:
    error = refusal(data)
    assert error.reason == "image_unreadable"
    assert word in error.message
    with pytest.raises(RowError, match="image_unreadable"):
        load_image(data)


def test_the_limit_of_pixels() -> None:
    data = encoded(PAGE)
    assert image_size(data, max_pixels=2400) == (60, 40)
    error = refusal(data, max_pixels=2399)
    assert error.reason == "image_too_large"
    assert "60 x 40 = 2400" in error.message
    with pytest.raises(RowError, match="image_too_large"):
        load_image(data, max_pixels=2399)


def png_claiming(width: int, height: int) -> bytes:
    return png_of([(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")])


def test_mmrays_limit_counts_and_pillows_is_silent() -> None:
    before = Image.MAX_IMAGE_PIXELS
    assert before is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(png_claiming(10_000, 10_000)) == (10_000, 10_000), "Pillow warns"
        assert image_size(png_claiming(20_000, 12_000)) == (20_000, 12_000), "Pillow refuses"
        assert refusal(png_claiming(100_000, 100_000)).reason == "image_too_large"
    assert before == Image.MAX_IMAGE_PIXELS
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(png_claiming(20_000, 12_000)))


def test_pillows_limit_is_put_back_by_the_last_thread() -> None:
    before = Image.MAX_IMAGE_PIXELS
    data = encoded(PAGE, "JPEG")
    first_is_inside, second_is_done = threading.Event(), threading.Event()

    def hold() -> None:
        with header.opened_image(data, header.MAX_PIXELS):
            first_is_inside.set()
            second_is_done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert first_is_inside.wait(10)
    image_size(data)
    assert Image.MAX_IMAGE_PIXELS is None, "the first thread is still inside"
    second_is_done.set()
    thread.join(10)
    assert before == Image.MAX_IMAGE_PIXELS


def test_pillows_limit_is_put_back_after_errors_and_left_where_someone_set_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1234)
    refusal(b"nothing")
    assert Image.MAX_IMAGE_PIXELS == 1234
    with header.opened_image(encoded(PAGE), header.MAX_PIXELS):
        Image.MAX_IMAGE_PIXELS = 99
    assert Image.MAX_IMAGE_PIXELS == 99


@pytest.mark.parametrize("failure", [kind("now") for kind in PASS_THROUGH_ERRORS])
def test_a_failing_network_rejects_no_row(failure: BaseException) -> None:
    class Unplugged(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise failure

    with pytest.raises(type(failure)):
        image_size(Unplugged(encoded(PAGE)))


def test_an_input_output_error_rejects_the_row() -> None:
    class Scratched(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(RowError, match=r"image_unreadable.*Input/output error"):
        image_size(Scratched(encoded(PAGE)))
