"""Decodes colours of 16 bits that are mixed: with transparency, with a transparent colour, as inks.

Pillow keeps the high byte of each value, which is enough for a colour that is shown as it is, but not for one that is
compared or multiplied: products of two such values are wrong by up to 3 of 255. So the pixels are decoded twice, once
for the high and once for the low bytes, and mixed with 16 bits.
"""

import sys
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile

from mmray.images.readers import PngReader, TiffReader

_BAND_ROWS = 256
"""Rows that are mixed at a time, so that the numbers in between take little memory."""
_LOW_BYTES = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
"""The byte order under which the low byte of a value is taken for its high one, by the order of the file."""
_UNKNOWN = 127
"""The low byte where it cannot be read, in separate planes: wrong by half a level of 255 at most."""


def is_mixed(image: ImageFile.ImageFile) -> bool:
    """Tells whether an opened image has colours of 16 bits that are mixed. It must not be decoded yet."""
    kind = _raw_mode(image).partition(";16")[0]
    return (isinstance(image, PngReader) and image.transparent_16 is not None) or (
        ";16" in _raw_mode(image) and kind in ("RGBA", "RGBa", "LA", "CMYK")
    )


def mixed(image: ImageFile.ImageFile) -> Image.Image:
    """Decodes an image for which `is_mixed` holds: RGB, with white under its transparency."""
    raw_mode, low = _raw_mode(image), None
    kind, order = raw_mode[:-4], raw_mode[-1]
    if isinstance(image, PngReader) and kind == "LA":  # four bytes a pixel, which RGBA takes as they are
        both = _decoded(image, "RGBA")
        high, low = both[..., 0::2], both[..., 1::2]
    else:
        file, frame = image.fp, image.tell()
        high = _decoded(image, f"{kind.upper()};16{order}")
        again = _opened_again(image, file, frame)
        if again is None and kind == "RGBa":
            high = _multiplied_again(high)
        if again is not None:
            low = _decoded(again, f"{kind.upper()};16{_LOW_BYTES[order]}")
    page = np.empty((image.height, image.width, 3), np.uint8)
    is_opaque = kind == "RGBA" and isinstance(image, TiffReader) and not image.is_alpha_named and not high[..., 3].any()
    for top in range(0, image.height, _BAND_ROWS):
        rows = slice(top, top + _BAND_ROWS)
        values = high[rows].astype(np.float32) * 256 + (_UNKNOWN if low is None else low[rows])
        if isinstance(image, PngReader) and image.transparent_16 is not None:
            page[rows] = high[rows]
            page[rows][(values == np.asarray(image.transparent_16)).all(axis=2)] = 255
        else:
            page[rows] = _shown(kind, values / np.float32(65535), is_opaque)
    return Image.fromarray(page)


def _multiplied_again(pixels: np.ndarray) -> np.ndarray:
    """Undoes Pillow's division of colours by their transparency, which drops the rest. pixels: uint8 [height, width,
    4]."""
    colours, alpha = pixels[..., :3].astype(np.uint16), pixels[..., 3:]
    return np.concatenate([((colours * alpha + 254) // 255).astype(np.uint8), alpha], axis=2)


def _shown(kind: str, values: np.ndarray, is_opaque: bool) -> np.ndarray:
    """Mixes values of 0..1, [height, width, channels], to what is seen over white, uint8."""
    colours, last = values[..., :-1], values[..., -1:]
    if kind == "CMYK":
        share = (1 - colours) * (1 - last)
    elif is_opaque:
        share = colours
    elif kind == "RGBa":
        share = colours + 1 - last
    else:
        share = colours * last + 1 - last
    seen: np.ndarray = np.rint(share.clip(0, 1) * 255).astype(np.uint8)
    return seen


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """Returns Pillow's raw mode of the stored pixels; empty for a decoder without one."""
    arguments: Any = image.tile[0].args if image.tile else ""
    raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw_mode if isinstance(raw_mode, str) else ""


def _opened_again(
    image: ImageFile.ImageFile, file: IO[bytes] | None, frame: int
) -> ImageFile.ImageFile | None:  # fmt: skip
    """Opens the file of an image a second time, at a frame; None where libtiff takes the high bytes alone (separate
    planes)."""
    if file is None:
        raise ValueError("decoded already")
    file.seek(0)
    if isinstance(image, TiffReader) and image.is_planar:
        return None
    again: ImageFile.ImageFile = TiffReader(file) if isinstance(image, TiffReader) else PngReader(file)
    again.seek(frame)
    return again


def _decoded(image: ImageFile.ImageFile, raw_mode: str) -> np.ndarray:
    """Decodes the pixels by a raw mode, uint8 [height, width, channels]."""
    image.tile = [
        tile._replace(args=(raw_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else raw_mode)
        for tile in image.tile
    ]
    image.load()
    return np.asarray(image)
