"""The message for a file that is no picture says what it is."""

import gzip
import io
import sys

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from mmray.errors import RowError
from mmray.images import image_size, load_image
from mmray.images.contents import CONTENTS_BYTES, contents


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty"),
        (bytes(5000), "begins with zeros"),
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF; name a page of it"),
        (b"\r\n<!DOCTYPE html><html>", "a web page (HTML)"),
        (b"<html lang='de'>", "a web page (HTML)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "a pointer of Git LFS"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "XML, as stores send for errors"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b'{"error": "not found"}', "JSON text"),
        (gzip.compress(b"page", mtime=0), "gzip data; unpack it"),
        (b"PK\x03\x04....", "a ZIP archive"),
        (b"8BPS\0\x01", "a Photoshop document"),
        (b"\0\0\0\x20ftypisom....", "a film or a picture of the kind 'isom'"),
        (b"data:image/png;base64,iVBORw0KGgo=", "a picture written as base64 text"),
        (b"Dear Sir or Madam, the scan is attached.", "text, which begins 'dear sir"),
        (b"\x07\x08\xfe\xff\0\0", "no image of a known format"),
    ],
)
def test_what_a_file_is(data: bytes, words: str) -> None:
    with pytest.raises(RowError) as caught:
        image_size(data)
    assert caught.value.reason == "image_unreadable"
    assert words in caught.value.message
    assert "\n" not in caught.value.message


GREY = np.full((16, 16), 2000, np.uint16)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (imagecodecs.jpeg8_encode(GREY, bitspersample=12), "a JPEG of 12 bits; store it as JPEG of 8 bits"),
        (imagecodecs.jpegls_encode(GREY.astype(np.uint8)), "a JPEG-LS picture"),
        (imagecodecs.jpeg8_encode(GREY.astype(np.uint8)).replace(b"\x08\0\x10\0\x10", b"\x08\0\0\0\x10"), "its height"),
        (b"\xff\xd8\xff\xe0\0\x04ab" + bytes(40), "a JPEG whose header is damaged"),
    ],
)
def test_a_jpeg_that_is_not_decoded_says_its_kind(data: bytes, words: str) -> None:
    with pytest.raises(RowError, match="image_unreadable") as caught:
        image_size(data)
    assert words in caught.value.message


def test_any_beginning_has_a_message() -> None:
    for byte in range(256):
        assert "; " in contents(bytes([byte]) * CONTENTS_BYTES)


def heic(size: tuple[int, int] = (64, 48)) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    page = Image.new("RGB", size, (200, 40, 40))
    page.paste((40, 40, 200), (0, 0, size[0] // 2, size[1] // 2))
    file = io.BytesIO()
    pillow_heif.from_pillow(page).save(file, quality=95)
    return file.getvalue()


def test_a_photograph_of_a_telephone() -> None:
    data = heic()
    page = load_image(data)
    assert image_size(data) == page.size == (64, 48)
    assert page.mode == "RGB"
    assert max(abs(a - b) for a, b in zip(page.getpixel((8, 8)), (40, 40, 200))) < 12
    assert max(abs(a - b) for a, b in zip(page.getpixel((56, 40)), (200, 40, 40))) < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_of_a_telephone_is_turned_once(orientation: int) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[274] = orientation
    file = io.BytesIO()
    heif = pillow_heif.from_pillow(Image.new("RGB", (64, 48)))
    heif.save(file, exif=exif.tobytes())
    found = image_size(file.getvalue())
    assert found == load_image(file.getvalue()).size
    assert found == ((48, 64) if orientation >= 5 else (64, 48))


def test_a_photograph_of_a_telephone_without_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(RowError, match=r"image_unreadable.*a HEIC picture.*pip install 'mmray\[heif\]'"):
        image_size(data)
