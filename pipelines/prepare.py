"""Rows to a prepared dataset, on a Ray cluster.

    chunks of 512 rows ─ EncodeChunk (actors: headers, tokens, exact lengths) ─ PackWindow (actors: 2D bins, Parquet)

A chunk goes through Ray Data as one row, its samples as one Arrow buffer, so no block is ever split or merged and a
window is always the same chunks: bins are byte-equal for any number of actors. Windows are committed one by one; what
an interrupted run has committed is not made again.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import pyarrow as pa
import ray

from mmray.arrow import binary_cell
from mmray.config import Job
from mmray.errors import UserError
from mmray.families import Family, family_of, load_processor
from mmray.masks.settings import label_maker
from mmray.packing_settings import PackingSettings
from mmray.prepared import PreparedDataset, PreparedWriter
from mmray.prepared.fingerprint import prepare_record
from mmray.prepared.window import pack_window, samples_table
from mmray.rows.encode import Encoder
from mmray.rows.files import Chunk, plan_chunks, source_files
from mmray.rows.read import read_piece
from mmray.rows.settings import DatasetSettings
from pipelines.dataset import ERROR, one_row_blocks

log = logging.getLogger("mmray")


class PrepareContext:
    """What every actor of a prepare needs, built from the job alone."""

    def __init__(self, job: Job, split: str) -> None:
        self.job = job
        self.datasets: tuple[DatasetSettings, ...] = getattr(job.data, split)
        self.path = job.prepared_path(split)

    @cached_property
    def family(self) -> Family:
        processor = load_processor(self.job.model.processor_source, trust_remote_code=self.job.model.trust_remote_code)
        return family_of(processor, tiled=self.job.images.is_tiled)

    @cached_property
    def policy(self) -> Any:
        return self.family.resolved_tiling(self.job.images)

    def record(self, files: Any) -> dict[str, Any]:
        """Everything that changes the result."""
        return prepare_record(
            files=files, datasets=self.datasets, max_image_pixels=self.job.data.max_image_pixels,
            processor=self.family.processor, tiling=self.policy, packing=self.job.packing, masking=self.job.masking,
        )  # fmt: skip


class EncodeChunk:
    """Actor: the samples of one chunk."""

    def __init__(self, job: Job, split: str) -> None:
        context = PrepareContext(job, split)
        self.encoder = Encoder(
            job.data, context.datasets, context.family, context.policy, job.packing,
            train_on_inputs=job.masking.train_on_inputs,
        )  # fmt: skip

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (chunk,) = batch["chunk"]
        error, sink = None, pa.BufferOutputStream()
        try:
            rows = [row for piece in chunk.pieces for row in read_piece(piece)]
            table = samples_table(self.encoder.encode(rows, chunk.verify))
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        except UserError as mistake:
            error = str(mistake)
        return {
            "window": [chunk.window],
            "chunk": [chunk.index],
            "samples": binary_cell(sink.getvalue()),
            ERROR: pa.array([error], pa.string()),
        }


class PackWindow:
    """Actor: packs the chunks of one window and commits its files."""

    def __init__(self, job: Job, split: str) -> None:
        context = PrepareContext(job, split)
        self.packing: PackingSettings = job.packing
        self.labels = label_maker(job.masking, context.family)
        self.writer = PreparedWriter(context.path)

    def __call__(self, batch: pa.Table) -> dict[str, Any]:
        errors = [error for error in batch[ERROR].to_pylist() if error]
        if errors:
            return {"rows": [0], ERROR: [errors[0]]}
        windows, chunks = batch["window"].to_pylist(), batch["chunk"].to_pylist()
        if len(set(windows)) != 1 or chunks != list(range(len(chunks))):
            raise RuntimeError(f"chunks out of order: windows {windows}, chunks {chunks}")
        samples = pa.concat_tables(pa.ipc.open_stream(value.as_buffer()).read_all() for value in batch["samples"])
        window = pack_window(samples, self.packing, self.labels)
        self.writer.write_window(windows[0], window)
        return {"rows": [window.statistics["rows_read"]], ERROR: [""]}


def prepare(
    job: Job, split: str, *, replace: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[PreparedDataset, bool]:  # fmt: skip
    """Prepare one split (`train` or `eval`) of a job; returns the dataset, and whether there was anything to do.

    replace: delete what is prepared there and start anew. on_progress(rows done, rows) is called
    as windows are committed. Raises UserError for what a person can mend.
    """
    started = time.monotonic()
    context = PrepareContext(job, split)
    files = source_files(context.datasets)
    record = context.record(files)
    writer = PreparedWriter(context.path)
    if replace:
        writer.clear()
    if writer.is_finished(record):
        return PreparedDataset(context.path), False
    chunks = _with_verification(
        plan_chunks(files, window_rows=job.packing.window_rows, chunk_rows=job.packing.chunk_rows),
        job.data.verify_rows,
    )
    if not chunks:
        raise UserError(f"data.{split}: the files hold no rows: {', '.join(file.uri for file in files)}")
    finished = writer.begin(record)
    if finished:
        log.info("%s: %d windows are there from an earlier run and are kept", context.path, len(finished))
    total = sum(chunk.num_rows for chunk in chunks)
    missing = [chunk for chunk in chunks if chunk.window not in finished]
    done = total - sum(chunk.num_rows for chunk in missing)
    on_progress(done, total)
    for rows in _run(job, split, missing):
        done += rows
        on_progress(done, total)
    prepared = writer.finish(
        record,
        chunks[-1].window + 1,
        tiling=context.policy,
        capacities=(job.packing.token_capacity, job.packing.visual_capacity),
        facts={"model_family": type(context.family).__name__, "seconds": round(time.monotonic() - started, 1)},
    )
    return prepared, True


def _run(job: Job, split: str, chunks: list[Chunk]) -> Iterator[int]:
    """Execute the graph over these chunks; yields the rows of each window as it is committed."""
    if not chunks:
        return
    resources = job.resources
    dataset = one_row_blocks([{"chunk": chunk} for chunk in chunks])
    dataset = dataset.map_batches(
        EncodeChunk, batch_size=1, fn_constructor_args=(job, split),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=resources.encode_actors), num_cpus=1,
    )  # fmt: skip
    dataset = dataset.map_batches(
        PackWindow, batch_size=job.packing.window_rows // job.packing.chunk_rows, batch_format="pyarrow",
        fn_constructor_args=(job, split),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=resources.pack_actors), num_cpus=1,
    )  # fmt: skip
    for row in dataset.iter_rows():
        if row[ERROR]:
            raise UserError(row[ERROR])
        yield int(row["rows"])


def _with_verification(chunks: list[Chunk], count: int) -> list[Chunk]:
    """Draw the rows to compare with the real processor; the same rows for the same input."""
    total = sum(chunk.num_rows for chunk in chunks)
    drawn = set(random.Random(0).sample(range(total), min(count, total)))
    return [
        replace(chunk, verify=tuple(n for n in range(chunk.num_rows) if chunk.first_row + n in drawn))
        for chunk in chunks
    ]
