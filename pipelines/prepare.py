"""Makes the windows of a prepare on a Ray cluster; all other parts are `mmray.prepared.driver`'s.

    chunks of 512 rows ─ EncodeChunk (actors: headers, tokens, exact lengths) ─ PackWindow (actors: 2D bins, Parquet)

A chunk goes through Ray Data as one row, its samples as one Arrow buffer, so no block is ever split or merged and a
window always consists of the same chunks: bins are byte-equal for any number of actors.

With `data.size_cache` all actors look into one table in the object store; sizes that they measure themselves come back
with the windows.
"""

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError

from mmray.config.job import Job
from mmray.errors import UserError
from mmray.images.size_cache import KeptSizes, SizeCache
from mmray.prepared import PreparedDataset, driver
from mmray.prepared.arrow import binary_cell
from mmray.prepared.stages import ChunkEncoder, PrepareContext, WindowPacker
from mmray.rows.files import Chunk
from mmray.rows.plan import Progress, by_window, no_progress
from pipelines import measures
from pipelines.dataset import ERROR, cluster_amount, one_row_blocks, out_of_room
from pipelines.measures import StageClock, clocked
from pipelines.row_ids import hash_ids

CHUNKS_AT_ONCE = 65_536
"""Number of chunks of one graph."""
CHUNKS_AN_ACTOR = 256
"""Number of chunks of one graph for each encode actor, if these are more."""
CHUNKS_HERE = 1
"""Number of chunks up to which the windows of eval rows are made in the driver, in a second. Actors of their own would
take ten or more to start, after those of train have ended."""


def prepare(
    job: Job, split: str, *, replace: bool = False,
    on_progress: Progress = no_progress, on_files: Progress = no_progress,
) -> tuple[PreparedDataset, bool]:  # fmt: skip
    """Prepares a split as `driver.prepare` does, on the cluster that this process is connected to."""
    return driver.prepare(
        job, split, replace=replace, on_progress=on_progress, on_files=on_files, run_windows=partial(_run_windows, job),
        hash_ids=partial(hash_ids, labels=job.resources.prepare_labels),
    )  # fmt: skip


class EncodeChunk:
    """Actor that encodes the samples of one chunk, and measures the images that the size cache lacks."""

    def __init__(self, job: Job, split: str, known: "ray.ObjectRef[pa.Table] | None" = None) -> None:
        """Stores the arguments. known: `KeptSizes.known`; None without a size cache."""
        self.job, self.split = job, split
        self.sizes = SizeCache(ray.get(known)) if known else None
        self.clock = StageClock("encode", job.name)
        self.tags = {"job_name": job.name, "split": split}

    @cached_property
    def encode(self) -> ChunkEncoder:
        """The encoder, built with the first chunk, so that its errors are reported like a mistake in a row."""
        encoder = ChunkEncoder(PrepareContext.of(self.job, self.split), self.sizes)
        gc.freeze()  # else Python looks through the imported modules again with each full collection: 7 µs a row
        return encoder

    @clocked
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (chunk,) = batch["chunk"]
        error, samples = None, pa.py_buffer(b"")
        try:
            table = self.encode(chunk)
            samples = _to_buffer(table)
            measures.add(measures.ROWS_READ, table.num_rows, **self.tags)
        except UserError as mistake:
            error = str(mistake)
        return {
            "window": [chunk.window],
            "chunk": [chunk.index],
            "samples": binary_cell(samples),
            "sizes": binary_cell(_to_buffer(self.sizes.take_new()) if self.sizes else b""),
            ERROR: pa.array([error], pa.string()),
        }


class PackWindow:
    """Actor that packs the chunks of one window and commits its files. Passes the sizes on."""

    def __init__(self, job: Job, split: str, token: str, plan: dict[str, Any]) -> None:
        """Stores the arguments. token: of the plan whose windows these are (`PreparedWriter.begin`); plan: the fields
        of the context that the driver sets."""
        self.job, self.split, self.token, self.plan = job, split, token, plan
        self.clock = StageClock("pack", job.name)
        self.tags = {"job_name": job.name, "split": split}

    @cached_property
    def pack(self) -> WindowPacker:
        """The packer, built with the first window."""
        packer = WindowPacker(replace(PrepareContext.of(self.job, self.split), **self.plan), self.token)
        gc.freeze()  # as in EncodeChunk
        return packer

    @clocked
    def __call__(self, batch: pa.Table) -> dict[str, Any]:
        sizes = pa.array([[cell for cell in batch["sizes"].to_pylist() if cell]], pa.list_(pa.large_binary()))
        errors = [error for error in batch[ERROR].to_pylist() if error]
        if errors:
            return {"window": [0], "sizes": sizes, ERROR: [errors[0]]}
        windows, chunks = batch["window"].to_pylist(), batch["chunk"].to_pylist()
        if len(set(windows)) != 1 or chunks != list(range(len(chunks))):
            raise RuntimeError(f"chunks out of order: windows {windows}, chunks {chunks}")
        samples = pa.concat_tables(_from_buffer(value.as_buffer()) for value in batch["samples"])
        try:
            statistics = self.pack(windows[0], samples)
        except UserError as mistake:
            return {"window": [0], "sizes": sizes, ERROR: [str(mistake)]}
        self._count(statistics)
        return {"window": [windows[0]], "sizes": sizes, ERROR: [""]}

    def _count(self, facts: dict[str, Any]) -> None:
        measures.add(measures.ROWS_PACKED, facts["rows_packed"], **self.tags)
        measures.add(measures.BINS_WRITTEN, facts["bins"], **self.tags)
        for reason, rows in facts["rejected_by_reason"].items():
            measures.add(measures.ROWS_REJECTED, rows, reason=reason, **self.tags)


