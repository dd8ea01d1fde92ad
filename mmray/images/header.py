"""Reads the size of an image as it is seen from its header alone.

Lengths of rows follow from sizes, so this runs over every image of a dataset and must neither decode (0.05
ms a page here, against 6 ms) nor be wrong: the size is the one after the EXIF orientation, the same that
`load_image` gives. Both take the orientation from `_orientation` below, so they agree by construction. The
usual `ImageOps.exif_transpose` cannot be used: it decodes first, and so does `getexif` of a PNG.

A file is opened once for size, orientation and checks. A remote file is read in one range, a PNG without EXIF in two;
only WebP and AVIF are read whole, because Pillow opens them so.

Headers are checked here: an image too large to decode safely is refused before a pixel is read.
"""

import io
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, BinaryIO, NamedTuple

from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.GifImagePlugin import GifImageFile

from mmray.base.words import counted, one_line
from mmray.errors import RowError
from mmray.images import jpeg
from mmray.images.contents import CONTENTS_BYTES, contents
from mmray.images.paged import MAX_PAGES, PageOfFile
from mmray.images.pdf import num_pages, pdf_size
from mmray.images.readers import TiffReader, UnknownKindError, open_picture
from mmray.images.source import (
    HEADER_BLOCK_BYTES,
    PASS_THROUGH_ERRORS,
    REMOTE_BLOCK_BYTES,
    ImageSource,
    describe_source,
    image_file,
)

MAX_PIXELS = 250_000_000
"""The most pixels of an image that is opened: a sheet of A0 at 400 dpi has 245 million."""

_ORIENTATION_TAG = 274
_INTEGER_KINDS = {1: "B", 3: "H", 4: "I"}
_SIGNED_KINDS = {6: "b", 8: "h", 9: "i"}
IMAGE_READING = 2
"""Version of size reading, raised when the size of some image is read differently. 2: orientations of signed
kinds count, and of bytes in TIFF."""
_BROKEN = -1
"""Stands for the orientation of EXIF that cannot be read."""
BROKEN_EXIF = "broken_exif"
"""The note on an image whose EXIF cannot be read or holds an unknown orientation: the image is used as stored."""
SEVERAL_FRAMES = "several_frames"
"""The note on a file of several pages or frames, of which only the first is used."""
_ONE_PICTURE = ("JPEG", "MPO", "HEIF")
"""Formats that hold one photograph, possibly in several views."""
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_PNG_TAIL_BYTES = HEADER_BLOCK_BYTES
"""Bytes at the end of a PNG that are searched for EXIF: one request. EXIF itself has at most 64 KB."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """The properties of an image that are known without decoding it."""

    width: int
    """Width in pixels, upright: after the EXIF orientation."""
    height: int
    """Height in pixels, upright."""
    format: str
    """One of FORMATS, "HEIF", "MPO" (a JPEG of several pictures), or "PDF"."""
    mode: str
    """Pillow's mode of the stored pixels, for example "RGB", "CMYK", "I;16"."""
    orientation: int
    """EXIF orientation of the stored pixels, 1 (upright) to 8; 1 where no valid orientation is stored."""
    num_frames: int | None
    """Number of pages or frames in the file, of which the first is used. None: unknown without reading on."""
    note: str = ""
    """The flaw that was tolerated: BROKEN_EXIF, or nothing."""

    @property
    def size(self) -> tuple[int, int]:
        """The size (width, height) in pixels, upright."""
        return self.width, self.height


class Measured(NamedTuple):
    """The properties of an image that preparing needs.

    size: (width, height) in pixels, upright.
    note: the flaw that was tolerated: BROKEN_EXIF, SEVERAL_FRAMES, or nothing.
    """

    size: tuple[int, int]
    note: str = ""


def measured(source: ImageSource, *, max_pixels: int = MAX_PIXELS, one_frame: bool = False) -> Measured:
    """Measures an image without decoding it. Raises what `read_header` raises.

    one_frame: whether to raise RowError `image_frames` for a file of several pages or frames where the source names no
        page.
    """
    page = page_of(source)
    if page and page.is_pdf:
        return Measured(pdf_size(page, max_pixels))
    with opened_image(source, max_pixels, block_bytes=HEADER_BLOCK_BYTES) as (image, header):
        if page is None and len(_frames(image, source, is_any_enough=True)) > 1:
            if not one_frame:
                return Measured(header.size, header.note or SEVERAL_FRAMES)
            message = f"{describe_source(source)}: has several pages or frames; split it, or set data.image_frames"
            raise RowError("image_frames", f"{message}: first, or all")
        return Measured(header.size, header.note)


