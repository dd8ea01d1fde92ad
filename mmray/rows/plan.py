"""Plans a prepare: deals the rows that are taken of all files into windows and chunks.

The plan is a pure function of the files and the settings, so the same input gives the same windows whatever the number
of actors. It is computed window by window: the place of any window is known from the numbers of rows alone
(`dealing.py`). So a plan holds some hundred bytes for each file and nothing for each window; where the rows of text
begin, 8 bytes a row, lies in memory up to 64 MB and else in a temporary file (TMPDIR).
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from mmray.base.ahead import in_order
from mmray.errors import UserError
from mmray.rows.dealing import DEALING, first_rows, lanes_of
from mmray.rows.files import Chunk, DrawnPart, Piece, RowIndex, SourceFile, index_rows
from mmray.rows.taking import Drawn, Taking, shares_of
from mmray.rows.webdataset import is_member

STARTS_IN_MEMORY = 64 << 20
"""Bytes of the starts of rows that are held in memory."""
_SET_PIECE_ROWS = 512

Progress = Callable[[int, int], None]
"""Takes how much is done, and how much there is."""


def no_progress(done: int, total: int) -> None:
    """Shows no progress."""


class _Starts:
    """Keeps the starts of rows of many files; each file's are read like a list."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(STARTS_IN_MEMORY, prefix="mmray-starts-")  # noqa: SIM115 (lives on)
        self._count = 0

    def keep(self, starts: np.ndarray) -> "_FileStarts":
        self._file.seek(8 * self._count)
        self._file.write(np.ascontiguousarray(starts, dtype="<i8").tobytes())
        self._count += len(starts)
        return _FileStarts(self, self._count - len(starts), len(starts))

    def read(self, number: int) -> int:
        self._file.seek(8 * number)
        return int.from_bytes(self._file.read(8), "little")


class _FileStarts(Sequence[int]):
    """The starts of the rows of one file."""

    __slots__ = ("_first", "_size", "_starts")

    def __init__(self, starts: _Starts, first: int, size: int) -> None:
        self._starts, self._first, self._size = starts, first, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, row: int) -> int:  # type: ignore[override]  # no slices
        if not 0 <= row < self._size:
            raise IndexError(row)
        return self._starts.read(self._first + row)


def indexed_files(files: Sequence[SourceFile], on_progress: Progress = no_progress) -> list[RowIndex]:
    """Finds the rows of all files; line breaks are found by threads.

    on_progress: called with the numbers of files whose rows are found and of all files.

    Raises UserError for a file that cannot be read, and for a pattern of `members` that chooses nothing.
    """
    starts, indexed = _Starts(), list[RowIndex]()
    for index in in_order(index_rows, files, threads=4, ahead=16):
        if isinstance(index.starts, np.ndarray):
            index = replace(index, starts=starts.keep(index.starts))
        indexed.append(index)
        on_progress(len(indexed), len(files))
    _check_members(indexed)
    return indexed


def rows_of_sets(indexed: Sequence[RowIndex], num_sets: int) -> list[int]:
    """Counts the rows of each data set, without blank lines."""
    counts = Counter[int]()
    for index in indexed:
        counts[index.file.dataset] += index.num_filled
    return [counts[number] for number in range(num_sets)]


def limited_rows(indexed: Sequence[RowIndex], takings: Sequence[Taking], limit: int) -> list[int]:
    """Deals a number of rows out to files: each set gets its share, at least one row, and in it each file its share.

    takings: how the rows of each set are taken. Returns the rows of each file; their sum is `limit`, or all rows where
    there are fewer. Raises UserError where sets with rows are more than `limit`.
    """
    before, parts = _rows_before(indexed), list[int]()
    for index, first in zip(indexed, before.tolist(), strict=True):
        (drawn,) = takings[index.file.dataset].passes or (Drawn(0, 0),)
        parts.append(drawn.before(first + index.num_filled) - drawn.before(first))
    if (filled := sum(taking.taken > 0 for taking in takings)) > limit:
        raise UserError(f"--limit {limit}: there are {filled} sets, and each gets a row; give at least {filled}")
    rows = [0] * len(parts)
    for dataset, share in enumerate(shares_of(limit, [taking.taken for taking in takings], least=1)):
        files = [number for number, index in enumerate(indexed) if index.file.dataset == dataset]
        for file, count in zip(files, shares_of(share, [parts[file] for file in files]), strict=True):
            rows[file] = count
    return rows


