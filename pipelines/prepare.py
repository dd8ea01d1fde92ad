"""Rows to a prepared dataset, on a Ray cluster.

    chunks of 512 rows ─ EncodeChunk (actors: headers, tokens, exact lengths) ─ PackWindow (actors: 2D bins, Parquet)

A chunk goes through Ray Data as one row, its samples as one Arrow buffer, so no block is ever split or merged and a
window is always the same chunks: bins are byte-equal for any number of actors. Windows are committed one by one; what
an interrupted run has committed is not made again.

With `data.size_cache` all actors look into one table in the object store; what they measure themselves comes back with
the windows, and the driver alone writes the cache.
"""

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError

from mmray.config.compatibility import job_family
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.families import Family
from mmray.images.header import measured
from mmray.images.size_cache import SizeCache, merge_sizes, read_sizes
from mmray.images.source import one_line
from mmray.loss.labels import LabelMaker
from mmray.loss.settings import allows_empty, label_maker
from mmray.prepared import PreparedDataset, PreparedWriter, WindowWriter
from mmray.prepared.arrow import binary_cell
from mmray.prepared.fingerprint import prepare_record
from mmray.prepared.versions import labels_record
from mmray.prepared.window import Window, pack_window, samples_table
from mmray.rows.document import DROPPED_THOUGHTS
from mmray.rows.encode import Encoder
from mmray.rows.files import Chunk, check_unchanged, plan_chunks, source_files
from mmray.rows.preflight import check_first_rows
from mmray.rows.read import RowReader, chunk_rows
from mmray.rows.settings import DatasetSettings, DataSettings
from mmray.training.model import load_config
from pipelines import measures
from pipelines.dataset import ERROR, cluster_amount, one_row_blocks, out_of_room
from pipelines.measures import StageClock, clocked
from pipelines.row_ids import find_duplicates

log = logging.getLogger("mmray")


class PrepareContext:
    """What every actor of a prepare needs, built from the job alone."""

    def __init__(self, job: Job, split: str) -> None:
        self.job = job
        self.datasets: tuple[DatasetSettings, ...] = getattr(job.data, split)
        self.path = job.prepared_path(split)

    @cached_property
    def family(self) -> Family:
        return job_family(self.job)

    @cached_property
    def policy(self) -> Any:
        return self.family.resolved_tiling(self.job.images)

    def encoder(self, data: DataSettings, sizes: SizeCache | None) -> Encoder:
        """Holds the tokenizer; one in each process."""
        return Encoder(
            data, self.datasets, self.family, self.policy, self.job.packing, loss=self.job.loss,
            measure=sizes.measured if sizes else measured,
        )  # fmt: skip

    def labels(self) -> LabelMaker:
        """What the loss setting makes of tokens."""
        return label_maker(self.job.loss, self.family)

    def record(self, files: Any) -> dict[str, Any]:
        """Everything that changes the result."""
        return prepare_record(
            files=files, datasets=self.datasets, data=self.job.data, processor=self.family.processor,
            tiling=self.policy, packing=self.job.packing, loss=self.job.loss,
        )  # fmt: skip


@dataclass
class KeptSizes:
    """The driver's side of `data.size_cache`. known: what it held at the beginning, for every actor; measured: what
    actors had to measure."""

    known: pa.Table
    measured: list[pa.Table] = field(default_factory=list)


@contextmanager
def kept_sizes(uri: str) -> Iterator[KeptSizes]:
    """The cache at `uri`, which at the end, whatever ends it, also holds what was measured by then.

    A cache that cannot be written is a warning. Raises UserError for an unknown kind of URI.
    """
    sizes = KeptSizes(read_sizes(uri))
    try:
        yield sizes
    finally:
        try:
            merge_sizes(uri, sizes.measured)
        except Exception as error:  # noqa: BLE001, a remote file system may raise anything
            log.warning("size cache %s: %s; it stays as it was", uri, one_line(error))


