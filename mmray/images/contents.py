"""Recognises what a file is that is not an image, for the message that refuses it."""

import re

from mmray.images.readers import FORMATS

CONTENTS_BYTES = 4096
"""Bytes at a file's beginning that `contents` examines."""

_MAGICS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip data", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "unpack it"),
    (b"PK\x03\x04", "a ZIP archive or an office document", "unpack it, or store each page as a picture"),
    (b"\xd0\xcf\x11\xe0", "an office document", "store each page as a picture or as PDF"),
    (b"8BPS", "a Photoshop document", ""),
    (b"AT&TFORM", "a DjVu document", "store each page as a picture or as PDF"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL picture", ""),
    (b"\xff\x0a", "a JPEG XL picture", ""),
    (b"II\xbc\x01", "a JPEG XR picture", ""),
    (b"\x00\x00\x01\x00", "an icon", ""),
    (b"%!PS", "a PostScript document", "store it as PDF"),
    (b"\x93NUMPY", "a NumPy array", ""),
    (b"PAR1", "a Parquet file", "name the pictures in it"),
)
"""Entries of (first bytes, what the file is, remedy); an empty remedy means: store it as an image."""

_JPEG_LS = 0xF7
_PDF_PLACE = 1024
"""Bytes at a file's beginning within which the mark of a PDF stands (PDF 1.7, H.3.4.1)."""


def contents(head: bytes) -> str:
    """Describes a file by its first CONTENTS_BYTES, with a remedy; the text ends an error message."""
    what, remedy = _recognized(head)
    return f"{what}; {remedy or 'store it as one of ' + ', '.join(FORMATS)}"


def _recognized(head: bytes) -> tuple[str, str]:
    if not head:
        return "the file is empty", ""
    if not head.strip(b"\0"):
        return "the file begins with zeros, as one whose writing was interrupted", "copy it again"
    if b"%PDF-" in head[:_PDF_PLACE]:
        return "a PDF", "name a page of it by a path that ends with .pdf: scan.pdf#page=1"
    if head.startswith(b"\xff\xd8\xff"):
        return _jpeg(head), "store it as JPEG of 8 bits"
    for magic, what, remedy in _MAGICS:
        if head.startswith(magic):
            return what, remedy
    if head[4:8] == b"ftyp":
        return f"a film or a picture of the kind {head[8:12].decode('latin-1')!r}", ""
    return _text(head)


def _jpeg(head: bytes) -> str:
    """Describes a JPEG that is not decoded, by its frame header (ITU T.81, B.2.2)."""
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        marker, length = head[at + 1], int.from_bytes(head[at + 2 : at + 4], "big")
        if marker == _JPEG_LS:
            return "a JPEG-LS picture"
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height = head[at + 4], int.from_bytes(head[at + 5 : at + 7], "big")
            if bits != 8:
                return f"a JPEG of {bits} bits"
            return "a JPEG whose header does not say its height" if not height else "a JPEG of an unusual kind"
        at += 2 + length
    return "a JPEG whose header is damaged"


def _text(head: bytes) -> tuple[str, str]:
    text = head.decode("utf-8-sig", "ignore").lstrip().lower()
    if text.startswith("version https://git-lfs"):
        return "a pointer of Git LFS, not the file it stands for", "fetch the files: git lfs pull"
    if re.match(r"<!doctype html|<html|<head|<body", text):
        return "a web page (HTML), as servers send instead of a picture", "download the picture again"
    if "<svg" in text[:1024]:
        return "an SVG drawing", ""
    if text.startswith("<?xml"):
        return "XML, as stores send for errors", "download the picture again"
    if text.startswith(("data:", "ivborw0kggo", "/9j/")):
        return "a picture written as base64 text", "store its bytes, or write the text itself in the row"
    if text[:1] in "{[" and text:
        return "JSON text", "download the picture again"
    if _is_text(head):
        return f"text, which begins {text[:40]!r}", ""
    return "no image of a known format", ""


def _is_text(head: bytes) -> bool:
    printable = sum(byte >= 32 or byte in b"\t\n\r\f" for byte in head)
    return b"\0" not in head and printable > 0.97 * len(head)