def first_taken(indexed: Sequence[RowIndex], takings: Sequence[Taking], num_sets: int) -> list[int]:
    """Counts the rows of each data set that are taken at least once; where all are, blank lines count.

    takings: as for `Plan`.
    """
    if takings:
        return [taking.distinct for taking in takings]
    counts = Counter[int]()
    for index in indexed:
        counts[index.file.dataset] += index.num_rows
    return [counts[number] for number in range(num_sets)]


@dataclass(frozen=True)
class _Lane:
    """The stretches of one lane (`dealing.py`), in order: a stretch is what one pass takes of one file.

    files: the number of the file of each stretch; copies: the number of its pass; ends: the rows of the lane up to its
    end, int64 [stretches].
    """

    files: np.ndarray
    copies: np.ndarray
    ends: np.ndarray

    @property
    def rows(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0


class Plan:
    """The windows of a prepare."""

    def __init__(
        self, indexed: Sequence[RowIndex], takings: Sequence[Taking] = (), *, window_rows: int, chunk_rows: int,
        dealing: int = DEALING, most: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """Deals the rows.

        indexed: the rows of all files, of the data sets in order.
        takings: how often the rows of each set are taken; (): every row once, blank lines included.
        window_rows: the rows of a window, a multiple of chunk_rows.
        chunk_rows: the rows of a chunk. Only the last chunk of all may be shorter.
        dealing: the version of dealing. 2: every window holds every file's share (`dealing.py`); 1: the files come one
            after another.
        most: the most rows that a pass takes of each file, the first ones; None: all that `takings` says.
        """
        if window_rows % chunk_rows:
            raise ValueError(f"window_rows {window_rows} is no multiple of chunk_rows {chunk_rows}")
        self._indexed, self.window_rows, self.chunk_rows = indexed, window_rows, chunk_rows
        sets = [index.file.dataset for index in indexed]
        self._passes, self._most = [taking.passes for taking in takings], most
        self._before = _rows_before(indexed)
        taken_rows = [self._taken_of(file) for file in range(len(indexed))]
        lanes = lanes_of(taken_rows, sets, dealing)
        self._lanes = [self._lane(files) for files in lanes]
        self._lane_rows = [lane.rows for lane in self._lanes]
        self.num_rows = sum(self._lane_rows)
        """Number of rows of all windows."""
        self.num_windows = -(-self.num_rows // window_rows)

    def _parts(self, file: int) -> list[tuple[int, int, int]]:
        """Lists what the passes take of a file: (number of the pass, first taken row of the pass, stop)."""
        before, rows = int(self._before[file]), self._indexed[file].num_filled
        passes = self._passes[self._indexed[file].file.dataset]
        parts = [(number, drawn.before(before), drawn.before(before + rows)) for number, drawn in enumerate(passes)]
        if self._most is None:
            return parts
        return [(number, start, min(stop, start + self._most[file])) for number, start, stop in parts]

    def _taken_of(self, file: int) -> int:
        if not self._passes:
            return self._indexed[file].num_rows
        return sum(stop - start for _, start, stop in self._parts(file))

    def _lane(self, files: Sequence[int]) -> _Lane:
        """Puts the passes of each set one behind another, over the set's files in this lane."""
        stretches: list[tuple[int, int, int, int]] = []  # set, pass, file, rows
        for file in files:
            index = self._indexed[file]
            parts = self._parts(file) if self._passes else [(0, 0, index.num_rows)]
            stretches += [
                (index.file.dataset, number, file, stop - start) for number, start, stop in parts if stop > start
            ]
        stretches.sort()
        columns = np.asarray(stretches, dtype=np.int64).reshape(-1, 4).T
        return _Lane(columns[2].copy(), columns[1].copy(), columns[3].cumsum())

    @property
    def has_copies(self) -> bool:
        """True if rows are taken more than once."""
        return any(len(passes) > 1 for passes in self._passes)

    def rows_of_window(self, window: int) -> int:
        """Returns the number of rows of a window."""
        return min(self.window_rows, self.num_rows - window * self.window_rows)

    def window(self, window: int) -> list[Chunk]:
        """Returns the chunks of a window."""
        begin = window * self.window_rows
        ends = [begin, min(begin + self.window_rows, self.num_rows)]
        starts, stops = (first_rows(self._lane_rows, end) for end in ends)
        pieces = (
            piece
            for lane, start, stop in zip(self._lanes, starts, stops, strict=True)
            for piece in self._stretches(lane, start, stop)
        )
        return [
            Chunk(window, number, begin + number * self.chunk_rows, tuple(self._piece(*part) for part in parts))
            for number, parts in enumerate(_grouped(pieces, self.chunk_rows))
        ]

    def chunks(self, windows: Sequence[int] | None = None) -> Iterator[Chunk]:
        """Yields the chunks of some windows, or of all, in order."""
        for window in range(self.num_windows) if windows is None else windows:
            yield from self.window(window)

    def set_pieces(self, dataset: int) -> Iterator[Piece]:
        """Yields the pieces of one data set, lane by lane."""
        for lane in self._lanes:
            for file, copy, start, stop in self._stretches(lane, 0, lane.rows):
                if self._indexed[file].file.dataset == dataset:
                    for row in range(start, stop, _SET_PIECE_ROWS):
                        yield self._piece(file, copy, row, min(row + _SET_PIECE_ROWS, stop))

    def _stretches(self, lane: _Lane, row: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Yields stretches of the rows `row` to `stop` - 1 of a lane: (file, pass, first row taken, stop)."""
        while row < stop:
            place = int(np.searchsorted(lane.ends, row, side="right"))
            begin, end = int(lane.ends[place - 1]) if place else 0, int(lane.ends[place])
            yield int(lane.files[place]), int(lane.copies[place]), row - begin, min(stop, end) - begin
            row = min(stop, end)

    def _piece(self, file: int, copy: int, start: int, stop: int) -> Piece:
        """Returns the piece of the rows that a pass takes of a file, from number `start` of these to `stop` - 1."""
        index = self._indexed[file]
        if not self._passes:
            return index.piece(start, stop - start)
        drawn = self._passes[index.file.dataset][copy]
        before = int(self._before[file])
        first = drawn.before(before)
        return replace(_drawn_piece(index, before, drawn, first + start, first + stop), copy=copy)


def drawn_pieces(indexed: Sequence[RowIndex], dataset: int, drawn: Drawn) -> Iterator[Piece]:
    """Yields the pieces of drawn rows of a data set; blank lines do not count."""
    before = start = 0
    for index in indexed:
        if index.file.dataset == dataset:
            stop = drawn.before(before + index.num_filled)
            if stop > start:
                yield _drawn_piece(index, before, drawn, start, stop)
            before, start = before + index.num_filled, stop


def _drawn_piece(index: RowIndex, before: int, drawn: Drawn, start: int, stop: int) -> Piece:
    """Returns the piece of the drawn rows `start` to `stop` - 1 of a set, all of one file. before: the rows of the set
    before this file."""
    (first,), (last,) = drawn.positions(start, start + 1), drawn.positions(stop - 1, stop)
    row, end = index.row_of(int(first) - before), index.row_of(int(last) - before) + 1
    return replace(index.piece(row, end - row), drawn=DrawnPart(drawn, start, stop))


def plan_chunks(
    files: Sequence[SourceFile], *, window_rows: int, chunk_rows: int, dealing: int = DEALING
) -> list[Chunk]:
    """Lists the chunks of a plan in which each row is taken once. Arguments and errors: `Plan`, `indexed_files`."""
    plan = Plan(indexed_files(files), window_rows=window_rows, chunk_rows=chunk_rows, dealing=dealing)
    return list(plan.chunks())


def by_window(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Groups chunks, which are in order, by their window."""
    return (list(window) for _, window in groupby(chunks, key=lambda chunk: chunk.window))


def _rows_before(indexed: Sequence[RowIndex]) -> np.ndarray:
    """Counts the rows of each file's data set in the files before it, without blank lines, int64 [files]."""
    counts, before = Counter[int](), np.zeros(len(indexed), dtype=np.int64)
    for number, index in enumerate(indexed):
        before[number] = counts[index.file.dataset]
        counts[index.file.dataset] += index.num_filled
    return before


def _grouped(
    stretches: Iterator[tuple[int, int, int, int]], chunk_rows: int
) -> Iterator[list[tuple[int, int, int, int]]]:  # fmt: skip
    """Yields groups of parts of stretches with a total of chunk_rows rows each; the last group may have fewer."""
    group: list[tuple[int, int, int, int]] = []
    room = chunk_rows
    for file, copy, start, stop in stretches:
        row = start
        while row < stop:
            taken = min(room, stop - row)
            group.append((file, copy, row, row + taken))
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
