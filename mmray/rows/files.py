"""Finds the files that a user names, and where their rows begin.

A *piece* is a range of rows of one file, a *chunk* the rows that one actor call encodes, a *window* the chunks that are
packed at once (`plan.py`). JSONL files are read through once here for their line breaks (about 1 GB/s), shards for
their headers; every later reader seeks to its bytes.
"""

import bisect
import functools
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from mmray.errors import UserError
from mmray.rows.forms import NAMES, Form, detected_form, format_by_name
from mmray.rows.huggingface import SavedRows, saved_version
from mmray.rows.listing import listed_files, warn_of_second_names
from mmray.rows.records import READ_BYTES, RecordScan, row_starts
from mmray.rows.settings import DatasetSettings
from mmray.rows.streams import BEGINNING, Entry, RowStream
from mmray.rows.tables import num_table_rows
from mmray.rows.taking import Drawn
from mmray.rows.webdataset import ALL_MEMBERS, ShardRules, index_shard
from mmray.storage import file_system, file_version

REFUSED_ENDINGS = (".tar.gz", ".tar.zst", ".tgz", ".bz2", ".xz", ".zip")


@dataclass(frozen=True)
class Reading:
    """Says how the rows of a file are read.

    form: what the file is; None before it was opened.
    columns: the columns of a table that are used; () for all.
    header: the names of columns of CSV and TSV.
    shard: the fields that the members of a shard become.
    """

    form: Form | None = None
    columns: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    shard: ShardRules = ALL_MEMBERS


UNOPENED = Reading()


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One row file.

    format: the format by its name or, with is_declared, by the job.
    size: the size in bytes; for a saved dataset, the number of rows.
    version: the modification time or etag, by which a replaced file is recognised.
    """

    dataset: int
    uri: str
    format: str
    size: int
    version: str
    reading: Reading = UNOPENED
    is_declared: bool = False


@dataclass(frozen=True, slots=True)
class DrawnPart:
    """The rows of a piece that are taken: those that are drawn, from number `start` to `stop` - 1 of all drawn ones."""

    drawn: Drawn
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        """True if every row of the piece is taken."""
        return self.drawn.is_unbroken

    @property
    def places(self) -> list[int]:
        """The places of these rows among those of the piece that are not blank, ascending; the first is 0."""
        positions = self.drawn.positions(self.start, self.stop)
        return (positions - positions[0]).tolist()


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [first_row, first_row + num_rows) of a file.

    start, stop: the bytes [start, stop) in which rows of text and shards start; for a compressed file, bytes of its
        text.
    entry: the place at which to enter the text of a compressed file.
    refused: the rows of a shard that are rejected, because their key stands in several places.
    drawn: the rows that are taken; None for all.
    copy: 0 for rows that are taken for the first time, else how often they were taken before.
    """

    dataset: int
    uri: str
    format: str
    first_row: int
    num_rows: int
    start: int = 0
    stop: int = 0
    reading: Reading = UNOPENED
    entry: Entry = BEGINNING
    refused: tuple[int, ...] = ()
    drawn: DrawnPart | None = None
    copy: int = 0

    @property
    def num_taken(self) -> int:
        """The number of rows that are taken, blank lines included where all are."""
        return self.drawn.stop - self.drawn.start if self.drawn else self.num_rows


