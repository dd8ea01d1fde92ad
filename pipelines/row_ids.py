"""Hashes the ids of rows on the cluster before anything is prepared (`data.duplicate_ids`).

One task for each chunk reads its rows and returns 16 bytes for each; the driver joins them. Which rows are set aside
depends on their order alone, so windows can still be made anywhere, and again.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from mmray.errors import UserError
from mmray.prepared.arrow import binary_cell
from mmray.rows.duplicates import chunk_id_hashes
from mmray.rows.files import Chunk
from mmray.rows.settings import DatasetSettings
from pipelines.dataset import ERROR, one_row_blocks

CHUNKS_AT_ONCE = 65_536
"""Number of chunks that one graph is made of: Ray lists all of them, some kilobytes each, before it starts."""


def hash_ids(
    chunks: Iterable[Chunk], datasets: Sequence[DatasetSettings], *, labels: Mapping[str, str]
) -> Iterator[bytes]:
    """The hashes of the ids of each chunk's rows: the `driver.HashIds` of a cluster.

    labels: of the nodes to work on. Raises UserError for a file that cannot be read.
    """
    remaining = iter(chunks)
    while some := list(islice(remaining, CHUNKS_AT_ONCE)):
        if len(some) == 1:  # read sooner than a worker starts
            yield chunk_id_hashes(some[0], datasets)
            continue
        blocks = one_row_blocks([{"chunk": chunk} for chunk in some], labels)
        hashed = blocks.map_batches(functools.partial(_hash_ids, tuple(datasets)), batch_size=1, num_cpus=1)
        for row in hashed.iter_rows():
            if row[ERROR]:
                raise UserError(row[ERROR])
            yield row["hashes"]


def _hash_ids(datasets: Sequence[DatasetSettings], batch: dict[str, Any]) -> dict[str, Any]:
    error, hashes = None, b""
    try:
        hashes = chunk_id_hashes(batch["chunk"][0], datasets)
    except UserError as mistake:
        error = str(mistake)
    return {"hashes": binary_cell(hashes), ERROR: pa.array([error], pa.string())}
