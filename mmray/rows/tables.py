"""Reads rows of Parquet and Arrow files forwards, a few at a time, and only the columns that are used.

Parquet can be entered only at the start of a row group, and a row group may hold many chunks of rows; Arrow can be
entered at the start of a record batch, and its streams only at their beginning. So a reader continues where its last
piece ended: an actor that reads every second chunk of a file decodes the file once, and holds a few rows, never a row
group.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from mmray.base.words import one_line
from mmray.errors import RowError, UserError
from mmray.storage import file_system

BATCH_ROWS = 16
"""Rows decoded at a time; each of the tables that are read side by side (`dealing.py`) holds so many rows."""
_BUFFER_BYTES = 1 << 20
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_NO_CONTENT = {"id", "images", "image"}


def num_table_rows(opened: BinaryIO, format_: str, columns: Sequence[str] = ()) -> int:
    """Counts the rows of an opened Parquet or Arrow file.

    columns: the columns that are used; () for all.

    Raises OSError for a file that may lack rows, and where two columns that are used have one name.
    """
    if format_ == "parquet":
        file = pq.ParquetFile(opened)
        _check_names(file.schema_arrow.names, columns)
        return int(file.metadata.num_rows)
    rows = 0
    for batch in _arrow_batches(opened):
        _check_names(batch.schema.names, columns)
        rows += batch.num_rows
    return rows


def _check_names(names: Sequence[str], columns: Sequence[str]) -> None:
    """Raises OSError where two of the columns that are used have one name: a row can hold only one of them."""
    repeated = [name for name, count in Counter(names).items() if count > 1 and (name in columns or not columns)]
    if repeated:
        raise OSError(f"two columns have the name {repeated[0]!r}; rename or drop one")


def row_values(table: pa.RecordBatch | pa.Table) -> list[dict[str, Any] | RowError]:
    """Converts rows to dictionaries; a row with a cell that Python cannot hold becomes its error."""
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


class _Groups(Protocol):
    """A table in groups of rows, at any of which reading can start. ends: the row behind each group."""

    ends: np.ndarray

    def batches(self, group: int) -> Iterator[pa.RecordBatch]:
        """Yields the rows of a group, and possibly of those behind it."""


class TableRows:
    """Reads the rows of one file forwards; going back, or past a group's end, starts at a group."""

    def __init__(self, uri: str, format_: str, columns: Sequence[str]) -> None:
        """Opens the file. columns: the columns that are used; () for all."""
        self.uri, self.columns = uri, tuple(columns)
        self._groups: _Groups = (_ParquetGroups if format_ == "parquet" else _ArrowGroups)(uri, self.columns)
        self._group = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._next_row = 0  # the first row of the file that _batches will give
        self._pending: pa.RecordBatch | None = None  # rows just before _next_row, decoded but not asked for yet

    def values(self, first: int, num_rows: int) -> Iterator[dict[str, Any] | RowError]:
        """Yields rows [first, first + num_rows)."""
        row, stop = first, first + num_rows
        while row < stop:
            batch = self._rows_from(row, stop)
            yield from row_values(batch)
            row += batch.num_rows

    def _rows_from(self, row: int, stop: int) -> pa.RecordBatch:
        """Returns rows from `row` on: at least one, none at or after `stop`."""
        group = int(np.searchsorted(self._groups.ends, row, side="right"))
        if group != self._group or row < self._next_row - (self._pending.num_rows if self._pending else 0):
            self._group, self._pending = group, None
            self._next_row = int(self._groups.ends[group - 1]) if group else 0
            self._batches = self._groups.batches(group)
        while row >= self._next_row:
            self._pending = self._next_batch()
            self._next_row += self._pending.num_rows
        assert self._pending is not None
        ahead = self._pending.slice(self._pending.num_rows - (self._next_row - row))
        taken = min(stop - row, BATCH_ROWS)
        self._pending = ahead.slice(taken)
        return ahead.slice(0, taken)

    def _next_batch(self) -> pa.RecordBatch:
        try:
            return next(self._batches)
        except (OSError, pa.ArrowException, StopIteration) as error:
            ends = self._groups.ends
            begin, end = (int(ends[self._group - 1]) if self._group else 0), int(ends[self._group])
            self._group = -1
            raise UserError(f"{self.uri}: rows {begin} to {end - 1} cannot be read: {one_line(error)}") from error


class _ParquetGroups:
    """Reads the row groups of a Parquet file."""

    def __init__(self, uri: str, columns: Sequence[str]) -> None:
        # Unbuffered, Arrow holds whole column chunks: all images of a row group.
        system, path = file_system(uri)
        file = system.open(path, "rb", cache_type="none")  # else each jump to another column fetches megabytes more
        self._file = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        metadata = self._file.metadata
        self.ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
        self._columns = used_columns(self._file.schema_arrow.names, columns)

    def batches(self, group: int) -> Iterator[pa.RecordBatch]:
        return iter(self._file.iter_batches(BATCH_ROWS, row_groups=[group], columns=self._columns))


class _ArrowGroups:
    """Reads the record batches of an Arrow file as one group; batches that are skipped are not decoded."""

    def __init__(self, uri: str, columns: Sequence[str]) -> None:
        self._uri = uri
        with _opened(uri) as file:
            *_, rows = accumulate((batch.num_rows for batch in _arrow_batches(file)), initial=0)
        self.ends = np.asarray([rows])
        self._columns = columns

    def batches(self, group: int) -> Iterator[pa.RecordBatch]:
        with _opened(self._uri) as file:
            for batch in _arrow_batches(file):
                names = used_columns(batch.schema.names, self._columns)
                yield batch.select(names) if names is not None else batch


def _opened(uri: str) -> Any:
    system, path = file_system(uri)
    return pa.memory_map(path) if isinstance(system, LocalFileSystem) else system.open(path, "rb")


def _arrow_batches(file: Any) -> Iterator[pa.RecordBatch]:
    """Yields the batches of Arrow's file format or of its stream format, which `datasets` writes.

    Raises OSError for a stream that may lack batches: one without its end mark may have been cut between two batches,
    and of several streams in one file Arrow reads the first.
    """
    head = file.read(6)
    file.seek(0)
    if head == b"ARROW1":
        reader = pa.ipc.open_file(file)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        return
    yield from pa.ipc.open_stream(file)
    end = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - len(_STREAM_END)))
    if head.startswith(_STREAM_END[:4]) and file.read(len(_STREAM_END)) != _STREAM_END:
        raise OSError("the mark of the stream's end is missing, so something may be cut off; write it anew")
    if end < size:
        raise OSError(f"the stream ends at byte {end} of {size}, as where streams were joined; write it as one stream")


def used_columns(names: Sequence[str], columns: Sequence[str]) -> list[str] | None:
    """Returns the columns to read; None for all, where no used column has content, so that the error can name the
    columns."""
    used = [name for name in names if name in columns]
    return used if set(used) - _NO_CONTENT else None
