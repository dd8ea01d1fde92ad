"""Rows that share an id with an earlier one, over all files of a split.

Ids are compared by 16 bytes of their hash, 16 bytes a row in memory: that two different ids of a billion share one is
less likely than 1 in 10^20. The result depends on the rows and their order alone. Ids are compared as they are
written: `A1` and `a1` are two. A row without an id goes by its place.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from mmray.rows.files import Chunk
from mmray.rows.ids import has_id, id_text
from mmray.rows.read import RawRow, RowReader, chunk_rows
from mmray.rows.settings import DatasetSettings

HASH_BYTES = 16


def id_of(row: RawRow, dataset: DatasetSettings) -> str:
    """The id by which a row goes, good or bad: its own, or its place."""
    found = row.value.get(dataset.column("id")) if isinstance(row.value, dict) else None
    text = id_text(found) if has_id(found) else None
    return row.source if text is None else text


def id_hashes(ids: Iterable[str]) -> bytes:
    """HASH_BYTES for each id, one after another."""
    return b"".join(
        hashlib.blake2b(each.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest() for each in ids
    )


def chunk_id_hashes(chunk: Chunk, datasets: Sequence[DatasetSettings], reader: RowReader | None = None) -> bytes:
    """`id_hashes` of the rows of a chunk."""
    return id_hashes(id_of(row, datasets[row.dataset]) for row in chunk_rows(chunk, reader))


def later_ones(hashes: bytes | bytearray) -> np.ndarray:
    """Positions of the ids (of `id_hashes`) that stand at an earlier position too, ascending, int64 [n]."""
    high, low = np.frombuffer(hashes, dtype=np.uint64).reshape(-1, 2).T
    order = np.lexsort((low, high))  # stable: of equal ids the earliest comes first
    same = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
    return np.sort(order[1:][same])


def with_duplicates(chunks: Sequence[Chunk], hashes: Iterable[bytes]) -> Iterator[Chunk]:
    """The chunks, each with the positions of its rows that have an earlier row's id.

    hashes: for each chunk in order those of its rows' ids (`id_hashes`), blank lines left out.
    """
    found = list(hashes)
    starts = np.cumsum([0] + [len(each) // HASH_BYTES for each in found])
    later = later_ones(b"".join(found))
    own = np.split(later, np.searchsorted(later, starts[1:-1]))
    for chunk, start, positions in zip(chunks, starts, own, strict=False):
        yield replace(chunk, duplicates=tuple((positions - start).tolist()))
