"""From the files a user names to windows and chunks of rows: the plan of a prepare.

A *piece* is a range of rows of one file, a *chunk* the rows one actor call encodes, a *window* the chunks that are
packed together. The plan is a pure function of the files, so the same input gives the same windows whatever the
number of actors. JSONL files are read through once here for their line breaks (about 1 GB/s), shards for their headers;
every later reader seeks to its bytes.
"""

import posixpath
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from mmray.errors import UserError
from mmray.images.source import one_line
from mmray.rows.dealing import DEALING, dealt, lanes_of
from mmray.rows.huggingface import SavedRows, saved_version
from mmray.rows.settings import DatasetSettings
from mmray.rows.webdataset import row_starts
from mmray.storage import file_system, file_version

READ_BYTES = 8 << 20
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
_FORMATS = {".parquet": "parquet", ".tar": "webdataset"}
_NAMES = {"jsonl": "JSON lines", "parquet": "Parquet", "webdataset": "a WebDataset shard"}
_WEBDATASET_FIELDS = ("id", "text", "images")


@dataclass(frozen=True)
class SourceFile:
    """One row file. version: modification time or etag; what tells a replaced file from the one prepared. fields: what
    its rows call `id`, `text` and `images`."""

    dataset: int
    uri: str
    format: str
    size: int
    version: str
    fields: tuple[str, str, str] = _WEBDATASET_FIELDS


@dataclass(frozen=True)
class Piece:
    """Rows [first_row, first_row + num_rows) of a file; they start in bytes [start, stop) but for Parquet. fields: as
    in `SourceFile`."""

    dataset: int
    uri: str
    format: str
    first_row: int
    num_rows: int
    start: int = 0
    stop: int = 0
    fields: tuple[str, str, str] = _WEBDATASET_FIELDS


@dataclass(frozen=True)
class Chunk:
    """One call of the encoder. first_row: position of its first row in the whole input; verify, duplicates: positions
    of rows, as for `Encoder.encode`."""

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
    """The files of all data sets, in order. Raises UserError for a name that matches nothing."""
    found = []
    for number, dataset in enumerate(datasets):
        for pattern in dataset.files:
            if dataset.format == "huggingface":
                found.append(_saved_dataset(number, pattern))
                continue
            found += [_source_file(number, dataset, *match) for match in _matches(pattern)]
    return found


def check_unchanged(files: Sequence[SourceFile], datasets: Sequence[DatasetSettings]) -> None:
    """Raise UserError when the files are no longer those that `source_files` found: rows may have been read of both."""
    before, now = (dict.fromkeys(each) for each in (files, source_files(datasets)))
    changed = [file.uri for file in files if file not in now] or [file.uri for file in now if file not in before]
    if changed:
        raise UserError(
            f"{changed[0]} has changed while it was being prepared"
            f"{f', and {len(changed) - 1} other files' if len(changed) > 1 else ''}; leave row files as they are, and "
            "prepare anew with --replace"
        )


def _matches(pattern: str) -> list[tuple[Any, str, Mapping[str, Any]]]:
    """The file system, path and state of each file, sorted by path."""
    try:
        system, path = file_system(pattern)
        # A file may have the marks of a glob in its own name. One listing tells all of many files.
        files = {path: system.info(path)} if system.isfile(path) else system.glob(path, detail=True)
    except (OSError, ValueError) as error:
        raise UserError(f"data files {pattern!r}: {one_line(error)}") from error
    found = [(system, str(path), info) for path, info in sorted(files.items()) if info["type"] == "file"]
    if not found:
        raise UserError(f"data files {pattern!r}: no such file. Paths are relative to the current folder.")
    return found


def _source_file(number: int, dataset: DatasetSettings, system: Any, path: str, info: Mapping[str, Any]) -> SourceFile:
    uri = path if isinstance(system, LocalFileSystem) else system.unstrip_protocol(path)
    suffix = posixpath.splitext(path)[1].lower()
    if suffix in _COMPRESSED:
        raise UserError(f"{uri}: compressed row files cannot be read from the middle; decompress it, or use Parquet")
    format_ = _FORMATS.get(suffix, "jsonl") if dataset.format == "auto" else dataset.format
    if (format_ == "webdataset") != (suffix == ".tar"):
        raise UserError(f"{uri}: a WebDataset shard ends with .tar and nothing else does; here format is {format_}")
    own_id, text, images = map(dataset.column, _WEBDATASET_FIELDS)
    return SourceFile(number, uri, format_, int(info["size"]), file_version(info), (own_id, text, images))


def _saved_dataset(number: int, folder: str) -> SourceFile:
    """A folder of `Dataset.save_to_disk`; its size is its number of rows."""
    return SourceFile(number, folder, "huggingface", len(SavedRows(folder)), saved_version(folder))


