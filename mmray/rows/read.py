"""Reads the rows of a piece, each with its place in the source; a row that cannot be read carries its error instead."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mmray.errors import RowError, UserError
from mmray.rows.files import Chunk, Piece
from mmray.rows.forms import NAMES, Form
from mmray.rows.huggingface import SavedRows
from mmray.rows.records import READ_BYTES, records
from mmray.rows.streams import RowStream
from mmray.rows.tables import TableRows, row_values
from mmray.rows.webdataset import read_rows
from mmray.storage import file_system

MAX_OPEN_FILES = 64
"""The most tables, and the most streams, that a reader keeps open."""


@dataclass(frozen=True)
class RawRow:
    """One row as written.

    source: its place, `file:line` (JSON lines, from 1) or `file:row` (other formats, from 0).
    dataset: the number of its data set in the split.
    value: the row, or the error that says why it cannot be read.
    notes: tolerated flaws to count (`webdataset`).
    """

    source: str
    dataset: int
    value: dict[str, Any] | RowError
    notes: tuple[str, ...] = ()


class RowReader:
    """Reads pieces, fastest in the order of their file. The last MAX_OPEN_FILES tables and streams stay open."""

    def __init__(self) -> None:
        self._table = lru_cache(maxsize=MAX_OPEN_FILES)(TableRows)
        self._saved = lru_cache(maxsize=MAX_OPEN_FILES)(SavedRows)
        self._streams: dict[str, RowStream] = {}

    def read(self, piece: Piece) -> Iterator[RawRow]:
        """Yields the rows of a piece in order. Blank lines of JSONL are no rows. Raises UserError for a damaged
        file."""
        if piece.format == "huggingface":
            return self._read_saved(piece)
        if piece.format == "webdataset":
            return _read_shard(piece)
        if piece.format in ("parquet", "arrow"):
            return self._read_table(piece)
        return self._read_text(piece)

    def _read_table(self, piece: Piece) -> Iterator[RawRow]:
        table = self._table(piece.uri, piece.format, piece.reading.columns)
        for row, value in enumerate(table.values(piece.first_row, piece.num_rows), start=piece.first_row):
            yield RawRow(f"{piece.uri}:{row}", piece.dataset, value)

    def _read_saved(self, piece: Piece) -> Iterator[RawRow]:
        row = piece.first_row
        for table in self._saved(piece.uri).batches(row, row + piece.num_rows):
            for value in row_values(table):
                yield RawRow(f"{piece.uri}:{row}", piece.dataset, value)
                row += 1

    def _read_text(self, piece: Piece) -> Iterator[RawRow]:
        form, reading = piece.reading.form or Form(piece.format), piece.reading
        data = self._streamed(piece, form) if not form.is_plain else _bytes_of(piece)
        first = piece.first_row + (piece.format == "jsonl")
        for number, value in records(data, piece.format, reading.header):
            if number < piece.num_rows:
                yield RawRow(f"{piece.uri}:{first + number}", piece.dataset, _named(value, piece))

    def _streamed(self, piece: Piece, form: Form) -> bytes:
        """Reads the text of a piece of a file that cannot be entered everywhere, from where the last piece ended, or
        from the piece's entry where that is nearer."""
        stream = self._streams.pop(piece.uri, None)
        try:
            if stream is None or not piece.entry.offset <= stream.offset <= piece.start:
                system, path = file_system(piece.uri)
                file = system.open(path, "rb", block_size=READ_BYTES)
                stream = RowStream(file, form.compression, form.encoding, piece.entry)
            stream.skip_to(piece.start)
            data = stream.read(piece.stop - piece.start)
        except OSError as error:
            raise UserError(f"{piece.uri}: cannot be read as {NAMES[piece.format]}: {error}") from error
        self._streams[piece.uri] = stream  # the last in the order of use
        if len(self._streams) > MAX_OPEN_FILES:
            del self._streams[next(iter(self._streams))]
        return data


def _bytes_of(piece: Piece) -> bytes:
    system, path = file_system(piece.uri)
    data: bytes = system.cat_file(path, start=piece.start, end=piece.stop)
    return data


def _named(value: dict[str, Any] | RowError, piece: Piece) -> dict[str, Any] | RowError:
    """Removes the empty cell that a row of CSV without an id has in its place."""
    row_id = piece.reading.shard.id
    if piece.format in ("csv", "tsv") and isinstance(value, dict) and value.get(row_id) == "":
        del value[row_id]
    return value


def read_piece(piece: Piece) -> Iterator[RawRow]:
    """Yields the rows of one piece, as `RowReader.read` does."""
    return RowReader().read(piece)


def chunk_rows(chunk: Chunk, reader: RowReader | None = None) -> Iterator[RawRow]:
    """Yields the rows of a chunk in order, as `RowReader.read` does."""
    reader = reader or RowReader()
    for piece in chunk.pieces:
        yield from reader.read(piece)


def _read_shard(piece: Piece) -> Iterator[RawRow]:
    system, path = file_system(piece.uri)
    refused = {row - piece.first_row for row in piece.refused}
    with system.open(path, "rb", block_size=READ_BYTES) as file:
        values = read_rows(file, piece.uri, piece.start, piece.stop, piece.reading.shard, refused)
        for row, (value, notes) in enumerate(values, start=piece.first_row):
            yield RawRow(f"{piece.uri}:{row}", piece.dataset, value, notes)