def frames_of(source: ImageSource) -> list[int]:
    """Lists the pages or frames of an image by their numbers, from 1. Previews, masks and the further views of
    photographs do not count. Raises what `read_header` raises, except for size."""
    with image_file(source, block_bytes=HEADER_BLOCK_BYTES) as file:
        image, _ = _identify(file, source)
        return _frames(image, source)


def page_of(source: ImageSource) -> PageOfFile | None:
    """Returns the page that a path or URI names; None for any other source."""
    return PageOfFile.written(os.fspath(source)) if isinstance(source, str | os.PathLike) else None


def image_size(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Returns (width, height) in pixels as the image is seen, with the EXIF orientation applied.

    Raises what `read_header` raises.
    """
    return read_header(source, max_pixels=max_pixels).size


def read_header(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Reads an image's header; no pixel is decoded.

    Raises RowError: those of `open_image`; `image_unreadable` where the file is empty or no image of FORMATS;
    `image_too_large` above `max_pixels` pixels (width times height); `image_page` for a page that does not exist; for
    PDFs those of `pdf_size`.
    """
    page = page_of(source)
    if page and page.is_pdf:
        return ImageHeader(*pdf_size(page, max_pixels), "PDF", "RGB", 1, num_pages(page.file))
    with opened_image(source, max_pixels, block_bytes=HEADER_BLOCK_BYTES) as (_, header):
        return header


@contextmanager
def opened_image(
    source: ImageSource, max_pixels: int, *, block_bytes: int = REMOTE_BLOCK_BYTES
) -> Iterator[tuple[ImageFile.ImageFile, ImageHeader]]:
    """Opens an image without decoding it; yields the image and its header, valid inside the block.

    block_bytes: as in `open_image`. Raises what `read_header` raises.
    """
    with image_file(source, block_bytes=block_bytes) as file, _pillow_limit_lifted:
        is_decoded = block_bytes != HEADER_BLOCK_BYTES
        image, header = _identify(_held(file, source) if is_decoded else file, source)
        if page := page_of(source):
            header = _at_page(image, page, source, is_decoded)
        if min(header.size) < 1:
            raise RowError("image_unreadable", f"{describe_source(source)}: has no pixels; store it anew")
        num_pixels = header.width * header.height
        if num_pixels > max_pixels:
            size = f"{header.width} x {header.height} = {num_pixels} pixels, more than {max_pixels}"
            message = (
                f"{describe_source(source)}: {size}; scale it down or raise the limit (data.max_image_pixels in a job)"
            )
            raise RowError("image_too_large", message)
        yield image, header


def _held(file: BinaryIO, source: ImageSource) -> BinaryIO:
    """Returns the file to decode: a JPEG as a copy in memory, because its bytes are checked too
    (`mmray.images.jpeg`), any other file as it is."""
    try:
        file.seek(0)
        head = file.read(len(jpeg.SIGNATURE))
        tail = file.read() if head == jpeg.SIGNATURE else b""
        file.seek(0)
    except PASS_THROUGH_ERRORS:
        raise
    except OSError as error:
        raise RowError("image_unreadable", f"{describe_source(source)}: {one_line(error)}; store it anew") from error
    return io.BytesIO(head + tail) if tail else file


class _PillowLimitLifted:
    """Switches `Image.MAX_IMAGE_PIXELS` off inside a block, where max_pixels is the limit instead.

    Pillow's setting is global, so the first thread to enter saves it and the last one to leave restores it, unless
    someone else has set it meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._saved: int | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._saved, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0 and Image.MAX_IMAGE_PIXELS is None:
                Image.MAX_IMAGE_PIXELS = self._saved


_pillow_limit_lifted = _PillowLimitLifted()


def _identify(file: BinaryIO, source: ImageSource) -> tuple[ImageFile.ImageFile, ImageHeader]:
    try:
        image = open_picture(file)
        return image, _header_of(image, file)
    except PASS_THROUGH_ERRORS:
        raise
    except UnknownKindError as error:
        raise RowError("image_unreadable", f"{describe_source(source)}: {error}") from error
    except UnidentifiedImageError as error:
        file.seek(0)
        message = f"{describe_source(source)}: {contents(file.read(CONTENTS_BYTES))}"
        raise RowError("image_unreadable", message) from error
    except Exception as error:  # a parser of foreign bytes may raise anything
        message = f"{describe_source(source)}: {one_line(error)}; store the image anew"
        raise RowError("image_unreadable", message) from error


def _header_of(image: ImageFile.ImageFile, file: IO[bytes]) -> ImageHeader:
    width, height = image.size
    orientation, note = _orientation(image, file), ""
    if not 1 <= orientation <= 8:
        orientation, note = 1, BROKEN_EXIF if orientation else ""
    if orientation >= 5:
        width, height = height, width
    return ImageHeader(width, height, str(image.format), image.mode, orientation, _num_frames(image), note)


def _num_frames(image: ImageFile.ImageFile) -> int | None:
    if image.format == "GIF" or (isinstance(image, TiffReader) and image.is_animated):
        return None
    return getattr(image, "n_frames", 1)


def as_prepared(image: ImageFile.ImageFile, header: ImageHeader, size: tuple[int, int]) -> ImageHeader:
    """Adapts the header of an image that was prepared before orientations of signed kinds, and of bytes in TIFF,
    counted (IMAGE_READING 1).

    Such an image is used as it is stored, because it was measured so. Any other header is returned unchanged.
    size: the (width, height) in pixels with which the image was prepared.
    """
    if header.size == size or header.size[::-1] != size:
        return header
    if isinstance(image, TiffReader):
        is_new = isinstance(image.tag_v2.get(_ORIENTATION_TAG), bytes)
    else:
        exif = image.info.get("exif")
        is_new = isinstance(exif, bytes) and _exif_orientation(exif, _INTEGER_KINDS) == _BROKEN
    return replace(header, width=size[0], height=size[1], orientation=1) if is_new else header


def _frames(image: ImageFile.ImageFile, source: ImageSource, *, is_any_enough: bool = False) -> list[int]:
    """Lists the pages or frames of an opened image, which ends up at its first frame again.

    is_any_enough: whether to stop at the second one.
    """
    try:
        if isinstance(image, TiffReader):
            return _tiff_pages(image, is_any_enough)
        if image.format in _ONE_PICTURE:
            return [1]
        if is_any_enough and isinstance(image, GifImageFile):
            return [1, 2] if image.is_animated else [1]
        return list(range(1, min(getattr(image, "n_frames", 1), MAX_PAGES) + 1))
    except (*PASS_THROUGH_ERRORS, RowError):
        raise
    except UnknownKindError as error:
        raise RowError("image_unreadable", f"{describe_source(source)}: page {image.tell() + 1}: {error}") from error
    except Exception as error:  # a parser of foreign bytes may raise anything
        raise RowError("image_unreadable", f"{describe_source(source)}: {one_line(error)}; store it anew") from error


def _tiff_pages(image: TiffReader, is_any_enough: bool) -> list[int]:
    pages = [1]
    for number in range(2, MAX_PAGES + 1):
        try:
            image.seek(number - 1)
        except EOFError:
            break
        except UnknownKindError:
            if not is_any_enough:
                raise
            pages.append(number)
            break
        if not image.is_preview:
            pages.append(number)
            if is_any_enough:
                break
    image.seek(0)
    return pages


def _at_page(image: ImageFile.ImageFile, page: PageOfFile, source: ImageSource, is_decoded: bool) -> ImageHeader:
    """Turns an opened image to a page; returns the page's header. Frames of an animation share one size, so they are
    sought only where they will be decoded."""
    name = describe_source(source)
    is_cropped = isinstance(image, GifImageFile) and image.dispose_extent != (0, 0, *image.size)
    if page.page > 1 and is_cropped:
        raise RowError("image_unreadable", f"{name}: its first frame fills a part of the canvas alone; store it anew")
    try:
        num_frames = 1 if image.format in _ONE_PICTURE else getattr(image, "n_frames", 1)
        if not 1 <= page.page <= num_frames or image.fp is None:
            raise RowError("image_page", f"{name}: the file has {counted(num_frames, 'page')}; count from 1")
        if page.page > 1 and (is_decoded or isinstance(image, TiffReader)):
            image.seek(page.page - 1)
        return _header_of(image, image.fp)
    except (*PASS_THROUGH_ERRORS, RowError):
        raise
    except Exception as error:  # a parser of foreign bytes may raise anything
        raise RowError("image_unreadable", f"{name}: {one_line(error)}; store the image anew") from error


def _orientation(image: ImageFile.ImageFile, file: IO[bytes]) -> int:
    """Returns the EXIF orientation, else that of XMP, else 1, as `ImageOps.exif_transpose` finds it after decoding.

    Any number other than 1 to 8 means the same as 1; some cameras write 0, other numbers are broken. Two places are
    not searched: XMP behind the pixels of a PNG, and EXIF behind them that is followed by more than 128 KB.
    """
    if isinstance(image, TiffReader):
        tag = image.tag_v2.get(_ORIENTATION_TAG)
        tag = tag[0] if isinstance(tag, bytes) and len(tag) == 1 else tag
        orientation = tag if tag is None or isinstance(tag, int) else _BROKEN
    else:
        orientation = _exif_orientation(_exif_bytes(image, file))
    if orientation is None or orientation == _BROKEN:
        orientation = _xmp_orientation(image) or orientation or 1
    return orientation


def _exif_bytes(image: ImageFile.ImageFile, file: IO[bytes]) -> bytes:
    exif = image.info.get("exif")
    if isinstance(exif, bytes):
        return exif
    if image.format == "PNG":
        profile = image.info.get("Raw profile type exif")  # text: "exif", the length, hexadecimal digits
        if profile is None:
            return _png_exif(file)
        try:
            return bytes.fromhex("".join(str(profile).split()[2:]))
        except ValueError:
            return b"no hexadecimal digits"
    return b""


def _png_exif(file: IO[bytes]) -> bytes:
    """Returns the eXIf chunk behind the pixels of a PNG, which Pillow's header does not reach; empty where none is.

    The chunk is searched for at the file's end and recognised by its checksum. Walking from chunk to chunk would take
    thousands of steps and, in remote storage, read the whole file.
    """
    position = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(max(end - _PNG_TAIL_BYTES, position))
    tail = file.read()
    file.seek(position)
    at = tail.find(b"eXIf")
    while at >= 0:
        (length,) = struct.unpack(">I", tail[at - 4 : at].rjust(4, b"\xff"))
        stop = at + 4 + length
        if tail[stop : stop + 4] == struct.pack(">I", zlib.crc32(tail[at:stop])):
            return tail[at + 4 : stop]
        at = tail.find(b"eXIf", at + 1)
    return b""


def _exif_orientation(exif: bytes, kinds: Mapping[int, str] = _INTEGER_KINDS | _SIGNED_KINDS) -> int | None:
    """Reads the orientation from EXIF bytes, which are a TIFF header and directory (EXIF 2.32, 4.6.2).

    Returns None where they hold no orientation, and _BROKEN where they cannot be read. Never raises, because an image
    with a broken EXIF block can still be used.
    """
    if not exif:
        return None
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return _BROKEN
    (directory,) = struct.unpack_from(order + "I", exif, 4)
    if directory + 2 > len(exif):
        return _BROKEN
    (num_entries,) = struct.unpack_from(order + "H", exif, directory)
    first, stop = directory + 2, directory + 2 + 12 * num_entries
    is_broken = stop > len(exif)
    for at in range(first, min(stop, len(exif) - 11), 12):
        tag, kind, count = struct.unpack_from(order + "HHI", exif, at)
        if tag == _ORIENTATION_TAG and count == 1 and kind in kinds:
            (value,) = struct.unpack_from(order + kinds[kind], exif, at + 8)
            return int(value)
        is_broken |= tag == _ORIENTATION_TAG
    return _BROKEN if is_broken else None


def _xmp_orientation(image: ImageFile.ImageFile) -> int | None:
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    text = xmp.encode() if isinstance(xmp, str) else xmp
    match = _XMP_ORIENTATION.search(text) if isinstance(text, bytes) else None
    return int(match[1]) if match else None