def plan_chunks(
    files: Sequence[SourceFile], *, window_rows: int, chunk_rows: int, dealing: int = DEALING
) -> list[Chunk]:
    """Deal all rows into chunks of chunk_rows and windows of window_rows (a multiple of chunk_rows).

    Every window has every file at its share (`dealing.py`); dealing 1: the files one after another. Only the last chunk
    may be shorter. Line breaks are looked up with a few threads.
    """
    if window_rows % chunk_rows:
        raise ValueError(f"window_rows {window_rows} is no multiple of chunk_rows {chunk_rows}")
    with ThreadPoolExecutor(4) as pool:
        starts = list(pool.map(_row_starts, files))
    per_window = window_rows // chunk_rows
    return [
        Chunk(number // per_window, number % per_window, number * chunk_rows, tuple(group))
        for number, group in enumerate(_chunk_pieces(_dealt_rows(files, starts, window_rows, dealing), chunk_rows))
    ]


def _dealt_rows(
    files: Sequence[SourceFile], starts: Sequence[np.ndarray], window_rows: int, dealing: int
) -> Iterator[tuple[SourceFile, np.ndarray, int, int]]:
    """Stretches of rows in the order in which windows take them: a file, its row starts, the first row and the stop."""
    rows = [len(each) - 1 for each in starts]
    lanes = lanes_of(rows, [file.dataset for file in files], dealing)
    ends = [np.cumsum([rows[file] for file in lane]).tolist() for lane in lanes]
    done = [0] * len(lanes)
    for window in dealt([end[-1] for end in ends if end], window_rows):
        for lane, count in enumerate(window):
            stop = done[lane] + count
            while done[lane] < stop:
                place = bisect_right(ends[lane], done[lane])  # the file of the lane that holds the next row
                file, end = lanes[lane][place], min(stop, ends[lane][place])
                before = ends[lane][place] - rows[file]
                yield files[file], starts[file], done[lane] - before, end - before
                done[lane] = end


def _chunk_pieces(
    stretches: Iterable[tuple[SourceFile, np.ndarray, int, int]], chunk_rows: int
) -> Iterator[list[Piece]]:
    """Pieces of exactly chunk_rows rows together (the last group may be shorter)."""
    group: list[Piece] = []
    room = chunk_rows
    for file, starts, row, total in stretches:
        while row < total:
            taken = min(room, total - row)
            span = int(starts[row]), int(starts[row + taken])
            group.append(Piece(file.dataset, file.uri, file.format, row, taken, *span, file.fields))
            row, room = row + taken, room - taken
            if not room:
                yield group
                group, room = [], chunk_rows
    if group:
        yield group


def first_piece(file: SourceFile, num_rows: int) -> Piece:
    """The first rows of a file, up to num_rows with blank lines among them; no more of it is read than holds them."""
    starts = _row_starts(file, num_rows)
    span = int(starts[0]), int(starts[-1])
    return Piece(file.dataset, file.uri, file.format, 0, len(starts) - 1, *span, file.fields)


@contextmanager
def opened_rows(file: SourceFile) -> Iterator[BinaryIO]:
    """A row file to read. Raises UserError where it is not what its format says, or cannot be read."""
    try:
        system, path = file_system(file.uri)
        with system.open(path, "rb", block_size=READ_BYTES) as opened:
            yield opened
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file.uri}: cannot be read as {_NAMES[file.format]}: {error}") from error


def _row_starts(file: SourceFile, most: int | None = None) -> np.ndarray:
    """Where each row starts, and the end: byte offsets, of tables row numbers. int64 [rows + 1]. most: of so many rows,
    the first; None: of all."""
    if file.format == "huggingface":
        return np.arange(file.size + 1, dtype=np.int64)[: most and most + 1]
    with opened_rows(file) as opened:
        if file.format == "parquet":
            return np.arange(pq.ParquetFile(opened).metadata.num_rows + 1, dtype=np.int64)[: most and most + 1]
        return row_starts(opened, file.size, most) if file.format == "webdataset" else _line_starts(opened, most)


def _line_starts(opened: BinaryIO, most: int | None) -> np.ndarray:
    breaks, found, offset = [np.zeros(1, dtype=np.int64)], 0, 0
    while (most is None or found < most) and (block := opened.read(READ_BYTES)):
        breaks.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + 1 + offset)
        found += len(breaks[-1])
        offset += len(block)
    starts = np.concatenate(breaks)
    if most is not None and found >= most:
        return starts[: most + 1]
    return starts if starts[-1] == offset else np.append(starts, offset)
