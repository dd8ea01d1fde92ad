"""Rows of a piece, each with its place in the source; a row that cannot be read carries its error instead.

Parquet can be entered only at the start of a row group, and a row group may hold many chunks of rows. So a `RowReader`
goes on where its last piece ended: an actor that reads every second chunk of a file decodes the file once, not once for
each chunk, and holds a few rows at a time, never a row group.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmray.errors import RowError, UserError
from mmray.images.source import one_line
from mmray.rows.files import READ_BYTES, Chunk, Piece
from mmray.rows.huggingface import SavedRows
from mmray.rows.json_rows import parse_row
from mmray.rows.webdataset import read_rows
from mmray.storage import file_system

MOST_OPEN = 64
"""Tables that a reader keeps open: as many as are read side by side (`dealing.py`), and some that are done with."""
_BATCH_ROWS = 16
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class RawRow:
    """One row as written. source: `file:line` (JSONL, lines from 1) or `file:row` (other formats, rows from 0)."""

    source: str
    dataset: int
    value: dict[str, Any] | RowError


class RowReader:
    """Reads pieces, cheapest in the order of their file. Keeps the last MOST_OPEN tables open."""

    def __init__(self) -> None:
        self._parquet = lru_cache(maxsize=MOST_OPEN)(_ParquetRows)
        self._saved = lru_cache(maxsize=MOST_OPEN)(SavedRows)

    def read(self, piece: Piece) -> Iterator[RawRow]:
        """The rows of a piece in order. Blank lines of JSONL are no rows. Raises UserError for a damaged file."""
        if piece.format == "huggingface":
            return self._read_saved(piece)
        if piece.format == "webdataset":
            return _read_shard(piece)
        if piece.format != "parquet":
            return _read_jsonl(piece)
        return self._parquet(piece.uri).read(piece)

    def _read_saved(self, piece: Piece) -> Iterator[RawRow]:
        row = piece.first_row
        for table in self._saved(piece.uri).batches(row, row + piece.num_rows):
            for value in _values(table):
                yield RawRow(f"{piece.uri}:{row}", piece.dataset, value)
                row += 1


def read_piece(piece: Piece) -> Iterator[RawRow]:
    """The rows of one piece, as `RowReader.read`."""
    return RowReader().read(piece)


def chunk_rows(chunk: Chunk, reader: RowReader | None = None) -> Iterator[RawRow]:
    """The rows of a chunk in order, as `RowReader.read`."""
    reader = reader or RowReader()
    for piece in chunk.pieces:
        yield from reader.read(piece)


def _read_jsonl(piece: Piece) -> Iterator[RawRow]:
    system, path = file_system(piece.uri)
    lines = system.cat_file(path, start=piece.start, end=piece.stop).split(b"\n")
    for number, line in enumerate(lines[: piece.num_rows], start=piece.first_row + 1):
        if line.strip():
            yield RawRow(f"{piece.uri}:{number}", piece.dataset, parse_row(line))


def _read_shard(piece: Piece) -> Iterator[RawRow]:
    system, path = file_system(piece.uri)
    with system.open(path, "rb", block_size=READ_BYTES) as file:
        values = read_rows(file, piece.uri, piece.start, piece.stop, piece.fields)
        for row, value in enumerate(values, start=piece.first_row):
            yield RawRow(f"{piece.uri}:{row}", piece.dataset, value)


class _ParquetRows:
    """The rows of one Parquet file, read forwards; going back, or over a row group's end, starts at a row group."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        # Unbuffered, Arrow holds whole column chunks: all images of a row group.
        system, path = file_system(uri)
        file = system.open(path, "rb", cache_type="none")  # else each jump to another column fetches megabytes more
        self._file = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        metadata = self._file.metadata
        self._ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
        self._group = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._next_row = 0  # of the file, the first that _batches will give
        self._rest: pa.RecordBatch | None = None  # rows just before _next_row, decoded but not asked for yet

    def read(self, piece: Piece) -> Iterator[RawRow]:
        row, stop = piece.first_row, piece.first_row + piece.num_rows
        while row < stop:
            batch = self._rows_from(row, stop)
            for value in _values(batch):
                yield RawRow(f"{self.uri}:{row}", piece.dataset, value)
                row += 1

    def _rows_from(self, row: int, stop: int) -> pa.RecordBatch:
        """Rows from `row` on, at least one, none at or after `stop`."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        if group != self._group or row < self._next_row - (self._rest.num_rows if self._rest else 0):
            self._group, self._rest = group, None
            self._next_row = int(self._ends[group - 1]) if group else 0
            self._batches = self._file.iter_batches(_BATCH_ROWS, row_groups=[group])
        while row >= self._next_row:
            self._rest = self._next_batch()
            self._next_row += self._rest.num_rows
        assert self._rest is not None
        ahead = self._rest.slice(self._rest.num_rows - (self._next_row - row))
        self._rest = ahead.slice(stop - row)
        return ahead.slice(0, stop - row)

    def _next_batch(self) -> pa.RecordBatch:
        try:
            return next(self._batches)
        except (OSError, pa.ArrowException, StopIteration) as error:
            begin, end = (int(self._ends[self._group - 1]) if self._group else 0), int(self._ends[self._group])
            self._group = -1
            raise UserError(f"{self.uri}: rows {begin} to {end - 1} cannot be read: {error}") from error


def _values(table: pa.RecordBatch | pa.Table) -> list[dict[str, Any] | RowError]:
    """The rows as dictionaries; where one has a cell that Python cannot hold, its error."""
    try:
        return list(table.to_pylist())
    except (ValueError, OverflowError, NotImplementedError):
        return [_value(table.slice(row, 1)) for row in range(table.num_rows)]


def _value(row: pa.RecordBatch | pa.Table) -> dict[str, Any] | RowError:
    try:
        (value,) = row.to_pylist()
    except UnicodeDecodeError as error:
        return RowError("not_utf8", f"a text of the row is not UTF-8 ({error.reason}); write the file as UTF-8")
    except (ValueError, OverflowError, NotImplementedError) as error:
        return RowError("wrong_type", f"a cell of the row cannot be read: {one_line(error)}; write it as another type")
    return value
