"""Counts or estimates the rows of files within a limit of time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

from mmray.rows.files import SourceFile, opened_rows
from mmray.rows.forms import Form
from mmray.rows.plan import Progress, no_progress
from mmray.rows.records import READ_BYTES, RecordScan
from mmray.rows.streams import RowStream
from mmray.rows.tables import num_table_rows
from mmray.rows.webdataset import index_shard


@dataclass(frozen=True)
class RowCount:
    """The number of rows of some files.

    is_exact: whether all rows were counted; otherwise the number is estimated by the rows a byte of those counted.
    """

    rows: int
    is_exact: bool

    def __str__(self) -> str:
        return f"{self.rows:,}" if self.is_exact else f"about {self.rows:,}"


def count_rows(files: Sequence[SourceFile], seconds: float, on_progress: Progress = no_progress) -> RowCount:
    """Counts the rows of the files of one data set, as preparing reads them.

    seconds: how long to count; the beginning of the first file is read in any case.
    on_progress: called with the numbers of files whose rows are counted and of all files.

    Raises UserError for a file that cannot be read.
    """
    deadline = time.monotonic() + seconds
    total, rows, looked_at = sum(file.size for file in files), 0, 0
    for number, file in enumerate(files):
        on_progress(number, len(files))
        own_rows, own_bytes = _count(file, deadline)
        rows, looked_at = rows + own_rows, looked_at + own_bytes
        if time.monotonic() > deadline:
            break
    on_progress(len(files), len(files))
    if looked_at == total:
        return RowCount(rows, True)
    return RowCount(round(rows * total / looked_at), False)


def _count(file: SourceFile, deadline: float) -> tuple[int, int]:
    """Returns the rows of a file that were counted, and the bytes that hold them (as `SourceFile.size` counts)."""
    if file.format == "huggingface":
        return file.size, file.size
    with opened_rows(file) as (opened, form):
        if form.format in ("parquet", "arrow"):
            return num_table_rows(opened, form.format), file.size
        if form.format == "webdataset":
            return len(index_shard(opened, file.size).starts) - 1, file.size
        if form == Form("jsonl"):
            return _count_lines(opened, deadline)
        return _count_records(opened, form, file.size, deadline)


def _count_lines(opened: BinaryIO, deadline: float) -> tuple[int, int]:
    """Returns the number of lines that are not blank, and the bytes up to the end of the last one."""
    rows, offset, partial_line = 0, 0, b""
    while block := opened.read(READ_BYTES):
        offset += len(block)
        *lines, partial_line = (partial_line + block).split(b"\n")
        rows += sum(map(bool, map(bytes.strip, lines)))
        if rows and time.monotonic() > deadline:
            return rows, offset - len(partial_line)
    return rows + bool(partial_line.strip()), offset


def _count_records(opened: BinaryIO, form: Form, size: int, deadline: float) -> tuple[int, int]:
    """Returns the rows of a text that is not JSON lines, and the bytes read for them. Blank lines count, and the last
    row may be cut."""
    read = opened.read if form.is_plain else RowStream(opened, form.compression, form.encoding).read
    scan, rows, last = RecordScan(read, form.format), 0, -1
    for starts in scan.blocks():
        rows, last = rows + len(starts), int(starts[-1]) if len(starts) else last
        if rows > 1 and time.monotonic() > deadline:
            return rows, min(opened.tell(), size)
    return rows - (last == scan.end), size
