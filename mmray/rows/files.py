"""Plans a prepare: from the files that a user names to windows and chunks of rows.

A *piece* is a range of rows of one file, a *chunk* the rows that one actor call encodes, a *window* the chunks that are
packed at once. The plan is a pure function of the files, so the same input gives the same windows whatever the number
of actors. JSONL files are read through once here for their line breaks (about 1 GB/s), shards for their headers; every
later reader seeks to its bytes.
"""

import bisect
import itertools
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from mmray.base.ahead import in_order
from mmray.errors import UserError
from mmray.rows.dealing import DEALING, dealt, lanes_of
from mmray.rows.forms import NAMES, Form, detected_form, format_by_name
from mmray.rows.huggingface import SavedRows, saved_version
from mmray.rows.listing import listed_files
from mmray.rows.records import READ_BYTES, RecordScan, row_starts
from mmray.rows.settings import DatasetSettings
from mmray.rows.streams import BEGINNING, Entry, RowStream
from mmray.rows.tables import num_table_rows
from mmray.rows.webdataset import ALL_MEMBERS, ShardRules, index_shard, is_member
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Piece:
    """Rows [first_row, first_row + num_rows) of a file.

    start, stop: the bytes [start, stop) in which rows of text and shards start; for a compressed file, bytes of its
        text.
    entry: the place at which to enter the text of a compressed file.
    refused: the rows of a shard that are rejected, because their key stands in several places.
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


@dataclass(frozen=True)
class RowIndex:
    """The result of one pass over a file.

    starts: where each row starts, and the end, int64 [rows + 1].
    entries: the places at which a text can be entered that cannot be entered everywhere.
    refused: the rows of a shard that are rejected, because their key stands in several places.
    endings: the endings of a shard's members.
    """

    file: SourceFile
    format: str
    reading: Reading
    starts: np.ndarray
    entries: tuple[Entry, ...] = ()
    refused: tuple[int, ...] = ()
    endings: frozenset[str] = frozenset()

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1

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


@dataclass(frozen=True)
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
        return sum(piece.num_rows for piece in self.pieces)


def source_files(datasets: Sequence[DatasetSettings]) -> list[SourceFile]:
    """Lists the files of all data sets, in order. Raises UserError for a name that matches nothing."""
    files = []
    for number, dataset in enumerate(datasets):
        for pattern in dataset.files:
            if dataset.format == "huggingface":
                files.append(_saved_dataset(number, pattern))
                continue
            files += [_source_file(number, dataset, *match) for match in listed_files(pattern)]
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


def _source_file(number: int, dataset: DatasetSettings, system: Any, path: str, info: Mapping[str, Any]) -> SourceFile:
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
    row_id, text, images = map(dataset.column, ("id", "text", "images"))
    shard = ShardRules(row_id, text, images, dataset.members)
    reading = Reading(columns=dataset.used_columns, shard=shard)
    return SourceFile(number, uri, format_, int(info["size"]), file_version(info), reading, is_declared)


def _saved_dataset(number: int, folder: str) -> SourceFile:
    """Describes a folder of `Dataset.save_to_disk` as a row file, whose size is its number of rows."""
    return SourceFile(number, folder, "huggingface", len(SavedRows(folder)), saved_version(folder))


def plan_chunks(
    files: Sequence[SourceFile], *, window_rows: int, chunk_rows: int, dealing: int = DEALING
) -> list[Chunk]:
    """Deals all rows into chunks and windows. Only the last chunk may be shorter; line breaks are found by threads.

    window_rows: the rows of a window, a multiple of chunk_rows.
    chunk_rows: the rows of a chunk.
    dealing: the version of dealing. 2: every window holds every file's share (`dealing.py`); 1: the files come one
        after another.

    Raises UserError for a file that cannot be read, and for a pattern of `members` that chooses nothing.
    """
    if window_rows % chunk_rows:
        raise ValueError(f"window_rows {window_rows} is no multiple of chunk_rows {chunk_rows}")
    indexed = list(in_order(index_rows, files, threads=4, ahead=16))
    _check_members(indexed)
    per_window = window_rows // chunk_rows
    return [
        Chunk(number // per_window, number % per_window, number * chunk_rows, tuple(group))
        for number, group in enumerate(_chunk_pieces(_dealt_rows(indexed, window_rows, dealing), chunk_rows))
    ]


def _dealt_rows(indexed: Sequence[RowIndex], window_rows: int, dealing: int) -> Iterator[tuple[RowIndex, int, int]]:
    """Yields stretches of rows in the order in which windows take them: (file, first row, stop)."""
    lanes = lanes_of([index.num_rows for index in indexed], [index.file.dataset for index in indexed], dealing)
    ends = [np.cumsum([indexed[file].num_rows for file in lane]).tolist() for lane in lanes]
    done = [0] * len(lanes)
    for window in dealt([end[-1] for end in ends if end], window_rows):
        for lane, count in enumerate(window):
            stop = done[lane] + count
            while done[lane] < stop:
                place = bisect.bisect_right(ends[lane], done[lane])  # place in the lane of the next row's file
                index, end = indexed[lanes[lane][place]], min(stop, ends[lane][place])
                before = ends[lane][place] - index.num_rows
                yield index, done[lane] - before, end - before
                done[lane] = end


def by_window(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Groups chunks, which are in order, by their window."""
    return (list(window) for _, window in itertools.groupby(chunks, key=lambda chunk: chunk.window))


def _chunk_pieces(stretches: Iterable[tuple[RowIndex, int, int]], chunk_rows: int) -> Iterator[list[Piece]]:
    """Yields groups of pieces with a total of chunk_rows rows each; the last group may have fewer."""
    group: list[Piece] = []
    room = chunk_rows
    for index, row, stop in stretches:
        while row < stop:
            taken = min(room, stop - row)
            group.append(index.piece(row, taken))
            row, room = row + taken, room - taken
            if not room:
                yield group
                group, room = [], chunk_rows
    if group:
        yield group


def _check_members(indexed: Sequence[RowIndex]) -> None:
    """Raises UserError where a pattern of `members` chooses no member of a data set's shards."""
    endings: dict[tuple[int, tuple[str, ...]], frozenset[str]] = {}
    for index in indexed:
        if members := index.reading.shard.members:
            key = index.file.dataset, members
            endings[key] = endings.get(key, frozenset()) | index.endings
    for (number, members), shard_endings in endings.items():
        for pattern in members:
            if not any(is_member(ending, pattern) for ending in shard_endings):
                raise UserError(
                    f"members: {pattern!r} chooses no member of the shards of data set {number}; their endings are "
                    f"{', '.join(sorted(shard_endings)):.200}"
                )


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
        reading = replace(file.reading, form=form)
        if form.format in ("parquet", "arrow"):
            return RowIndex(file, form.format, reading, _numbers(num_table_rows(opened, form.format), max_rows))
        if form.format == "webdataset":
            shard = index_shard(opened, file.size, max_rows)
            return RowIndex(file, form.format, reading, shard.starts, (), shard.refused, shard.endings)
        stream = None if form.is_plain else RowStream(opened, form.compression, form.encoding)
        scan = RecordScan((stream or opened).read, form.format)
        starts = row_starts(scan, max_rows)
        entries = tuple(stream.entries) if stream else ()
        return RowIndex(file, form.format, replace(reading, header=scan.header), starts, entries)


def _numbers(rows: int, max_rows: int | None) -> np.ndarray:
    return np.arange((rows if max_rows is None else min(rows, max_rows)) + 1, dtype=np.int64)
