"""Pillow's readers, corrected where they decode a different image than the file's tags describe.

Pillow keeps only what fits its modes: the depth of grey above 8 bits, its sign and its polarity are lost, and a
transparent colour is compared with pixels that Pillow has already converted. So the tags are read here. What Pillow
reads correctly is left to it; the remaining kinds are corrected afterwards (`mmray.images.load`) or refused with their
depth and polarity.

Text, EXIF and XMP beside the pixels are not parsed while decoding, because a broken block would make the image
unreadable.
"""

import io
from collections.abc import Mapping
from functools import cache
from typing import Any, BinaryIO

from PIL import Image, ImageFile, ImagePalette
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import COMPRESSION_INFO, TiffImageFile
from PIL.TiffImagePlugin import PREFIXES as TIFF_PREFIXES
from PIL.WebPImagePlugin import WebPImageFile

FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", "JPEG2000", "GIF", "BMP", "PPM", "AVIF"]
"""Formats that are opened, by Pillow's names; HEIF too, where pillow-heif is installed. Pillow's other formats are
guessed without a signature (TGA), run an interpreter (EPS) or hold sizes that decoding changes (ICO)."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CODESTREAM, _JP2 = b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  \r\n\x87\n"
_JPEG_2000_HEAD = 1 << 16
_WEBP_FLAGS, _WEBP_ANIMATION = 20, 2
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}

_BITS, _COMPRESSION, _PHOTOMETRIC, _PLANAR, _COLOR_MAP, _EXTRA, _SAMPLE_FORMAT = 258, 259, 262, 284, 320, 338, 339
_SUBFILE_TYPE, _SUB_IFDS = 254, 330
_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT, _ROWS_PER_STRIP = 256, 257, 322, 323, 278
_STRIPS, _TILES = 273, 324
_REDUCED_IMAGE, _MASK = 1, 4
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _YCBCR = 0, 1, 2, 6
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_SEPARATE_PLANES = 2
_LZW = 5
_FAX = (2, 3, 4)
_OTHER_COMPRESSIONS = {
    33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000", 34887: "LERC", 34892: "JPEG", 34933: "PNG",
    34934: "JPEG XR", 50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip
"""Compressions of TIFF that Pillow does not know."""

_PHOTOMETRICS = {
    0: "WhiteIsZero", 1: "BlackIsZero", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "CIELab",
    9: "ICCLab", 10: "ITULab", 32803: "camera raw", 32844: "LogL", 32845: "LogLuv", 34892: "camera raw",
}  # fmt: skip
_SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point", 4: "untyped", 5: "complex", 6: "complex"}


class UnknownKindError(ValueError):
    """Raised for an image of a known format in a kind that cannot be decoded correctly. The message names the kind."""


class TiffReader(TiffImageFile):
    """Reads a TIFF with the depth, sign, polarity and planes that the tags of its current page state.

    Pillow is given tags of the nearest kind that it decodes into the same numbers, which are then interpreted by the
    attributes below. Pixels stay as they are stored, whatever the orientation.
    """

    bits: int
    """Bits of each value of a pixel."""
    is_signed: bool
    is_white_zero: bool
    """True if this is grey of more than 8 bits whose smallest value is white. Pillow inverts fewer bits itself."""
    is_alpha_named: bool
    """True if ExtraSamples names the fourth channel as transparency; otherwise Pillow only guesses that."""

    is_planar: bool
    """True if each channel is stored by itself."""

    is_preview: bool
    """True if the page is a smaller version of another page of the file, or a mask for one."""

    def _setup(self) -> None:
        tags = self.tag_v2
        self.is_preview = bool(tags.get(_SUBFILE_TYPE, 0) & (_REDUCED_IMAGE | _MASK))
        bits, formats = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))
        compression = tags.get(_COMPRESSION, 1)
        if _PHOTOMETRIC not in tags:
            tags[_PHOTOMETRIC] = _assumed_photometric(len(bits), compression)
        photometric = tags[_PHOTOMETRIC]
        self.bits, self.is_signed = max(bits), formats[0] == _SIGNED
        self.is_white_zero = photometric == _WHITE_IS_ZERO and self.bits > 8
        self.is_alpha_named = bool(tags.get(_EXTRA))
        if len(bits) == 1:
            tags[_PLANAR] = 1
        self.is_planar = is_planar = tags.get(_PLANAR, 1) == _SEPARATE_PLANES
        _check_compression(compression)
        _check_strips(tags, len(bits) if is_planar else 1)
        kind = self._kind(bits, formats, photometric, is_planar)
        if self.is_white_zero:
            tags[_PHOTOMETRIC] = _BLACK_IS_ZERO
        if self.bits == 32 and formats[0] == _UNSIGNED:
            tags[_SAMPLE_FORMAT] = (_SIGNED,) * len(formats)
        if compression == 1 and (is_planar or photometric == _YCBCR):
            tags[_COMPRESSION] = _LZW  # any but none: Pillow then leaves the reading to libtiff, which knows better
        try:
            super()._setup()
        except SyntaxError as error:
            raise UnknownKindError(
                f"a TIFF of {kind} cannot be shown right; store it as grey or RGB of 8 bits"
            ) from error
        if self.is_preview and _SUB_IFDS in tags:
            raise UnknownKindError(
                "the first picture is a small preview of another one (SubIFDs), as in camera raw files; store the "
                "picture itself"
            )
        if is_planar and self.mode in ("LA", "La", "PA", "LAB", "P"):
            raise UnknownKindError(f"a TIFF of {kind} cannot be shown right; store it without separate planes")
        if self.use_load_libtiff:
            self._take_native_order()
        if self.mode in ("P", "PA") and max(tags[_COLOR_MAP]) < 256:  # of 16 bits; some write 8
            self.palette = ImagePalette.raw("RGB;L", bytes(tags[_COLOR_MAP]))
        self._size = self._tile_size

    def _take_native_order(self) -> None:
        """Sets the machine's byte order, in which libtiff decodes, where Pillow assumes the file's."""
        tile = self.tile[0]
        raw_mode, *arguments = tuple(tile.args or ())
        native = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}.get(raw_mode, raw_mode)
        self.tile = [tile._replace(args=(native, *arguments))]

    def load_end(self) -> None:
        """Replaces Pillow's method, which reads EXIF and XMP once more and turns the pixels."""
        if not self.is_animated:
            self._close_exclusive_fp_after_loading = True

    @staticmethod
    def _kind(bits: tuple[int, ...], formats: tuple[int, ...], photometric: int, is_planar: bool) -> str:
        depth = "/".join(map(str, bits if len(set(bits)) > 1 else bits[:1]))
        sign = _SAMPLE_FORMATS.get(formats[0], f"format {formats[0]}")
        channels = f", {len(bits)} channels" + (" in separate planes" if is_planar else "") if len(bits) > 1 else ""
        return f"{depth} bits {sign}, {_PHOTOMETRICS.get(photometric, f'photometric {photometric}')}{channels}"


