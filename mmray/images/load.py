"""An image as a person sees it: upright, RGB, eight bits.

Pillow's own `convert("RGB")` is wrong for three kinds of page scans, all without a word: it clips 16-bit
grey to its brightest value (a page becomes white), it shows the hidden colours under full transparency (a
page becomes black), and it clips floating-point grey of the range 0 to 1 to black.
"""

import numpy as np
from PIL import Image, ImageFile

from mmray.errors import RowError
from mmray.images.header import MAX_PIXELS, ImageHeader, opened_image
from mmray.images.source import PASSING_ERRORS, ImageSource, describe_source, one_line

_WHITE = (255, 255, 255)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings pixels stored with an EXIF orientation upright (EXIF 2.32, tag 274)."""


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image: mode RGB, upright, of the size `image_size` tells; of several frames the first.

    Transparency is laid over white. Grey of 16 bits is scaled to 8. Grey of 32 bits (integer or float)
    carries no range in the file: the smallest of 0..1 (float only), 0..255, 0..65535 that holds every value
    is taken, else the values are stretched from their least to their greatest. CMYK is converted without a
    colour profile. The result has an empty `info`: no later reader finds an orientation to apply a second
    time.

    Raises RowError: those of `read_header`; `image_corrupt` where the pixels cannot be decoded (truncated
    files too).
    """
    with opened_image(source, max_pixels) as (image, header):
        return decoded(image, header, source)


def decoded(image: ImageFile.ImageFile, header: ImageHeader, source: ImageSource, reduction: int = 1) -> Image.Image:
    """The pixels of an opened image, as `load_image` gives them.

    reduction: 2, 4 or 8, of a DCT JPEG only, for an image of that fraction of the size, rounded up: each pixel is
    the mean of reduction x reduction, and much of the work of decoding is left out.
    """
    expected = header.size
    if reduction > 1:
        expected = -(-header.width // reduction), -(-header.height // reduction)
        image.draft(None, (image.width // reduction, image.height // reduction))
    try:
        pixels = _decode(image, header)
    except PASSING_ERRORS:
        raise
    except Exception as error:  # a decoder of foreign bytes may raise anything
        message = f"{describe_source(source)}: {one_line(error)}; store the image anew"
        raise RowError("image_corrupt", message) from error
    if pixels.size != expected:
        sizes = f"{expected} pixels were announced, there are {pixels.size}"
        raise RowError("image_corrupt", f"{describe_source(source)}: {sizes}; store the image anew")
    return pixels


def _decode(image: ImageFile.ImageFile, header: ImageHeader) -> Image.Image:
    image.load()
    pixels = _to_rgb(image)
    if header.orientation != 1 and header.format != "TIFF":  # Pillow turns a TIFF upright as it decodes
        pixels = pixels.transpose(_UPRIGHT[header.orientation])
    pixels.info = {}
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _grey_16(image)
    if image.mode in ("I", "F"):
        return _grey_32(image)
    if image.has_transparency_data:
        return _over_white(image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    alpha = image.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return image.convert("RGB")
    page = Image.new("RGB", image.size, _WHITE)
    page.paste(image, mask=alpha)
    return page


def _grey_16(image: Image.Image) -> Image.Image:
    """0..65535 to 0..255, rounded to the nearest: 257 is 65535 / 255."""
    values = np.asarray(image)
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _grey_32(image: Image.Image) -> Image.Image:
    """Grey of 32 bits to 0..255 by the range its values fit (see `load_image`)."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode == "I" and getattr(image, "format", None) == "PPM":
        low, high = 0.0, 65535.0  # Pillow reads PGM of more than 8 bits as 0..65535
    elif low >= 0 and high <= 65535:
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        low, high = 0.0, next(limit for limit in ranges if high <= limit)
    span = high - low or 1.0
    grey = np.rint((values - low) * 255.0 / span).clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
