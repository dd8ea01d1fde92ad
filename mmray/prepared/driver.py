"""Prepares a dataset from row files: plans, checks, continues and finishes, in one process and without Ray.

    row files ─ plan of windows and chunks ─ first rows checked ─ windows that are missing ─ manifest
                                                                  (`run_windows`)

`prepare` makes windows in this process. For more machines, pass another `run_windows`: that of `pipelines/prepare.py`
runs the same stages on the actors of a Ray cluster. Windows are committed one by one; a window that an interrupted run
has committed is not made again, and bins are byte-equal wherever they are made.
"""

import bisect
import logging
import random
import time
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
from mmray.prepared.weighing import decided_takings, tokens_per_row
from mmray.prepared.writer import PreparedWriter
from mmray.rows.dealing import dealing_of
from mmray.rows.document import DROPPED_THOUGHTS
from mmray.rows.duplicates import DuplicateRows, chunk_id_hashes
from mmray.rows.files import Chunk, Piece, RowIndex, SourceFile, check_unchanged, set_files, source_files
from mmray.rows.plan import Plan, Progress, by_window, first_taken, indexed_files, no_progress, rows_of_sets
from mmray.rows.preflight import FIRST_ROWS, check_first_rows, set_name
from mmray.rows.rejections import SetRows
from mmray.rows.settings import DatasetSettings
from mmray.rows.webdataset import BY_NUMBER, WITHOUT_IMAGE

log = logging.getLogger("mmray")

RunWindows = Callable[[PrepareContext, str, Iterable[Chunk], KeptSizes | None], Iterator[int]]
"""Makes and commits windows: takes (context, token of the plan, chunks of whole windows in order, known image sizes),
yields the number of each window once it is committed. Puts the sizes it measured into `KeptSizes.measured`. Raises
UserError."""

HashIds = Callable[[Iterable[Chunk], Sequence[DatasetSettings]], Iterable[bytes]]
"""Hashes the ids of rows: takes (all chunks in order, their data sets) and gives `rows.duplicates.chunk_id_hashes` of
each chunk."""


