"""Prepares a dataset from row files: plans, checks, continues and finishes, in one process and without Ray.

    row files ─ plan of windows and chunks ─ first rows checked ─ windows that are missing ─ manifest
                                                                  (`run_windows`)

`prepare` makes windows in this process. For more machines, pass another `run_windows`: that of `pipelines/prepare.py`
runs the same stages on the actors of a Ray cluster. Windows are committed one by one; a window that an interrupted run
has committed is not made again, and bins are byte-equal wherever they are made.
"""

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from mmray.config.job import Job
from mmray.errors import UserError
from mmray.images.header import BROKEN_EXIF, SEVERAL_FRAMES
from mmray.images.size_cache import KeptSizes, SizeCache, kept_sizes
from mmray.prepared.dataset import PreparedDataset
from mmray.prepared.stages import PrepareContext, WindowMaker
from mmray.prepared.versions import labels_record
from mmray.prepared.writer import PreparedWriter
from mmray.rows.dealing import dealing_of
from mmray.rows.document import DROPPED_THOUGHTS
from mmray.rows.duplicates import chunk_id_hashes, with_duplicates
from mmray.rows.files import Chunk, SourceFile, by_window, check_unchanged, plan_chunks, set_files, source_files
from mmray.rows.preflight import check_first_rows, set_name
from mmray.rows.rejections import SetRows
from mmray.rows.settings import DatasetSettings
from mmray.rows.webdataset import BY_NUMBER, WITHOUT_IMAGE

log = logging.getLogger("mmray")

RunWindows = Callable[[PrepareContext, str, Sequence[Chunk], KeptSizes | None], Iterator[int]]
"""Makes and commits windows: takes (context, token of the plan, chunks of whole windows in order, known image sizes),
yields the number of each window once it is committed. Puts the sizes it measured into `KeptSizes.measured`. Raises
UserError."""

HashIds = Callable[[Sequence[Chunk], Sequence[DatasetSettings]], Iterable[bytes]]
"""Hashes the ids of rows: takes (all chunks in order, their data sets) and gives `rows.duplicates.chunk_id_hashes` of
each chunk."""


def run_windows_here(
    context: PrepareContext, token: str, chunks: Sequence[Chunk], sizes: KeptSizes | None
) -> Iterator[int]:
    """Make windows in this process, one after another: a `RunWindows` that needs no cluster."""
    cache = SizeCache(sizes.known) if sizes else None
    make = WindowMaker(context, token, cache)
    for window in by_window(chunks):
        try:
            number = make(window)
        finally:
            if sizes and cache:
                sizes.add([cache.take_new()])
        yield number


def hash_ids_here(chunks: Sequence[Chunk], datasets: Sequence[DatasetSettings]) -> Iterator[bytes]:
    """Hash the ids of rows in this process: a `HashIds` that needs no cluster."""
    return (chunk_id_hashes(chunk, datasets) for chunk in chunks)


def prepare(
    job: Job, split: str = "train", *, replace: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    run_windows: RunWindows = run_windows_here, hash_ids: HashIds = hash_ids_here,
) -> tuple[PreparedDataset, bool]:  # fmt: skip
    """Prepare one split of a job.

    split: `train` or `eval`.
    replace: delete what is prepared there and start anew.
    on_progress: called with (rows done, all rows) when a window is committed.
    run_windows, hash_ids: where the work is done; default: in this process.

    Returns the dataset, and whether there was anything to do. Raises UserError for what a person can mend.
    """
    files = source_files(job.data.splits[split])  # a missing file is reported before a processor is loaded
    context = PrepareContext.of(job, split)
    return prepare_files(
        context, files, replace=replace, on_progress=on_progress, run_windows=run_windows, hash_ids=hash_ids
    )


