"""Rows that share an id with an earlier one, over all files of a split.

Ids are compared by 16 bytes of their hash: that two different ids of a billion share one is less likely than 1 in
10^20. The result depends on the rows and their order alone. Ids are compared as they are
written: `A1` and `a1` are two. A row without an id goes by its place.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmray.rows.files import Chunk
from mmray.rows.ids import has_id, id_text
from mmray.rows.read import RawRow, RowReader, chunk_rows
from mmray.rows.settings import DatasetSettings
from mmray.storage import explained

HASH_BYTES = 16
PARTITION_IDS = 1 << 20
"""Ids that are held at a time, 24 MB."""
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("position", "<i8")])


def id_of(row: RawRow, dataset: DatasetSettings) -> str:
    """The id by which a row goes, good or bad: its own, or its place."""
    id_value = row.value.get(dataset.column("id")) if isinstance(row.value, dict) else None
    text = id_text(id_value) if has_id(id_value) else None
    return row.source if text is None else text


def id_hashes(ids: Iterable[str]) -> bytes:
    """HASH_BYTES for each id, one after another."""
    return b"".join(
        hashlib.blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest() for row_id in ids
    )


def chunk_id_hashes(chunk: Chunk, datasets: Sequence[DatasetSettings], reader: RowReader | None = None) -> bytes:
    """`id_hashes` of the rows of a chunk. Raises UserError where they cannot be read."""
    with explained(chunk.pieces[0].uri):
        return id_hashes(id_of(row, datasets[row.dataset]) for row in chunk_rows(chunk, reader))


class DuplicateIds:
    """Finds the ids that stand at an earlier position too, among any number of them, in flat memory.

    Ids are dealt by their hash into partitions, 24 bytes each with their position, in files of the disk for what is
    temporary (TMPDIR) once they are many; each partition is then looked at alone. Up to a million ids take no disk.
    """

    def __init__(self, expected: int) -> None:
        """expected: about how many ids there will be; it decides how many partitions there are."""
        self._bits = min(10, max(0, (expected // PARTITION_IDS).bit_length()))
        self._count = 0
        self._waiting: list[np.ndarray] = []
        self._waiting_ids = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def add(self, hashes: bytes) -> None:
        """The hashes (`id_hashes`) of the next positions."""
        records = np.empty(len(hashes) // HASH_BYTES, dtype=_RECORD)
        records["high"], records["low"] = np.frombuffer(hashes, dtype="<u8").reshape(-1, 2).T
        records["position"] = np.arange(self._count, self._count + len(records))
        self._count += len(records)
        self._waiting.append(records)
        self._waiting_ids += len(records)
        if self._waiting_ids >= PARTITION_IDS and self._bits:
            self._store()

    def later(self) -> Iterator[np.ndarray]:
        """The positions, ascending in each of the arrays, int64. After it nothing may be added."""
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
    """Positions of the ids of _RECORD, in the order of positions, that an earlier one has, ascending."""
    order = np.lexsort((records["low"], records["high"]))  # stable: of equal ids the earliest comes first
    sorted_records = records[order]
    same = (sorted_records["high"][1:] == sorted_records["high"][:-1]) & (
        sorted_records["low"][1:] == sorted_records["low"][:-1]
    )
    return np.sort(sorted_records["position"][1:][same])


def with_duplicates(chunks: Sequence[Chunk], hashes: Iterable[bytes]) -> Iterator[Chunk]:
    """The chunks, each with the positions of its rows that have an earlier row's id.

    hashes: for each chunk in order those of its rows' ids (`id_hashes`), blank lines left out.
    """
    ids, starts = DuplicateIds(sum(chunk.num_rows for chunk in chunks)), [0]
    for chunk_hashes in hashes:
        ids.add(chunk_hashes)
        starts.append(starts[-1] + len(chunk_hashes) // HASH_BYTES)
    later = np.sort(np.concatenate(list(ids.later())))
    chunk_positions = np.split(later, np.searchsorted(later, starts[1:-1]))
    for chunk, start, positions in zip(chunks, starts, chunk_positions, strict=False):
        yield replace(chunk, duplicates=tuple((positions - start).tolist()))
