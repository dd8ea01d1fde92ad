"""Rows of a piece, each with its place in the source; a row that cannot be read carries its error instead."""

from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class RawRow:
    """One row as written. source: `file:line` (JSON lines, from 1) or `file:row` (other formats, from 0); notes: what
    is to be counted of it (`webdataset`)."""

    source: str
    dataset: int
    value: dict[str, Any] | RowError
    notes: tuple[str, ...] = ()


class RowReader:
    """Reads pieces, cheapest in the order of their file. Keeps the last table and the last stream open."""

    def __init__(self) -> None:
        self._table: TableRows | None = None
        self._saved: SavedRows | None = None
        self._stream: tuple[str, RowStream, Any] | None = None

    def read(self, piece: Piece) -> Iterator[RawRow]:
        """The rows of a piece in order. Blank lines of JSONL are no rows. Raises UserError for a damaged file."""
        if piece.format == "huggingface":
            return self._read_saved(piece)
        if piece.format == "webdataset":
            return _read_shard(piece)
        if piece.format in ("parquet", "arrow"):
            return self._read_table(piece)
        return self._read_text(piece)

    def _read_table(self, piece: Piece) -> Iterator[RawRow]:
        columns = piece.reading.columns
        if self._table is None or (self._table.uri, self._table.columns) != (piece.uri, columns):
            self._table = TableRows(piece.uri, piece.format, columns)
        for row, value in enumerate(self._table.values(piece.first_row, piece.num_rows), start=piece.first_row):
            yield RawRow(f"{piece.uri}:{row}", piece.dataset, value)

    def _read_saved(self, piece: Piece) -> Iterator[RawRow]:
        if self._saved is None or self._saved.folder != piece.uri:
            self._saved = SavedRows(piece.uri)
        row = piece.first_row
        for table in self._saved.batches(row, row + piece.num_rows):
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
        """The text of a piece of a file that cannot be entered everywhere: from where the last piece ended, or from
        its entry where that is nearer."""
        entry = piece.entry
        try:
            kept = self._stream
            if kept is None or kept[0] != piece.uri or not entry.offset <= kept[1].offset <= piece.start:
                if kept is not None:
                    kept[2].close()
                system, path = file_system(piece.uri)
                file = system.open(path, "rb", block_size=READ_BYTES)
                kept = piece.uri, RowStream(file, form.compression, form.encoding, entry), file
                self._stream = kept
            kept[1].skip_to(piece.start)
            return kept[1].read(piece.stop - piece.start)
        except OSError as error:
            self._stream = None
            raise UserError(f"{piece.uri}: cannot be read as {NAMES[piece.format]}: {error}") from error


def _bytes_of(piece: Piece) -> bytes:
    system, path = file_system(piece.uri)
    data: bytes = system.cat_file(path, start=piece.start, end=piece.stop)
    return data


def _named(value: dict[str, Any] | RowError, piece: Piece) -> dict[str, Any] | RowError:
    """A row of CSV without an id has an empty cell there."""
    row_id = piece.reading.shard.id
    if piece.format in ("csv", "tsv") and isinstance(value, dict) and value.get(row_id) == "":
        del value[row_id]
    return value


def read_piece(piece: Piece) -> Iterator[RawRow]:
    """The rows of one piece, as `RowReader.read`."""
    return RowReader().read(piece)


def chunk_rows(chunk: Chunk, reader: RowReader | None = None) -> Iterator[RawRow]:
    """The rows of a chunk in order, as `RowReader.read`."""
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
