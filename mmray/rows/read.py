"""Reads the rows of a piece, each with its place in the source; a row that cannot be read carries its error instead."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    copy: 0 for the first time that the row is taken, else how often it was taken before.
    """

    source: str
    dataset: int
    value: dict[str, Any] | RowError
    notes: tuple[str, ...] = ()
    copy: int = 0


class RowReader:
    """Reads pieces, fastest in the order of their file. The last MAX_OPEN_FILES tables and streams stay open."""

    def __init__(self) -> None:
        self._table = lru_cache(maxsize=MAX_OPEN_FILES)(TableRows)
        self._saved = lru_cache(maxsize=MAX_OPEN_FILES)(SavedRows)
        self._streams: dict[str, RowStream] = {}

    def read(self, piece: Piece) -> Iterator[RawRow]:
        """Yields the rows of a piece that are taken, in order. Blank lines of JSONL are no rows. Raises UserError for
        a damaged file."""
        if piece.format == "huggingface":
            rows = self._read_saved(piece)
        elif piece.format == "webdataset":
            rows = _read_shard(piece)
        elif piece.format in ("parquet", "arrow"):
            rows = self._read_table(piece)
        else:
            rows = self._read_text(piece)
        return (replace(row, copy=piece.copy) for row in rows) if piece.copy else rows

    def _read_table(self, piece: Piece) -> Iterator[RawRow]:
        table = self._table(piece.uri, piece.format, piece.reading.columns)
        for first, count in _stretches(piece):
            for row, value in enumerate(table.values(first, count), start=first):
                yield RawRow(f"{piece.uri}:{row}", piece.dataset, value)

    def _read_saved(self, piece: Piece) -> Iterator[RawRow]:
        saved = self._saved(piece.uri, piece.reading.columns)
        for row, count in _stretches(piece):
            for table in saved.batches(row, row + count):
                for value in row_values(table):
                    yield RawRow(f"{piece.uri}:{row}", piece.dataset, value)
                    row += 1

    def _read_text(self, piece: Piece) -> Iterator[RawRow]:
        form, reading = piece.reading.form or Form(piece.format), piece.reading
        data = self._streamed(piece, form) if not form.is_plain else _bytes_of(piece)
        first = piece.first_row + (piece.format == "jsonl")
        for number, value in records(data, piece.format, reading.header, _chosen(piece)):
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


def _chosen(piece: Piece) -> set[int] | None:
    """Returns the places of the rows of a piece that are taken; None for all."""
    return None if piece.drawn is None or piece.drawn.is_whole else set(piece.drawn.places)


def _stretches(piece: Piece) -> Iterator[tuple[int, int]]:
    """Yields (first row, number of rows) of the stretches of a table's piece that are taken."""
    chosen = _chosen(piece)
    if chosen is None:
        yield piece.first_row, piece.num_rows
    else:
        yield from ((piece.first_row + place, 1) for place in sorted(chosen))


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
        chosen = _chosen(piece)
        for row, (value, notes) in enumerate(values, start=piece.first_row):
            if chosen is None or row - piece.first_row in chosen:
                yield RawRow(f"{piece.uri}:{row}", piece.dataset, value, notes)
