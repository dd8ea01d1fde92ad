"""Finds rows that share an id with an earlier row, over all files of a split.

Ids are compared by 16 bytes of their hash: the chance that two different ids among a billion share a hash is below 1 in
10^20. The result depends only on the rows and their order. Ids are compared as they are written: `A1` and `a1` differ.
A row without an id is identified by its place.
"""

import hashlib
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from mmray.rows.files import Chunk, Piece
from mmray.rows.ids import has_id, id_text
from mmray.rows.plan import Plan
from mmray.rows.read import RawRow, RowReader, chunk_rows
from mmray.rows.settings import DatasetSettings
from mmray.storage import explained

HASH_BYTES = 16
PARTITION_IDS = 1 << 20
"""Number of ids held in memory at a time, which take 24 MB."""
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("position", "<i8")])


def id_of(row: RawRow, dataset: DatasetSettings) -> str:
    """Returns the id of a row, good or bad, or its place where it has none."""
    id_value = row.value.get(dataset.column("id")) if isinstance(row.value, dict) else None
    text = id_text(id_value) if has_id(id_value) else None
    return row.source if text is None else text


def id_hashes(ids: Iterable[str]) -> bytes:
    """Hashes ids to HASH_BYTES each, joined in order."""
    return b"".join(
        hashlib.blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest() for row_id in ids
    )


def chunk_id_hashes(chunk: Chunk, datasets: Sequence[DatasetSettings], reader: RowReader | None = None) -> bytes:
    """Hashes the ids of the rows of a chunk (`id_hashes`); a row that is taken again counts as a row without an id.

    Raises UserError where the rows cannot be read.
    """
    with explained(chunk.pieces[0].uri):
        rows = chunk_rows(chunk, reader)
        return id_hashes(
            copy_id(row.source, row.copy) if row.copy else id_of(row, datasets[row.dataset]) for row in rows
        )


def copy_id(source: str, copy: int) -> str:
    """Returns a text by which a row that is taken again is no duplicate of any other. source: its place."""
    return f"\0{copy}\0{source}"