def _assumed_photometric(channels: int, compression: int) -> int:
    """Returns the meaning of pixels for a TIFF that does not state it, as libtiff assumes it."""
    if channels >= 3:
        return _RGB
    return _WHITE_IS_ZERO if compression in _FAX else _BLACK_IS_ZERO


def _check_compression(compression: int) -> None:
    """Raises UnknownKindError for a compression that cannot be decoded here."""
    name = COMPRESSION_INFO.get(compression)
    if name is None or not _is_decoded(name):
        name = name or _OTHER_COMPRESSIONS.get(compression, f"method {compression}")
        raise UnknownKindError(f"a TIFF compressed by {name} cannot be read; store it with LZW or Deflate")


@cache
def _is_decoded(compression: str) -> bool:
    """Tells whether libtiff has been built with an optional compression, by writing a picture with it."""
    if compression not in ("webp", "zstd", "lzma"):
        return True
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), "TIFF", compression=compression)
    except OSError:
        return False
    return True


def _check_strips(tags: Mapping[int, Any], planes: int) -> None:
    """Raises UnknownKindError for a TIFF with fewer strips or tiles than its size needs: Pillow leaves the rest
    black."""
    width, height = tags.get(_WIDTH), tags.get(_HEIGHT)
    if not (isinstance(width, int) and isinstance(height, int)):
        return
    columns: object
    rows: object
    if _STRIPS in tags:
        places, columns, rows = tags[_STRIPS], width, tags.get(_ROWS_PER_STRIP, height)
    else:
        places, columns, rows = tags.get(_TILES, ()), tags.get(_TILE_WIDTH), tags.get(_TILE_HEIGHT)
    if places and isinstance(columns, int) and isinstance(rows, int) and columns > 0 and rows > 0:
        needed = -(-width // columns) * -(-height // rows) * planes
        if len(places) < needed:
            raise UnknownKindError(f"a TIFF that holds {len(places)} of its {needed} parts; store it anew")


class PngReader(PngImageFile):
    """Reads a PNG: the transparent colour is compared in the file's depth, and nothing behind the pixels is read."""

    transparent_16: tuple[int, int, int] | None = None
    """The transparent colour of RGB of 16 bits a channel, of which Pillow keeps only the high bytes."""

    def _open(self) -> None:
        super()._open()
        if self.mode == "P" and self.palette is None:
            raise UnknownKindError("a PNG without its palette; store it anew")
        raw_mode, colour = self.raw_mode, self.info.get("transparency")
        if raw_mode == "RGB;16B" and isinstance(colour, tuple):
            self.transparent_16 = self.info.pop("transparency")
        elif raw_mode in ("L", "L;2", "L;4") and isinstance(colour, int):
            max_value = {"L": 255, "L;2": 3, "L;4": 15}[raw_mode]
            self.info["transparency"] = (colour & max_value) * (255 // max_value)
        elif raw_mode == "RGB" and isinstance(colour, tuple):
            self.info["transparency"] = tuple(value & 255 for value in colour)

    @property
    def raw_mode(self) -> str:
        """Pillow's raw mode of the stored pixels; empty once they are decoded."""
        return str(self.tile[0].args) if self.tile else ""

    def load_end(self) -> None:
        """Skips the chunks behind the pixels, which are text, except in animations, where they are frames."""
        if self.is_animated:
            super().load_end()
        elif self.png is not None:
            self.png.close()
            self.png = None


class WebpReader(WebPImageFile):
    """Reads a WebP. Frames of an animation need not cover its canvas, whose rest is transparent, whatever the file says
    of transparency."""

    def _open(self) -> None:
        super()._open()
        if self.fp is None:
            return
        self.fp.seek(0)
        head = self.fp.read(_WEBP_FLAGS + 1)
        if head[12:16] == b"VP8X" and head[_WEBP_FLAGS] & _WEBP_ANIMATION:
            self.rawmode = self._mode = "RGBA"


class Jpeg2000Reader(Jpeg2KImageFile):
    """Reads a JPEG 2000. Raises UnknownKindError for colours of more than 8 bits, whose brightest values Pillow makes
    black."""

    def _open(self) -> None:
        super()._open()
        if self.mode.startswith("I;16") or self.fp is None:
            return
        place = self.fp.tell()
        self.fp.seek(0)
        bits = _bits_of_jpeg_2000(self.fp.read(_JPEG_2000_HEAD))
        self.fp.seek(place)
        if bits > 8:
            raise UnknownKindError(
                f"a JPEG 2000 of {bits} bits, {len(self.getbands())} channels cannot be shown right; store it with "
                "8 bits a channel"
            )


def _bits_of_jpeg_2000(head: bytes) -> int:
    """Returns the greatest depth of a channel in bits, by ISO 15444-1, A.5.1 and I.5.3; 0 where the beginning of the
    file does not hold it."""
    if head.startswith(_CODESTREAM):
        channels = int.from_bytes(head[40:42], "big")
        depths = head[42 : 42 + 3 * channels : 3]
    else:
        at = head.find(b"ihdr") + 4
        depths = head[at + 10 : at + 11] if at >= 4 else b""
        if depths == b"\xff" and (at := head.find(b"bpcc") + 4) >= 4:
            depths = head[at : at + int.from_bytes(head[at - 8 : at - 4], "big") - 8]
    return max(((depth & 127) + 1 for depth in depths), default=0)


def open_picture(file: BinaryIO) -> ImageFile.ImageFile:
    """Opens an image of FORMATS by its first bytes; nothing is decoded. file: open at its beginning.

    Raises UnknownKindError and whatever Pillow's parsers raise.
    """
    head = file.read(16)
    file.seek(0)
    if head.startswith(b"MM\x00\x2b"):
        raise UnknownKindError("a BigTIFF of the byte order MM cannot be read; store it as TIFF, or in the order II")
    if head.startswith(tuple(TIFF_PREFIXES)):
        return TiffReader(file)
    if head.startswith(PNG_SIGNATURE):
        if head[12:16] == b"CgBI":
            raise UnknownKindError("a PNG in Apple's own form (CgBI), as in packages of apps; store it as PNG")
        return PngReader(file)
    if head.startswith((_CODESTREAM, _JP2)):
        return Jpeg2000Reader(file)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return WebpReader(file)
    if is_heif(head):
        return _heif(file)
    return Image.open(file, formats=FORMATS)


def is_heif(head: bytes) -> bool:
    """Tells whether the first bytes of a file, 12 or more, are those of HEIC, the format of phone photographs."""
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


def _heif(file: BinaryIO) -> ImageFile.ImageFile:
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise UnknownKindError(
            "a HEIC picture; on all nodes: pip install 'mmray[heif]', or store it as JPEG"
        ) from error
    image: ImageFile.ImageFile = HeifImageFile(file)
    return image