def prepare_files(
    context: PrepareContext, files: Sequence[SourceFile], *, replace: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    run_windows: RunWindows = run_windows_here, hash_ids: HashIds = hash_ids_here,
) -> tuple[PreparedDataset, bool]:  # fmt: skip
    """Prepare a split from a context instead of a job; arguments, returns and errors as in `prepare`.

    files: `source_files` of the context's data sets.
    """
    started = time.monotonic()
    record, data, packing = context.record(files), context.data, context.packing
    writer = PreparedWriter(context.path)
    record = record if replace else writer.as_begun(record)
    context = context.dealt(dealing_of(record))
    if not replace and writer.is_finished(record):
        writer.tidy()
        return PreparedDataset(context.path), False
    chunks = plan_chunks(files, window_rows=packing.window_rows, chunk_rows=packing.chunk_rows, dealing=context.dealing)
    chunks = _with_verification(chunks, data.verify_rows)
    if not chunks:
        raise UserError(f"data.{context.split}: the files hold no rows: {', '.join(file.uri for file in files)}")
    planned = Counter[int]()
    for chunk in chunks:
        planned[chunk.window] += chunk.num_rows
    rejections = _Rejections(context, chunks)
    with kept_sizes(data.size_cache) if data.size_cache else nullcontext() as sizes:
        sources = _check_first_rows(context, chunks, sizes)
        if replace:
            writer.clear()
        finished = writer.begin(record)
        if finished:
            log.info("%s: %d windows are there from an earlier run and are kept", context.path, len(finished))
        if data.duplicate_ids == "reject" and any(chunk.window not in finished for chunk in chunks):
            chunks = list(with_duplicates(chunks, hash_ids(chunks, context.datasets)))
        missing = [chunk for chunk in chunks if chunk.window not in finished]
        done, total = sum(planned[number] for number in finished), planned.total()
        on_progress(done, total)
        try:
            rejections.add(writer.statistics(finished))
            for number in run_windows(context, writer.token, missing, sizes):
                done += planned[number]
                on_progress(done, total)
                rejections.add(writer.statistics([number]))
            rejections.check_all()
        except Exception:
            check_unchanged(files, context.datasets)  # a changed file may be the cause of the error
            raise
        check_unchanged(files, context.datasets)
    prepared = writer.finish(
        record,
        chunks[-1].window + 1,
        tiling=context.tiling,
        capacities=(packing.token_capacity, packing.visual_capacity),
        facts={
            "model_family": type(context.family).__name__,
            "model_type": context.model_type,
            "processor_source": context.processor_source,
            "loss_sources": sources,
            "labels": labels_record(context.labels(), sources),
            "set_files": set_files(files, len(context.datasets)),
            "seconds": round(time.monotonic() - started, 1),
        },
    )
    _warn_of_oddities(prepared)
    return prepared, True


class _Rejections:
    """Counts the rejected rows of each set as windows are committed, and checks `data.max_rejected_share`."""

    def __init__(self, context: PrepareContext, chunks: Sequence[Chunk]) -> None:
        self._max_share = context.data.max_rejected_share
        self._names = [set_name(context.split, number, dataset) for number, dataset in enumerate(context.datasets)]
        self._sets = [SetRows() for _ in context.datasets]
        self._planned = [0] * len(context.datasets)
        for piece in (piece for chunk in chunks for piece in chunk.pieces):
            self._planned[piece.dataset] += piece.num_rows

    def add(self, windows: Iterable[dict[str, Any]]) -> None:
        """Add the statistics of windows.

        Raises UserError when a set has more rejected rows than `max_rejected_share` of all its rows, those of later
        windows included.
        """
        for statistics in windows:
            for number, counts in statistics.get("sets", {}).items():  # an earlier mmray did not count by sets
                self._sets[int(number)].add(counts)
        self._check(self._planned)

    def check_all(self) -> None:
        """Check the shares of the rows that were read, after the last window: blank lines are planned as rows, but are
        none. Raises UserError."""
        self._check([counts.read for counts in self._sets])

    def _check(self, rows: Sequence[int]) -> None:
        for name, counts, all_rows in zip(self._names, self._sets, rows, strict=True):
            counts.check(name, all_rows, self._max_share)


_NOTES = {
    BROKEN_EXIF: f"images with {BROKEN_EXIF} are taken as they are stored",
    SEVERAL_FRAMES: f"images with {SEVERAL_FRAMES} are their first page or frame alone (data.image_frames)",
    BY_NUMBER: "samples of shards have numbered images in another order; they are taken by number",
    DROPPED_THOUGHTS: "chats have thoughts that the chat template leaves out (allow_dropped)",
    WITHOUT_IMAGE: "texts of shards have no image, and are trained on as text alone",
}


def _warn_of_oddities(prepared: PreparedDataset) -> None:
    """Log a warning for each kind of oddity that did not reject rows, with an example."""
    facts = prepared.statistics
    examples = facts["examples"]
    if facts["duplicate_ids"]:
        log.warning(
            "%s: %d samples have an id that another has, such as %r; data.duplicate_ids: reject would set them aside",
            prepared.path, facts["duplicate_ids"], examples["duplicate_ids"][0],
        )  # fmt: skip
    for note, count in facts["image_notes"].items():
        log.warning(
            "%s: %d %s, such as %s", prepared.path, count, _NOTES.get(note, note), examples[note][0]
        )  # fmt: skip


def _check_first_rows(context: PrepareContext, chunks: Sequence[Chunk], sizes: KeptSizes | None) -> list[str]:
    """Check the first rows of a split (`check_first_rows`); returns the names of its loss sources.

    Bad rows do not stop the job here, but later, if at all.
    """
    encoder = context.encoder(context.data.lenient, SizeCache(sizes.known) if sizes else None)
    pieces = [piece for chunk in chunks for piece in chunk.pieces]
    sources = check_first_rows(
        encoder, context.labels(), pieces, split=context.split,
        some_good=context.data.max_rejected_share < 1,
    )  # fmt: skip
    return [source.value for source in sources]


def _with_verification(chunks: Sequence[Chunk], count: int) -> list[Chunk]:
    """The chunks with rows drawn for comparison with the real processor; deterministic for equal input."""
    total = sum(chunk.num_rows for chunk in chunks)
    drawn = set(random.Random(0).sample(range(total), min(count, total)))
    return [
        replace(chunk, verify=tuple(n for n in range(chunk.num_rows) if chunk.first_row + n in drawn))
        for chunk in chunks
    ]