class DuplicateIds:
    """Finds the positions whose id also stands at an earlier position, among any number of ids, in flat memory.

    Ids are divided by their hash into partitions, with their positions at 24 bytes each, which are written to temporary
    files (TMPDIR) once there are many. Each partition is then searched alone. Up to a million ids take no disk.
    """

    def __init__(self, expected: int) -> None:
        """Chooses the number of partitions. expected: the approximate number of ids."""
        self._bits = min(10, max(0, (expected // PARTITION_IDS).bit_length()))
        self._count = 0
        self._waiting: list[np.ndarray] = []
        self._waiting_ids = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def add(self, hashes: bytes) -> None:
        """Adds the hashes (`id_hashes`) of the next positions."""
        records = np.empty(len(hashes) // HASH_BYTES, dtype=_RECORD)
        records["high"], records["low"] = np.frombuffer(hashes, dtype="<u8").reshape(-1, 2).T
        records["position"] = np.arange(self._count, self._count + len(records))
        self._count += len(records)
        self._waiting.append(records)
        self._waiting_ids += len(records)
        if self._waiting_ids >= PARTITION_IDS and self._bits:
            self._store()

    def later(self) -> Iterator[np.ndarray]:
        """Yields the positions of later ids, int64, ascending within each array. Nothing may be added afterwards."""
        if self._folder is None:
            yield _later_ones(self._taken())
            return
        self._store()
        with self._folder as folder:
            for path in sorted(Path(folder).iterdir()):
                yield _later_ones(np.fromfile(path, dtype=_RECORD))

    def _taken(self) -> np.ndarray:
        records = np.concatenate([np.empty(0, dtype=_RECORD), *self._waiting])
        self._waiting, self._waiting_ids = [], 0
        return records

    def _store(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="mmray-ids-")
        records = self._taken()
        partitions = (records["high"] >> np.uint64(64 - self._bits)).astype(np.int64)
        records = records[np.argsort(partitions, kind="stable")]
        ends = np.cumsum(np.bincount(partitions, minlength=1 << self._bits))
        for number, part in enumerate(np.split(records, ends[:-1])):
            with (Path(self._folder.name) / f"{number:04d}").open("ab") as file:
                file.write(part.tobytes())


def _later_ones(records: np.ndarray) -> np.ndarray:
    """Returns the positions, ascending, of records whose id an earlier record has. records: _RECORD, by position."""
    order = np.lexsort((records["low"], records["high"]))  # stable: of equal ids the earliest comes first
    sorted_records = records[order]
    same = (sorted_records["high"][1:] == sorted_records["high"][:-1]) & (
        sorted_records["low"][1:] == sorted_records["low"][:-1]
    )
    return np.sort(sorted_records["position"][1:][same])


class DuplicateRows:
    """Knows the rows of a plan that have the id of an earlier row, and what is taken of these rows again."""

    def __init__(self, plan: Plan, hashes: Iterable[bytes]) -> None:
        """Finds them. hashes: `chunk_id_hashes` of each chunk of the plan, in order."""
        ids, starts = DuplicateIds(plan.num_rows), array("q", [0])
        for chunk_hashes in hashes:
            ids.add(chunk_hashes)
            starts.append(starts[-1] + len(chunk_hashes) // HASH_BYTES)
        self._starts = np.frombuffer(starts, dtype=np.int64)
        self._later = np.sort(np.concatenate(list(ids.later())))
        self._chunks_a_window = plan.window_rows // plan.chunk_rows
        # Positions in their data sets of the rows found, by which further copies of them are known.
        self._positions: dict[int, np.ndarray] = {}
        if plan.has_copies:
            self._positions = self._found_positions(plan)

    def _found_positions(self, plan: Plan) -> dict[int, np.ndarray]:
        positions: dict[int, list[np.ndarray]] = {}
        numbers = np.unique(np.searchsorted(self._starts, self._later, side="right") - 1).tolist()
        for window, group in groupby(numbers, key=lambda number: number // self._chunks_a_window):
            chunks = plan.window(window)
            for number in group:
                chunk = chunks[number % self._chunks_a_window]
                rows = np.asarray(self._of_first_copies(chunk), dtype=np.int64)
                for start, piece in _with_starts(chunk):
                    inside = rows[(rows >= start) & (rows < start + piece.num_taken)] - start
                    positions.setdefault(piece.dataset, []).append(_positions(piece)[inside])
        return {dataset: np.concatenate(parts) for dataset, parts in positions.items()}

    def in_chunk(self, chunk: Chunk) -> tuple[int, ...]:
        """Returns the positions in a chunk of such rows."""
        rows = self._of_first_copies(chunk)
        for start, piece in _with_starts(chunk):
            if piece.copy and piece.dataset in self._positions:
                again = np.isin(_positions(piece), self._positions[piece.dataset])
                rows += (np.flatnonzero(again) + start).tolist()
        return tuple(sorted(rows))

    def _of_first_copies(self, chunk: Chunk) -> list[int]:
        number = chunk.window * self._chunks_a_window + chunk.index
        start, stop = self._starts[number], self._starts[number + 1]
        first, last = np.searchsorted(self._later, [start, stop])
        return (self._later[first:last] - start).tolist()


def _with_starts(chunk: Chunk) -> Iterator[tuple[int, Piece]]:
    """Yields the pieces of a chunk, each with the position in the chunk of its first row."""
    start = 0
    for piece in chunk.pieces:
        yield start, piece
        start += piece.num_taken


def _positions(piece: Piece) -> np.ndarray:
    """Returns the positions in its data set of the rows of a piece, int64 [rows]."""
    assert piece.drawn is not None
    return piece.drawn.drawn.positions(piece.drawn.start, piece.drawn.stop)