def run_windows_here(
    context: PrepareContext, token: str, chunks: Iterable[Chunk], sizes: KeptSizes | None
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


def hash_ids_here(chunks: Iterable[Chunk], datasets: Sequence[DatasetSettings]) -> Iterator[bytes]:
    """Hash the ids of rows in this process: a `HashIds` that needs no cluster."""
    return (chunk_id_hashes(chunk, datasets) for chunk in chunks)


def prepare(
    job: Job, split: str = "train", *, replace: bool = False,
    on_progress: Progress = no_progress, on_files: Progress = no_progress,
    run_windows: RunWindows = run_windows_here, hash_ids: HashIds = hash_ids_here,
) -> tuple[PreparedDataset, bool]:  # fmt: skip
    """Prepare one split of a job.

    split: `train` or `eval`.
    replace: delete what is prepared there and start anew.
    on_progress: called with (rows done, all rows) when a window is committed.
    on_files: called with (files read, all files) while the rows of files are found, before the first window.
    run_windows, hash_ids: where the work is done; default: in this process.

    Returns the dataset, and whether there was anything to do. Raises UserError for what a person can mend.
    """
    files = source_files(job.data.splits[split])  # a missing file is reported before a processor is loaded
    context = PrepareContext.of(job, split)
    return prepare_files(
        context,
        files,
        replace=replace,
        on_progress=on_progress,
        on_files=on_files,
        run_windows=run_windows,
        hash_ids=hash_ids,
    )


def prepare_files(
    context: PrepareContext, files: Sequence[SourceFile], *, replace: bool = False,
    on_progress: Progress = no_progress, on_files: Progress = no_progress,
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
    indexed = indexed_files(files, on_files)
    _check_rows(context, indexed)
    set_tokens = None if replace else writer.tokens_per_row()
    set_tokens = tokens_per_row(context, indexed) if set_tokens is None else set_tokens
    takings = decided_takings(context, indexed, set_tokens)
    plan = Plan(
        indexed, takings, window_rows=packing.window_rows, chunk_rows=packing.chunk_rows, dealing=context.dealing
    )
    for number, taking in enumerate(takings):
        log.info("%s: %s", set_name(context.split, number, context.datasets[number]), taking)
    rejections = _Rejections(context, first_taken(indexed, takings, len(context.datasets)))
    with kept_sizes(data.size_cache) if data.size_cache else nullcontext() as sizes:
        sources = _check_first_rows(context, plan, sizes)
        if replace:
            writer.clear()
        finished = writer.begin(record, set_tokens)
        if finished:
            log.info("%s: %d windows are there from an earlier run and are kept", context.path, len(finished))
        missing = [window for window in range(plan.num_windows) if window not in finished]
        duplicates = None
        if data.duplicate_ids == "reject" and missing:
            duplicates = DuplicateRows(plan, hash_ids(plan.chunks(), context.datasets))
        done, total = sum(map(plan.rows_of_window, finished)), plan.num_rows
        on_progress(done, total)
        try:
            rejections.add(writer.statistics(finished))
            for windows in _turns(missing, plans_first=context.costs is not None):
                if context.costs and windows != [0]:
                    context = context.costing(next(writer.statistics([0])).get("bin_cost"))
                chunks = _marked(plan, windows, data.verify_rows, duplicates)
                for number in run_windows(context, writer.token, chunks, sizes):
                    done += plan.rows_of_window(number)
                    on_progress(done, total)
                    rejections.add(writer.statistics([number]))
            rejections.check_all()
        except Exception:
            check_unchanged(files, context.datasets)  # a changed file may be the cause of the error
            raise
        check_unchanged(files, context.datasets)
    prepared = writer.finish(
        record,
        plan.num_windows,
        tiling=context.tiling,
        capacities=(packing.token_capacity, packing.visual_capacity),
        facts={
            "model_family": type(context.family).__name__,
            "model_type": context.model_type,
            "processor_source": context.processor_source,
            "loss_sources": sources,
            "labels": labels_record(context.labels(), sources),
            "set_files": set_files(files, len(context.datasets)),
            **({"tokens_per_row": set_tokens} if set_tokens else {}),
            "seconds": round(time.monotonic() - started, 1),
        },
        left_out=[taking.left_out for taking in takings],
    )
    _warn_of_oddities(prepared)
    return prepared, True


def _check_rows(context: PrepareContext, indexed: Sequence[RowIndex]) -> None:
    """Raise UserError for a set whose files hold no rows."""
    for number, rows in enumerate(rows_of_sets(indexed, len(context.datasets))):
        if not rows:
            names = ", ".join(index.file.uri for index in indexed if index.file.dataset == number)
            name = set_name(context.split, number, context.datasets[number])
            raise UserError(f"{name}: its files hold no rows: {names:.500}; name others, or leave the set out")


def _turns(missing: list[int], plans_first: bool) -> list[list[int]]:
    """The windows that are made at once. plans_first: the first window is made alone, before the others need the cost
    of a bin that is chosen by it."""
    if plans_first and missing[:1] == [0]:
        return [turn for turn in (missing[:1], missing[1:]) if turn]
    return [missing] if missing else []


class _Rejections:
    """Counts the rejected rows of each set as windows are committed, and checks `data.max_rejected_share`."""

    def __init__(self, context: PrepareContext, planned: Sequence[int]) -> None:
        """planned: number of rows of each set that are read."""
        self._max_share = context.data.max_rejected_share
        self._names = [set_name(context.split, number, dataset) for number, dataset in enumerate(context.datasets)]
        self._sets = [SetRows() for _ in context.datasets]
        self._planned = planned

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


def _check_first_rows(context: PrepareContext, plan: Plan, sizes: KeptSizes | None) -> list[str]:
    """Check the first rows of a split (`check_first_rows`); returns the names of its loss sources.

    Bad rows do not stop the job here, but later, if at all.
    """
    encoder = context.encoder(context.data.lenient, SizeCache(sizes.known) if sizes else None)
    pieces = [piece for number in range(len(context.datasets)) for piece in _first_pieces(plan, number)]
    sources = check_first_rows(
        encoder, context.labels(), pieces, split=context.split,
        some_good=context.data.max_rejected_share < 1,
    )  # fmt: skip
    return [source.value for source in sources]


def _first_pieces(plan: Plan, dataset: int) -> Iterator[Piece]:
    """The pieces that hold the first rows of a set, also where most of its first lines are blank."""
    rows = 0
    for piece in plan.set_pieces(dataset):
        yield piece
        rows += piece.num_taken
        if rows >= 16 * FIRST_ROWS:
            return


def _marked(plan: Plan, windows: Sequence[int], count: int, duplicates: DuplicateRows | None) -> Iterator[Chunk]:
    """The chunks of some windows, with the rows whose id an earlier row has, and with those drawn for comparison with
    the real processor, `count` of all; deterministic for equal input."""
    drawn = sorted(random.Random(0).sample(range(plan.num_rows), min(count, plan.num_rows)))
    for chunk in plan.chunks(windows):
        first, last = (bisect.bisect_left(drawn, row) for row in (chunk.first_row, chunk.first_row + chunk.num_rows))
        yield replace(
            chunk,
            verify=tuple(row - chunk.first_row for row in drawn[first:last]),
            duplicates=duplicates.in_chunk(chunk) if duplicates else (),
        )