class EncodeChunk:
    """Actor: the samples of one chunk, and the sizes of its images that the cache lacks."""

    def __init__(self, job: Job, split: str, known: "ray.ObjectRef[pa.Table] | None" = None) -> None:
        """known: `KeptSizes.known`; None where there is no cache."""
        self.context = PrepareContext(job, split)
        self.sizes = SizeCache(ray.get(known)) if known else None
        self.reader = RowReader()
        self.clock = StageClock("encode", job.name)
        self.tags = {"job_name": job.name, "split": split}

    @cached_property
    def encoder(self) -> Encoder:
        """Made with the first chunk: what is wrong then is told like a mistake in a row."""
        return self.context.encoder(self.context.job.data, self.sizes)

    @clocked
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (chunk,) = batch["chunk"]
        error, samples = None, pa.py_buffer(b"")
        try:
            rows = list(chunk_rows(chunk, self.reader))
            verify = [line * len(rows) // chunk.num_rows for line in chunk.verify]  # blank lines count, but are no rows
            samples = _to_buffer(samples_table(self.encoder.encode(rows, verify, chunk.duplicates)))
            measures.add(measures.ROWS_READ, len(rows), **self.tags)
        except UserError as mistake:
            error = str(mistake)
        except OSError as failure:  # of a store that does not answer, a file that is gone
            error = f"{chunk.pieces[0].uri} or its images: {one_line(failure)}; the same command continues"
        return {
            "window": [chunk.window],
            "chunk": [chunk.index],
            "samples": binary_cell(samples),
            "sizes": binary_cell(_to_buffer(self.sizes.take_new()) if self.sizes else b""),
            ERROR: pa.array([error], pa.string()),
        }


class PackWindow:
    """Actor: packs the chunks of one window and commits its files. Hands on the sizes."""

    def __init__(self, job: Job, split: str, token: str) -> None:
        """token: of the plan whose windows these are (`PreparedWriter.begin`)."""
        self.context = PrepareContext(job, split)
        self.writer = WindowWriter(self.context.path, token)
        self.clock = StageClock("pack", job.name)
        self.tags = {"job_name": job.name, "split": split}

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
            window = self._packed(samples)
            self.writer.write(windows[0], window)
        except UserError as mistake:
            return {"window": [0], "sizes": sizes, ERROR: [str(mistake)]}
        self._count(window.statistics)
        return {"window": [windows[0]], "sizes": sizes, ERROR: [""]}

    def _count(self, facts: dict[str, Any]) -> None:
        measures.add(measures.ROWS_PACKED, facts["rows_packed"], **self.tags)
        measures.add(measures.BINS_WRITTEN, facts["bins"], **self.tags)
        for reason, rows in facts["rejected_by_reason"].items():
            measures.add(measures.ROWS_REJECTED, rows, reason=reason, **self.tags)

    @cached_property
    def _labels(self) -> LabelMaker:
        return self.context.labels()

    def _packed(self, samples: pa.Table) -> Window:
        job, gap = self.context.job, self.context.family.sample_gap
        return pack_window(samples, job.packing, self._labels, gap, allows_empty(job.loss))


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
    if not replace and writer.is_finished(record):
        writer.tidy()
        return PreparedDataset(context.path), False
    chunks = _with_verification(
        plan_chunks(files, window_rows=job.packing.window_rows, chunk_rows=job.packing.chunk_rows),
        job.data.verify_rows,
    )
    if not chunks:
        raise UserError(f"data.{split}: the files hold no rows: {', '.join(file.uri for file in files)}")
    total = sum(chunk.num_rows for chunk in chunks)
    with kept_sizes(job.data.size_cache) if job.data.size_cache else nullcontext() as sizes:
        sources = _check_first_rows(context, chunks, split, sizes)
        if replace:
            writer.clear()
        finished = writer.begin(record)
        if finished:
            log.info("%s: %d windows are there from an earlier run and are kept", context.path, len(finished))
        missing = [chunk for chunk in chunks if chunk.window not in finished]
        if missing and job.data.duplicate_ids == "reject":
            chunks = find_duplicates(chunks, context.datasets, job.resources.prepare_labels)
            missing = [chunk for chunk in chunks if chunk.window not in finished]
        done = total - sum(chunk.num_rows for chunk in missing)
        on_progress(done, total)
        try:
            for rows in _run(job, split, writer.token, missing, sizes):
                done += rows
                on_progress(done, total)
        except Exception:
            check_unchanged(files, context.datasets)  # what was found wrong may come of it
            raise
        check_unchanged(files, context.datasets)
    prepared = writer.finish(
        record,
        chunks[-1].window + 1,
        tiling=context.policy,
        capacities=(job.packing.token_capacity, job.packing.visual_capacity),
        facts={
            "model_family": type(context.family).__name__,
            "model_type": load_config(job.model).model_type,
            "processor_source": job.model.processor_source,
            "loss_sources": sources,
            "labels": labels_record(context.labels(), sources),
            "seconds": round(time.monotonic() - started, 1),
        },
    )
    _tell(prepared)
    return prepared, True


def _tell(prepared: PreparedDataset) -> None:
    """Warn of what was let pass, with examples."""
    facts = prepared.statistics
    examples = facts["examples"]
    if facts["duplicate_ids"]:
        log.warning(
            "%s: %d samples have an id that another has, such as %r; data.duplicate_ids: reject would set them aside",
            prepared.path, facts["duplicate_ids"], examples["duplicate_ids"][0],
        )  # fmt: skip
    for note, count in facts["image_notes"].items():
        if note == DROPPED_THOUGHTS:
            log.warning(
                "%s: of %d chats the template leaves thoughts out (allow_dropped), such as those of row %s",
                prepared.path, count, examples[note][0],
            )  # fmt: skip
            continue
        log.warning(
            "%s: %d images with %s are taken as they are stored, such as that of row %s",
            prepared.path, count, note, examples[note][0],
        )  # fmt: skip


def _check_first_rows(context: PrepareContext, chunks: list[Chunk], split: str, sizes: KeptSizes | None) -> list[str]:
    """`check_first_rows` of a job; the names of its sources."""
    job = context.job
    lenient = job.data.model_copy(update={"on_bad_row": "reject"})  # bad rows stop it later, if at all
    encoder = context.encoder(lenient, SizeCache(sizes.known) if sizes else None)
    pieces = [piece for chunk in chunks for piece in chunk.pieces]
    sources = check_first_rows(encoder, context.labels(), pieces, split=split)
    return [source.value for source in sources]


def _run(job: Job, split: str, token: str, chunks: list[Chunk], sizes: KeptSizes | None = None) -> Iterator[int]:
    """Execute the graph over these chunks; yields the rows of each window, as planned, when it is committed.

    token: of the plan. Raises UserError for what actors find, and where Ray has no room.
    """
    if not chunks:
        return
    rows = Counter[int]()
    for chunk in chunks:
        rows[chunk.window] += chunk.num_rows
    resources, cpus = job.resources, int(cluster_amount("CPU", job.resources.prepare_labels))
    dataset = one_row_blocks([{"chunk": chunk} for chunk in chunks], resources.prepare_labels)
    dataset = dataset.map_batches(
        EncodeChunk, batch_size=1, fn_constructor_args=(job, split, ray.put(sizes.known) if sizes else None),
        compute=_pool(resources.encode_actors, room=cpus - 1), num_cpus=1,
    )  # fmt: skip
    dataset = dataset.map_batches(
        PackWindow, batch_size=job.packing.window_rows // job.packing.chunk_rows, batch_format="pyarrow",
        fn_constructor_args=(job, split, token),
        compute=_pool(resources.pack_actors, room=cpus - resources.encode_actors), num_cpus=1,
    )  # fmt: skip
    try:
        for row in dataset.iter_rows():
            if sizes:
                sizes.measured += map(_from_buffer, row["sizes"])
            if row[ERROR]:
                raise UserError(row[ERROR])
            yield rows[row["window"]]
    except RayError as error:
        if lack := out_of_room(error):
            raise UserError(
                f"{lack}: lower packing.window_rows or the actors under resources, or give Ray more memory; then the "
                "same command continues, finished windows are kept"
            ) from error
        raise


def _pool(most: int, *, room: int) -> ray.data.ActorPoolStrategy:
    """A pool of up to `most` actors that begins with all that fit. room: CPUs of the nodes that are there for it.

    The rest come as nodes do. Beginning with one and growing would leave the others' imports, some seconds, for later.
    """
    return ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=min(most, max(1, room)))


def _to_buffer(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _from_buffer(data: pa.Buffer | bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


def _with_verification(chunks: list[Chunk], count: int) -> list[Chunk]:
    """Draw the rows to compare with the real processor; the same rows for the same input."""
    total = sum(chunk.num_rows for chunk in chunks)
    drawn = set(random.Random(0).sample(range(total), min(count, total)))
    return [
        replace(chunk, verify=tuple(n for n in range(chunk.num_rows) if chunk.first_row + n in drawn))
        for chunk in chunks
    ]
