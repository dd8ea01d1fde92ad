"""Detects the format of a file of rows by its first bytes, and by its name where these do not tell.

Names can be wrong: Parquet is called `.jsonl`, a JSON array `.json`, an error page `.jsonl.gz`. Tables, archives and
compressed files begin with characteristic bytes, and UTF-16 with its mark. Text is JSON lines, a JSON array (which
begins with `[{`) or, by its name alone, CSV or TSV.
"""

import posixpath
import re
from dataclasses import dataclass
from typing import BinaryIO

from mmray.errors import UserError
from mmray.rows.streams import Compression, Encoding, RowStream

HEAD_BYTES = 4096
COMPRESSED_ENDINGS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
ENDINGS = {
    ".parquet": "parquet", ".pq": "parquet",
    ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow",
    ".csv": "csv", ".tsv": "tsv", ".tab": "tsv",
    ".tar": "webdataset",
}  # fmt: skip
NAMES = {
    "jsonl": "JSON lines", "json": "a JSON array", "csv": "CSV", "tsv": "TSV", "parquet": "Parquet", "arrow": "Arrow",
    "webdataset": "a WebDataset shard", "huggingface": "a saved dataset",
}  # fmt: skip
_BINARY = {"parquet", "arrow", "webdataset"}
_REFUSED = {
    b"BZh": "compressed with bzip2; write it with gzip or zstd, or decompress it",
    b"\xfd7zXZ\0": "compressed with xz; write it with gzip or zstd, or decompress it",
    b"PK\x03\x04": "a ZIP archive; unpack it",
    b"\x04\x22\x4d\x18": "compressed with LZ4; write it with gzip or zstd, or decompress it",
    b"\xff\x06\0\0sNaPpY": "compressed with Snappy; write it with gzip or zstd, or decompress it",
    b"x\x9c": "compressed with zlib; write it with gzip or zstd, or decompress it",
    b"x\xda": "compressed with zlib; write it with gzip or zstd, or decompress it",
    b"\x1f\x8b": "compressed twice; decompress it once",
    b"\x28\xb5\x2f\xfd": "compressed twice; decompress it once",
    b"%PDF-": "a PDF; mmray from-pdf writes rows for its pages",
    b"\x89PNG": "a picture; name a file of rows that names the picture",
    b"\xff\xd8\xff": "a picture; name a file of rows that names the picture",
    b"FEA1": "a Feather file of version 1; write it as Feather of version 2 or Parquet",
    b"SQLite format 3": "an SQLite database; write its table as Parquet or JSON lines",
    b"Obj\x01": "an Avro file; write it as Parquet or JSON lines",
    b"\x89HDF": "an HDF5 file; write it as Parquet",
    b"\x93NUMPY": "a NumPy array; write rows as JSON lines or Parquet",
    b"\x80\x04\x95": "a Python pickle; write rows as JSON lines or Parquet",
    b"\x80\x05\x95": "a Python pickle; write rows as JSON lines or Parquet",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; get it with git lfs pull",
    b"\xff\xfe\0\0": "UTF-32; save it as UTF-8",
    b"\0\0\xfe\xff": "UTF-32; save it as UTF-8",
}
_UTF16: dict[bytes, Encoding] = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
_ROW_LIST = re.compile(r"\[\s*(\{|\]\s*\Z)")
_UNMARKED_UTF16 = re.compile(rb"[\t\n\r\x20-\x7e]\0[\t\n\r\x20-\x7e]\0|\0[\t\n\r\x20-\x7e]\0[\t\n\r\x20-\x7e]")
_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)
_LINK = re.compile(rb"(\.\.?/)+[^\s\0]+")
"""Matches a path and nothing else, which git writes for a link where links are not allowed."""


@dataclass(frozen=True)
class Form:
    """The format of a file of rows.

    format: a key of NAMES.
    compression: the compression around the text; "" for none.
    encoding: the encoding of the text.
    """

    format: str
    compression: Compression = ""
    encoding: Encoding = "utf-8"

    @property
    def is_plain(self) -> bool:
        """True if bytes of the file are bytes of its rows, so that reading can start anywhere."""
        return not self.compression and self.encoding == "utf-8"


def format_by_name(path: str) -> str:
    """Returns the format of a file by its ending, ignoring that of a compression."""
    stem, ending = posixpath.splitext(path.lower())
    if ending in COMPRESSED_ENDINGS:
        ending = posixpath.splitext(stem)[1]
    return ENDINGS.get(ending, "jsonl")


def detected_form(opened: BinaryIO, uri: str, expected: str, *, is_declared: bool) -> Form:
    """Detects the form of an opened file, which is left at its beginning.

    expected: the format by name or, with is_declared, by the job.

    Raises UserError for a file that holds no rows, and for one that is not of the format that the job declares.
    """
    head = _head(opened)
    if not head and uri.lower().endswith(tuple(COMPRESSED_ENDINGS)):
        raise UserError(f"{uri}: cannot be read as gzip or zstd: it has no bytes; copy it anew")
    compression: Compression = ""
    if head.startswith(b"\x1f\x8b"):
        compression = "gzip"
    elif head.startswith(b"\x28\xb5\x2f\xfd") or re.match(rb"[\x50-\x5f]\x2a\x4d\x18", head):
        compression = "zstd"
    if compression:
        head = RowStream(opened, compression, "utf-8").read(HEAD_BYTES)
        opened.seek(0)
    for mark, what in _REFUSED.items():
        if head.startswith(mark):
            raise UserError(f"{uri}: is {what}")
    if _UNMARKED_UTF16.match(head):
        raise UserError(f"{uri}: is UTF-16 without its mark; save it as UTF-8")
    if _PAGE.match(head):
        raise UserError(f"{uri}: is a web page or XML, no rows; was it downloaded without an error?")
    if len(head) < HEAD_BYTES and _LINK.fullmatch(head):
        raise UserError(
            f"{uri}: holds only the path {head.decode(errors='replace')!r}: a link that was copied as text; copy the "
            "file it led to, or the link as a link"
        )
    binary_format = _binary_format(head)
    if compression and (binary_format or expected in _BINARY):
        raise UserError(f"{uri}: {NAMES[binary_format or expected]}, compressed as a whole; decompress it")
    if binary_format and is_declared and binary_format != expected:
        raise UserError(
            f"{uri}: is {NAMES[binary_format]} by its first bytes, and format is {expected}; leave format out"
        )
    if binary_format:
        return Form(binary_format)
    encoding: Encoding = _UTF16.get(head[:2], "utf-8")
    return Form(_text_format(head, expected, encoding, is_declared), compression, encoding)


def _head(opened: BinaryIO) -> bytes:
    head = b""
    while len(head) < HEAD_BYTES and (block := opened.read(HEAD_BYTES - len(head))):
        head += block
    opened.seek(0)
    return head


def _binary_format(head: bytes) -> str:
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1\0\0", b"\xff\xff\xff\xff")):
        return "arrow"
    return "webdataset" if head[257:262] == b"ustar" else ""


def _text_format(head: bytes, expected: str, encoding: Encoding, is_declared: bool) -> str:
    if is_declared and expected != "jsonl":
        return expected
    text = head.decode(encoding, "replace").lstrip("\ufeff \t\r\n")
    if _ROW_LIST.match(text):
        return "json"
    return "jsonl" if text.startswith("{") else expected
