"""Reads compressed and UTF-16 files as streams of UTF-8, forwards and in flat memory.

Offsets of rows are those of the decoded stream. A stream can be entered at its beginning, at each member of gzip
(bgzip) or frame of zstd (pzstd) where the file has several, and in UTF-16 everywhere. Such places are noted in the one
pass that finds rows, and a reader enters at the last one before its rows. A file of one member is read from its
beginning by each reader, once, at some 200 MB/s of text.

A truncated or damaged file raises OSError: the checksum at the end of each member is verified.
"""

import codecs
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import zstandard

Compression = Literal["", "gzip", "zstd"]
Encoding = Literal["utf-8", "utf-16-le", "utf-16-be"]

ENTRY_BYTES = 16 << 20
"""Bytes of the decoded stream between places at which it can be entered."""
_COMPRESSED_BYTES = 1 << 17
_DECODED_BYTES = 8 << 20
_MAX_WINDOW = 1 << 31


@dataclass(frozen=True)
class Entry:
    """A place where a stream can be entered.

    offset: the offset in the decoded stream.
    place: the byte of the file.
    """

    offset: int = 0
    place: int = 0


BEGINNING = Entry()


class RowStream:
    """The decoded bytes of a file from an entry on.

    offset: the offset of the next byte that `read` returns.
    entries: the entries that were passed.
    """

    def __init__(self, file: BinaryIO, compression: Compression, encoding: Encoding, entry: Entry = BEGINNING) -> None:
        self.offset = entry.offset
        self.entries = [entry]
        self._unread = b""
        self._blocks = _decoded(file, compression, encoding, entry.place)

    def read(self, size: int) -> bytes:
        """Reads up to `size` bytes, fewer only at the end. Raises OSError for a damaged file."""
        pieces, length = [self._unread], len(self._unread)
        try:
            while length < size and (entry := next(self._blocks, None)) is not None:
                block, place = entry
                if place is not None and self.offset + length >= self.entries[-1].offset + ENTRY_BYTES:
                    self.entries.append(Entry(self.offset + length, place))
                pieces.append(block)
                length += len(block)
        except (zlib.error, zstandard.ZstdError, EOFError, UnicodeDecodeError) as error:
            raise OSError(f"damaged behind byte {self.offset + length} of its text: {error}") from error
        data = b"".join(pieces)
        self._unread = data[size:]
        self.offset += min(size, length)
        return data[:size]

    def skip_to(self, offset: int) -> None:
        """Reads on to an offset that is not before the present one."""
        while self.offset < offset and self.read(min(_DECODED_BYTES, offset - self.offset)):
            pass


def _decoded(
    file: BinaryIO, compression: Compression, encoding: Encoding, place: int
) -> Iterator[tuple[bytes, int | None]]:
    """Yields pieces of the stream, each with the place of the file where it can be entered, or None."""
    file.seek(place)
    blocks = _decompressed(file, compression, place) if compression else _plain(file, place)
    return blocks if encoding == "utf-8" else _transcoded(blocks, encoding, place, enterable=not compression)


def _plain(file: BinaryIO, place: int) -> Iterator[tuple[bytes, int | None]]:
    while block := file.read(_DECODED_BYTES):
        yield block, place
        place += len(block)


def _decompressed(file: BinaryIO, compression: Compression, place: int) -> Iterator[tuple[bytes, int | None]]:
    data = b""
    while data := data or file.read(_COMPRESSED_BYTES):
        if compression == "gzip" and data[0] == 0:  # zeros pad an archive's end
            place, data = place + len(data) - len(data.lstrip(b"\0")), data.lstrip(b"\0")
            continue
        yield b"", place
        decoder = _decoder(compression)
        while not decoder.eof:
            block, remaining = decoder.decompress(data, _DECODED_BYTES), decoder.unconsumed_tail
            if decoder.eof:
                remaining = decoder.unused_data
            place, data = place + len(data) - len(remaining), remaining
            if block:
                yield block, None
            if not (data or block or decoder.eof):
                data = file.read(_COMPRESSED_BYTES)
                if not data:
                    raise EOFError("the end of the file is missing; copy it anew")


class _Zstd:
    """Decodes a frame of zstd with the interface of `zlib.decompressobj`."""

    def __init__(self) -> None:
        self._frame: Any = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()
        self.unconsumed_tail = b""
        self._growth = 8192.0  # of the last piece: a block of 4 bytes may become 128 KB

    @property
    def eof(self) -> bool:
        return bool(self._frame.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._frame.unused_data) + self.unconsumed_tail

    def decompress(self, data: bytes, max_bytes: int) -> bytes:
        """Decodes about max_bytes, as far as the last pieces predict it, because the decoder accepts no limit."""
        taken = max(64, int(max_bytes / max(1.0, 4 * self._growth)))
        piece, self.unconsumed_tail = data[:taken], data[taken:]
        decoded = bytes(self._frame.decompress(piece)) if piece else b""
        if decoded:
            self._growth = max(len(decoded) / len(piece), self._growth / 4)
        return decoded


def _decoder(compression: Compression) -> Any:
    return zlib.decompressobj(16 + zlib.MAX_WBITS) if compression == "gzip" else _Zstd()


def _transcoded(
    blocks: Iterator[tuple[bytes, int | None]], encoding: Encoding, place: int, *, enterable: bool
) -> Iterator[tuple[bytes, int | None]]:
    """Converts UTF-16 to UTF-8, without its mark. Half a surrogate pair becomes bytes that are not UTF-8, for which
    its row is rejected."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    is_first = place == 0
    for block, at in blocks:
        is_whole = not decoder.getstate()[0]  # no character has begun in the block before
        text = decoder.decode(block)
        if is_first and text:
            text, is_first = text.removeprefix("\ufeff"), False
        yield text.encode("utf-8", "surrogatepass"), at if enterable and at and is_whole else None
    if decoder.getstate()[0]:
        raise EOFError("it ends inside a character; copy it anew")
