"""Loads an image as a person sees it: upright, RGB, eight bits.

Pillow's `convert("RGB")` is silently wrong for three kinds of page scans: it clips 16-bit grey to its brightest value
(a page becomes white), it shows the hidden colours under full transparency (a page becomes black), and it clips
floating-point grey of the range 0 to 1 to black. Depth, sign and polarity, which Pillow loses before, are kept by
`mmray.images.readers`.
"""

import io
from typing import IO

import numpy as np
from PIL import Image, ImageFile
from PIL.GifImagePlugin import GifImageFile

from mmray.base.words import one_line
from mmray.errors import RowError
from mmray.images import jpeg, png
from mmray.images.deep import is_mixed, mixed
from mmray.images.header import MAX_PIXELS, ImageHeader, opened_image, page_of
from mmray.images.pdf import render_pdf
from mmray.images.readers import PngReader, TiffReader
from mmray.images.source import PASS_THROUGH_ERRORS, ImageSource, describe_source

_WHITE = (255, 255, 255)
_GREY = {127, 128}
"""Levels of the pixels that decoders put in the place of missing ones in a JPEG."""
_ZEROS_SHARE, _ZEROS_BYTES = 8, 4096
"""A run of zeros of an eighth of a file, and of at least so many bytes, is no compressed picture."""
_ENTROPY_CODED = ("AVIF", "HEIF", "JPEG2000")
"""Formats whose compressed pixels hold no long run of zeros, not even those of a blank page (measured: 16 bytes). A
WebP of a blank page is full of them."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that turns pixels upright, by their EXIF orientation (EXIF 2.32, tag 274)."""


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image, or renders a page of a PDF: mode RGB, upright, of the size that `image_size` returns.

    Of several frames the first is used, unless the source names another. Transparency is laid over white, and so is
    the part of the canvas that a first frame leaves empty. Grey above 8 bits is scaled from its depth, up to 16 bits.
    Grey of 32 bits (integer or float), and signed grey, carries no range in the file: the smallest of 0..1 (float
    only), 0..255, 0..65535 that holds every value is used, for unsigned values above 2^31 the whole range; otherwise
    the values are stretched from their least to their greatest. CMYK is converted without a colour profile. The result
    has an empty `info`, so that no later reader finds an orientation to apply a second time.

    Raises RowError: those of `read_header`; `image_corrupt` where the pixels cannot be decoded (truncated files too).
    """

    page = page_of(source)
    if page and page.is_pdf:
        return render_pdf(page, max_pixels)
    with opened_image(source, max_pixels) as (image, header):
        return decoded(image, header, source)


def decoded(image: ImageFile.ImageFile, header: ImageHeader, source: ImageSource, reduction: int = 1) -> Image.Image:
    """Decodes the pixels of an opened image, as `load_image` does.

    reduction: 2, 4 or 8, for a DCT JPEG only: the image gets that fraction of its size, rounded up. Each pixel is the
        mean of reduction x reduction pixels, and much of the decoding work is saved.

    Raises RowError `image_corrupt` where the pixels cannot be decoded.
    """
    expected = header.size
    if reduction > 1:
        expected = -(-header.width // reduction), -(-header.height // reduction)
    try:
        pixels = _decode(image, header, reduction)
    except PASS_THROUGH_ERRORS:
        raise
    except Exception as error:  # a decoder of foreign bytes may raise anything
        message = f"{describe_source(source)}: {one_line(error)}; store the image anew"
        raise RowError("image_corrupt", message) from error
    if pixels.size != expected:
        sizes = f"{expected} pixels were announced, there are {pixels.size}"
        raise RowError("image_corrupt", f"{describe_source(source)}: {sizes}; store the image anew")
    return pixels


def _decode(image: ImageFile.ImageFile, header: ImageHeader, reduction: int) -> Image.Image:
    if header.format in ("JPEG", "MPO"):
        pixels = _to_rgb(_whole_jpeg(image, reduction))
    elif is_mixed(image):
        file = image.fp
        pixels = mixed(image)
        _check_rows(image, file)
    else:
        _load_whole(image)
        pixels = _to_rgb(image)
        if isinstance(image, GifImageFile) and image.tell() == 0 and image.dispose_extent:
            pixels = _on_canvas(pixels, image.dispose_extent)
    if header.orientation != 1:
        pixels = pixels.transpose(_UPRIGHT[header.orientation])
    pixels.info = {}
    return pixels


def _whole_jpeg(image: ImageFile.ImageFile, reduction: int) -> Image.Image:
    """Decodes a JPEG. Raises ValueError where pixels are lost, which decoders do not report."""
    if not isinstance(image.fp, io.BytesIO):
        raise TypeError("a JPEG is decoded from memory")
    data, size = image.fp.getvalue(), (image.width // reduction, image.height // reduction)

    def load(opened: Image.Image) -> None:
        if reduction > 1:
            opened.draft(None, size)
        opened.load()

    if lost := jpeg.loss(data):
        raise ValueError(lost)
    picture: Image.Image = image
    try:
        load(image)
    except OSError:
        whole = jpeg.completed(data, load)
        if whole is None:
            raise
        picture = whole
    last = np.asarray(picture.crop((picture.width - 1, picture.height - 1, picture.width, picture.height)))
    if set(last.reshape(-1).tolist()) <= _GREY and jpeg.lacks_pixels(data):
        raise ValueError("it ends before its pixels do")
    return picture


def _load_whole(image: ImageFile.ImageFile) -> None:
    """Decodes an image. Raises ValueError where pixels are lost, which decoders do not report."""
    file = image.fp
    if file and image.format in _ENTROPY_CODED:
        place = file.tell()
        file.seek(0)
        data = file.read()
        file.seek(place)
        if bytes(max(_ZEROS_BYTES, len(data) // _ZEROS_SHARE)) in data[: _picture_end(data)]:
            raise ValueError("zeros stand in the place of its pixels")
    image.load()
    _check_rows(image, file)


def _picture_end(data: bytes) -> int:
    """Returns the end of the boxes of an AVIF or HEIC, and of the codestream of a JPEG 2000; padding may follow."""
    if data[4:8] != b"ftyp":
        end = data.rfind(b"\xff\xd9")
        return end + 2 if end >= 0 else len(data)
    end = 0
    while len(head := data[end : end + 16]) >= 8 and head[:8] != bytes(8):
        size = int.from_bytes(head[:4], "big")
        size = int.from_bytes(head[8:], "big") if size == 1 else size
        if size < 8:  # 0: up to the end of the file
            return len(data)
        end += size
    return end


def _check_rows(image: Image.Image, file: IO[bytes] | None) -> None:
    """Raises ValueError where the last rows of a decoded PNG are missing."""
    if file and isinstance(image, PngReader) and image.tell() == 0:
        last_rows = np.asarray(image.crop((0, max(image.height - 2, 0), image.width, image.height)))
        if not all(row.any() for row in last_rows) and png.lacks_rows(file):
            raise ValueError("its data ends before its last row")


def _to_rgb(image: Image.Image) -> Image.Image:
    if isinstance(image, TiffReader):
        if image.mode in ("I", "F") or image.mode.startswith("I;16") or image.is_signed:
            return _tiff_grey(image)
        if image.mode == "RGBA" and not image.is_alpha_named:
            return _over_white(_trusted(image))
    if image.mode.startswith("I;16"):
        return _grey_16(image)
    if image.mode in ("I", "F"):  # PFM is F too, and has a range that fits
        is_pnm = image.mode == "I" and getattr(image, "format", None) == "PPM"  # of more than 8 bits: 0..65535
        return _grey(_full_scale(np.asarray(image), 65535) if is_pnm else _fitted(np.asarray(image)))
    if image.format == "BMP" and image.mode == "RGBA":
        return _over_white(_trusted(image))
    if image.mode == "La":
        return _over_white(image.convert("LA").convert("RGBA"))
    if image.has_transparency_data:
        return _over_white(image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _trusted(image: Image.Image) -> Image.Image:
    """Makes RGBA opaque where the fourth channel is 0 everywhere and therefore a filler."""
    if image.getchannel("A").getextrema() == (0, 0):
        image.putalpha(255)
    return image


def _over_white(image: Image.Image) -> Image.Image:
    alpha = image.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return image.convert("RGB")
    page = Image.new("RGB", image.size, _WHITE)
    page.paste(image, mask=alpha)
    return page


def _on_canvas(frame: Image.Image, place: tuple[int, int, int, int]) -> Image.Image:
    """Puts the first frame of an animation in its place on a white canvas of the frame's size."""
    if place == (0, 0, *frame.size):
        return frame
    page = Image.new("RGB", frame.size, _WHITE)
    page.paste(frame.crop(place), place)
    return page