@dataclass(frozen=True, slots=True)
class RowIndex:
    """The result of one pass over a file.

    starts: where each row starts, and the end, [rows + 1] integers.
    entries: the places at which a text can be entered that cannot be entered everywhere.
    refused: the rows of a shard that are rejected, because their key stands in several places.
    endings: the endings of a shard's members.
    blank: the numbers of blank lines, which count as rows here, ascending.
    """

    file: SourceFile
    format: str
    reading: Reading
    starts: Sequence[int] | np.ndarray
    entries: tuple[Entry, ...] = ()
    refused: tuple[int, ...] = ()
    endings: frozenset[str] = frozenset()
    blank: Sequence[int] = field(default=())

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1

    @property
    def num_filled(self) -> int:
        """The number of rows that are not blank."""
        return self.num_rows - len(self.blank)

    def row_of(self, filled: int) -> int:
        """Returns the number of the row that is number `filled` of those that are not blank."""
        blanks_before = bisect.bisect_right(range(len(self.blank)), filled, key=lambda n: self.blank[n] - n)
        return filled + blanks_before

    def piece(self, row: int, num_rows: int) -> Piece:
        """Returns the piece of rows [row, row + num_rows)."""
        start, stop = int(self.starts[row]), int(self.starts[row + num_rows])
        entry = BEGINNING
        if self.entries:
            entry = self.entries[bisect.bisect_right(self.entries, start, key=lambda entry: entry.offset) - 1]
        first, last = (bisect.bisect_left(self.refused, end) for end in (row, row + num_rows))
        return Piece(
            self.file.dataset, self.file.uri, self.format, row, num_rows, start, stop, self.reading, entry,
            self.refused[first:last],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chunk:
    """The rows of one call of the encoder.

    first_row: the position of its first row in the whole input.
    verify, duplicates: positions of rows, as for `Encoder.encode`.
    """

    window: int
    index: int
    first_row: int
    pieces: tuple[Piece, ...]
    verify: tuple[int, ...] = ()
    duplicates: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(piece.num_taken for piece in self.pieces)


def source_files(datasets: Sequence[DatasetSettings]) -> list[SourceFile]:
    """Lists the files of all data sets, in order. Raises UserError for a name that matches nothing."""
    files = []
    for number, dataset in enumerate(datasets):
        reading = _reading_of(dataset)
        if dataset.format == "huggingface":
            files += [_saved_dataset(number, dataset, folder) for folder in dataset.files]
            continue
        listed = [match for pattern in dataset.files for match in listed_files(pattern)]
        warn_of_second_names(listed)
        files += [_source_file(number, dataset, reading, *match) for match in listed]
    return files


def set_files(files: Sequence[SourceFile], num_sets: int) -> list[int]:
    """Counts the files of each data set."""
    counts = Counter(file.dataset for file in files)
    return [counts[number] for number in range(num_sets)]


def check_unchanged(files: Sequence[SourceFile], datasets: Sequence[DatasetSettings]) -> None:
    """Raises UserError when the files have changed since `source_files`: rows may come from old and new ones."""
    before, now = (dict.fromkeys(listing) for listing in (files, source_files(datasets)))
    changed = [file.uri for file in files if file not in now] or [file.uri for file in now if file not in before]
    if changed:
        raise UserError(
            f"{changed[0]} has changed while it was being prepared"
            f"{f', and {len(changed) - 1} other files' if len(changed) > 1 else ''}; leave row files as they are, and "
            "prepare anew with --replace"
        )


def _source_file(
    number: int, dataset: DatasetSettings, reading: Reading, system: Any, path: str, info: Mapping[str, Any]
) -> SourceFile:
    uri = path if isinstance(system, LocalFileSystem) else system.unstrip_protocol(path)
    suffix = posixpath.splitext(path)[1].lower()
    if path.lower().endswith(REFUSED_ENDINGS):
        raise UserError(f"{uri}: {suffix} files cannot be read as rows; decompress it, or write rows with gzip or zstd")
    is_declared = dataset.format != "auto"
    format_ = dataset.format if is_declared else format_by_name(path)
    if (format_ == "webdataset") != (suffix == ".tar"):
        raise UserError(f"{uri}: a WebDataset shard ends with .tar and nothing else does; here format is {format_}")
    if dataset.members and format_ != "webdataset":
        raise UserError(f"{uri}: members are chosen of WebDataset shards, this is {NAMES[format_]}; leave members out")
    size, version = int(info["size"]), file_version(info)
    return SourceFile(number, uri, format_, size, version, reading, is_declared)


def _reading_of(dataset: DatasetSettings) -> Reading:
    """Describes how the files of a data set are read, before they are opened."""
    row_id, text, images = map(dataset.column, ("id", "text", "images"))
    return Reading(columns=dataset.used_columns, shard=ShardRules(row_id, text, images, dataset.members))


def _saved_dataset(number: int, dataset: DatasetSettings, folder: str) -> SourceFile:
    """Describes a folder of `Dataset.save_to_disk` as a row file, whose size is its number of rows."""
    reading = Reading(columns=dataset.used_columns)
    return SourceFile(number, folder, "huggingface", len(SavedRows(folder)), saved_version(folder), reading)


def first_piece(file: SourceFile, num_rows: int) -> Piece:
    """Returns the piece of the first num_rows rows of a file, blank lines included, without reading further."""
    index = index_rows(file, num_rows)
    return index.piece(0, index.num_rows)


@contextmanager
def opened_rows(file: SourceFile) -> Iterator[tuple[BinaryIO, Form]]:
    """Opens a row file; yields the file and its form.

    Raises UserError where the file is not of its format, or cannot be read.
    """
    form = Form(file.format)
    try:
        system, path = file_system(file.uri)
        with system.open(path, "rb", block_size=READ_BYTES) as opened:
            form = detected_form(opened, file.uri, file.format, is_declared=file.is_declared)
            if (form.format == "webdataset") != (file.format == "webdataset"):
                raise UserError(f"{file.uri}: is {NAMES[form.format]} by its first bytes; a shard must end with .tar")
            yield opened, form
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file.uri}: cannot be read as {NAMES[form.format]}: {error}") from error


def index_rows(file: SourceFile, max_rows: int | None = None) -> RowIndex:
    """Finds where the rows of a file start. max_rows: how many rows to find; None: all. Raises what `opened_rows`
    raises."""
    if file.format == "huggingface":
        return RowIndex(file, file.format, file.reading, _numbers(file.size, max_rows))
    with opened_rows(file) as (opened, form):
        reading = _opened(file.reading, form)
        if form.format in ("parquet", "arrow"):
            return RowIndex(
                file, form.format, reading, _numbers(num_table_rows(opened, form.format, reading.columns), max_rows)
            )
        if form.format == "webdataset":
            shard = index_shard(opened, file.size, max_rows)
            return RowIndex(file, form.format, reading, shard.starts, (), shard.refused, shard.endings)
        stream = None if form.is_plain else RowStream(opened, form.compression, form.encoding)
        scan = RecordScan((stream or opened).read, form.format)
        starts = row_starts(scan, max_rows)
        entries = tuple(stream.entries) if stream else ()
        reading = _opened(file.reading, form, scan.header)
        return RowIndex(file, form.format, reading, starts, entries, blank=scan.blank)


@functools.lru_cache(maxsize=1024)
def _opened(reading: Reading, form: Form, header: tuple[str, ...] = ()) -> Reading:
    """Completes how a file is read by what it is; one object for the many files of a set."""
    return replace(reading, form=form, header=header)


def _numbers(rows: int, max_rows: int | None) -> range:
    return range((rows if max_rows is None else min(rows, max_rows)) + 1)
