"""Opens an image by path, URI, bytes or open file, and explains what went wrong.

Rows come from people, so a row may open only a closed list of places: local paths, and URIs of `ALLOWED_SCHEMES`.
A row cannot make a cluster call a web server (`http`), read a file by another name (`file://`) or chain
file systems (`memory://a::file:///b`).
"""

import base64
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from mmray.base.words import one_line
from mmray.errors import RowError, UserError
from mmray.images.paged import file_of
from mmray.images.tar_member import PartOfFile
from mmray.storage import file_system, file_version

ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
"""A local path or a URI, possibly of a part of a .tar (`PartOfFile`) or of a page (`PageOfFile`), the encoded image, or
a binary file, which is read from its beginning."""

ALLOWED_SCHEMES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hdfs", "webhdfs", "hf", "memory"}
"""URI schemes that a row may name. Add the scheme of your storage if fsspec knows it."""

PASS_THROUGH_ERRORS = (ConnectionError, TimeoutError, MemoryError, UserError)
"""Errors while reading an image that say nothing about the image: they are raised instead of rejecting the row."""

REMOTE_BLOCK_BYTES = 1 << 20
"""Bytes fetched at a time from remote storage when an image is read whole: a page is most often one request."""

HEADER_BLOCK_BYTES = 1 << 17
"""Bytes fetched at a time when only a header is read: one request holds it with its EXIF (at most 64 KB)."""


def open_image(source: ImageSource, *, block_bytes: int = REMOTE_BLOCK_BYTES) -> BinaryIO:
    """Opens an image, or the file of a page, for reading its bytes. A file object is returned as it is and closed by
    its owner.

    block_bytes: the bytes fetched at a time where the image lies in remote storage.

    Raises RowError: `image_missing`, `image_unreadable` (no permission, a folder, an I/O error), `image_scheme` (a URI
    of a scheme outside ALLOWED_SCHEMES). Raises UserError where a URI's file system cannot be set up on this machine.
    PASS_THROUGH_ERRORS are raised as they are.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if isinstance(source, str | os.PathLike):
        is_uri = isinstance(source, str) and "://" in source
        try:
            place = file_of(os.fspath(source))
            if part := PartOfFile.written(place):
                return part.open_in(*locate_uri(part.file), block_bytes) if is_uri else part.open_local(block_bytes)
            return _open_uri(place, block_bytes) if is_uri else open(place, "rb")
        except PASS_THROUGH_ERRORS:
            raise
        except (OSError, ValueError) as error:
            raise _row_error(source, error) from error
    if not hasattr(source, "read"):
        raise TypeError(f"an image is a path, a URI, bytes or a binary file, not {type(source).__name__}")
    return source


@contextmanager
def image_file(source: ImageSource, *, block_bytes: int = REMOTE_BLOCK_BYTES) -> Iterator[BinaryIO]:
    """Opens an image as `open_image` does, and closes it at the end of the block unless the caller opened it."""
    file = open_image(source, block_bytes=block_bytes)
    try:
        yield file
    finally:
        if file is not source:
            file.close()


def source_state(source: ImageSource) -> tuple[str, str] | None:
    """Returns the identity of an image's file: its absolute path or URI, and its size in bytes with its modification
    time or etag. No byte of the file is read.

    Returns None where the image lies in no file, where the file system knows neither time nor etag, and where the file
    does not exist: opening it reports why.
    """
    if not isinstance(source, str | os.PathLike):
        return None
    place = os.fspath(source)
    file = file_of(place)
    part = PartOfFile.written(file)
    file = part.file if part else file
    try:
        if "://" in place:
            system, path = locate_uri(file)
            info = system.info(path)
            num_bytes, version = info["size"], file_version(info)
        else:
            place = os.path.abspath(place)
            status = os.stat(file)
            num_bytes, version = status.st_size, str(status.st_mtime_ns)
    except PASS_THROUGH_ERRORS:
        raise
    except (OSError, ValueError, RowError):
        return None
    return (place, f"{num_bytes} {version}") if version else None


_DATA_URI = re.compile(r"data:(?P<kind>[^,]{0,200}),", re.IGNORECASE)
_BASE64_OF_PICTURES = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkq", "TU0AK", "AAAADGpQ", "Qk")
"""First letters of the base64 of JPEG, PNG, GIF, WEBP, TIFF, JPEG2000 and BMP."""
_LEAST_BASE64 = 64


def embedded_picture(text: str) -> bytes | None:
    """Decodes an image that is embedded in a text, as a data URI or as base64; returns None for a path or URI.

    Raises RowError `image_unreadable` for a data URI that is not base64, or broken.
    """
    if text[:5].lower() == "data:":
        head = _DATA_URI.match(text)
        if head is None or not head["kind"].lower().endswith(";base64"):
            raise RowError(
                "image_unreadable", f"image {text!r:.60}: a data URI without base64; write data:image/png;base64,…"
            )
        return base64_bytes(text[head.end() :])
    if len(text) < _LEAST_BASE64 or not text.startswith(_BASE64_OF_PICTURES):
        return None
    try:
        return base64_bytes(text)
    except RowError:
        return None


def base64_bytes(text: str) -> bytes:
    """Decodes base64 in either alphabet, with or without line breaks and padding.

    Raises RowError `image_unreadable` for a text that is not base64.
    """
    plain = "".join(text.split()).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except ValueError as error:
        message = f"image {text!r:.60}: no base64: {one_line(error)}; write its bytes anew"
        raise RowError("image_unreadable", message) from error


def describe_source(source: ImageSource) -> str:
    """Returns the image's name for error messages: one line of at most 200 characters."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"image of {memoryview(source).nbytes} bytes"
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
    else:
        name = str(getattr(source, "name", "image file"))
    text = repr(name)[1:-1]
    return text if len(text) <= 200 else f"{text[:90]}…{text[-109:]}"


def _open_uri(uri: str, block_bytes: int) -> BinaryIO:
    file_system, path = locate_uri(uri)
    return file_system.open(path, "rb", block_size=block_bytes)


def locate_uri(uri: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a URI, and the path in it. Raises what `open_image` raises."""
    scheme, _, path = uri.partition("://")
    scheme = scheme.lower()
    if scheme not in ALLOWED_SCHEMES or "::" in uri:
        allowed = ", ".join(sorted(ALLOWED_SCHEMES))
        raise RowError(
            "image_scheme",
            f"{describe_source(uri)}: images are local paths or of {allowed}; copy it to one of these",
        )
    try:
        return file_system(f"{scheme}://{path}")
    except (UserError, OSError) as error:
        message = f"{describe_source(uri)}: {one_line(error)}; set up {scheme}:// on every node"
        raise UserError(message) from error


def _row_error(source: ImageSource, error: OSError | ValueError) -> RowError:
    name = describe_source(source)
    match error:
        case FileNotFoundError() | NotADirectoryError():
            page = "; a page is named as in scan.pdf#page=3 or scan.pdf#page=3&dpi=200" if "#" in name else ""
            return RowError("image_missing", f"{name}: no such file; check the path and `image_root`{page}")
        case PermissionError():
            return RowError("image_unreadable", f"{name}: no permission to read it; grant it to this user")
        case IsADirectoryError():
            return RowError("image_unreadable", f"{name}: is a folder; name an image file")
        case _:
            return RowError("image_unreadable", f"{name}: {one_line(error)}; check that it can be read")