def _tiff_grey(image: TiffReader) -> Image.Image:
    values = np.asarray(image)
    if image.is_signed:
        values = values.view(np.int8) if image.mode == "L" else values
    elif image.mode == "I":
        values = values.view(np.uint32)
    if image.mode.startswith("I;16"):
        return _grey(_full_scale(values, 2**image.bits - 1), image.is_white_zero)
    return _grey(_fitted(values), image.is_white_zero)


def _grey_16(image: Image.Image) -> Image.Image:
    """Scales grey of 0..65535 to 0..255; one value may be transparent."""
    values = np.asarray(image)
    grey = _full_scale(values, 65535)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return _grey(grey)


def _grey(values: np.ndarray, is_white_zero: bool = False) -> Image.Image:
    """Builds an RGB image of grey values, uint8 [height, width]."""
    return Image.fromarray(255 - values if is_white_zero else values).convert("RGB")


def _full_scale(values: np.ndarray, max_value: int) -> np.ndarray:
    """Scales integers of 0..max_value to 0..255, uint8, rounded to the nearest."""
    scaled: np.ndarray = (values.astype(np.uint32) * 255 + max_value // 2) // max_value
    return scaled.clip(0, 255).astype(np.uint8)


def _fitted(values: np.ndarray) -> np.ndarray:
    """Scales numbers without a known range to 0..255, uint8, by the range that they fit (see `load_image`)."""
    is_float, is_unsigned = values.dtype.kind == "f", values.dtype == np.uint32
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 65535:
        ranges = (1.0, 255.0, 65535.0) if is_float else (255.0, 65535.0)
        low, high = 0.0, next(limit for limit in ranges if high <= limit)
    elif is_unsigned and high >= 2**31:
        low, high = 0.0, 2.0**32 - 1
    span = high - low or 1.0
    return np.rint((values - low) * 255.0 / span).clip(0, 255).astype(np.uint8)