def _run_windows(
    job: Job, context: PrepareContext, token: str, chunks: Iterable[Chunk], sizes: KeptSizes | None
) -> Iterator[int]:
    """Executes the graph over these chunks: the `driver.RunWindows` of a job.

    Ray lists all chunks of a graph before it starts, some kilobytes each. So there is a graph for about CHUNKS_AT_ONCE
    chunks at a time, or more where there are more actors, that the start of actors, seconds, does not count.

    Raises UserError for mistakes that actors find, and where Ray lacks resources.
    """
    most = max(CHUNKS_AT_ONCE, CHUNKS_AN_ACTOR * job.resources.encode_actors)
    windows = by_window(chunks)
    waiting: list[Chunk] = []
    for window in windows:
        if len(waiting) + len(window) > most and waiting:
            yield from _run_graph(job, context, token, waiting, sizes)
            waiting = []
        waiting += window
    if context.split == "eval" and len(waiting) <= CHUNKS_HERE:
        yield from _run_here(job, context, token, waiting, sizes)
    elif waiting:
        yield from _run_graph(job, context, token, waiting, sizes)


def _run_here(
    job: Job, context: PrepareContext, token: str, chunks: Sequence[Chunk], sizes: KeptSizes | None
) -> Iterator[int]:
    """Does in this process what the actors of a graph do; arguments, returns and errors as of `_run_windows`."""
    encode = EncodeChunk(job, context.split, ray.put(sizes.known) if sizes else None)
    pack = PackWindow(job, context.split, token, context.plan)
    for window in by_window(chunks):
        samples = pa.concat_tables([pa.table(encode({"chunk": [chunk]})) for chunk in window])
        yield _number(pa.table(pack(samples)).to_pylist()[0], sizes)


def _number(row: dict[str, Any], sizes: KeptSizes | None) -> int:
    """The number of the window of a row of `PackWindow`. Keeps its sizes; raises UserError of a mistake."""
    if sizes:
        sizes.add(map(_from_buffer, row["sizes"]))
    if row[ERROR]:
        raise UserError(row[ERROR])
    return int(row["window"])


def _run_graph(
    job: Job, context: PrepareContext, token: str, chunks: Sequence[Chunk], sizes: KeptSizes | None
) -> Iterator[int]:
    """Executes one graph; arguments, returns and errors as of `_run_windows`."""
    split, resources, cpus = context.split, job.resources, int(cluster_amount("CPU", job.resources.prepare_labels))
    dataset = one_row_blocks([{"chunk": chunk} for chunk in chunks], resources.prepare_labels)
    dataset = dataset.map_batches(
        EncodeChunk, batch_size=1, fn_constructor_args=(job, split, ray.put(sizes.known) if sizes else None),
        compute=_pool(resources.encode_actors, room=cpus - 1), num_cpus=1,
    )  # fmt: skip
    dataset = dataset.map_batches(
        PackWindow, batch_size=job.packing.window_rows // job.packing.chunk_rows, batch_format="pyarrow",
        fn_constructor_args=(job, split, token, context.plan),
        compute=_pool(resources.pack_actors, room=cpus - resources.encode_actors), num_cpus=1,
    )  # fmt: skip
    try:
        for row in dataset.iter_rows():
            yield _number(row, sizes)
    except RayError as error:
        if lack := out_of_room(error):
            raise UserError(
                f"{lack}: lower packing.window_rows or the actors under resources, or give Ray more memory; then the "
                "same command continues, finished windows are kept"
            ) from error
        raise


def _pool(most: int, *, room: int) -> ray.data.ActorPoolStrategy:
    """A pool of up to `most` actors that begins with as many as fit. room: CPUs of the nodes that may run them.

    More are added as nodes join. Beginning with one and growing would leave the others' imports, some seconds, for
    later.
    """
    return ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=min(most, max(1, room)))


def _to_buffer(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _from_buffer(data: pa.Buffer | bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
