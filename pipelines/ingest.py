"""Turns a prepared dataset into the micro-batches of each rank, through Ray Data, in schedule order.

    shares ─ Render (CPU actors: read bins, decode, tile) ─ streaming_split ─ the rank
                                                                               │ ids, lengths, sizes: 2 % of the bytes
                                                            Mask (actors on shares of GPUs: labels, positions)

A share is one or more consecutive micro-batches of one rank; one share is one row is one block. With order kept,
`streaming_split(equal=True)` deals blocks round robin, so shares are listed rank by rank, and rank r receives just its
own. Every worker checks the place and the bins of what it receives against the schedule: a mismatch is an error, never
a silent reorder.

Pictures go through the object store once, from the actor that decodes them to the rank. The rank, on a thread that is a
step ahead, sends what labels and positions are computed from (`Layout`) to a label actor, and puts the answer beside
the pictures. Each GPU that trains has a label actor on a small share of it (`gpu_share`), so that no rank is slower
than the others; where none trains, or `gpu_share` is 0, label actors use CPUs and the compiled scan.

Ray spends 8 to 16 ms on each block, the more the more ranks there are, whatever is in it, so small micro-batches travel
together (`per_share`). Shares are listed lazily, so that the first batch comes as soon at step 1,000,000, and of a long
run, as at step 0 of a short one. A graph still ends after `SEGMENT_SHARES` and another is built, which takes as long as
its actors' start: Ray 2.60 keeps some notes of every block as long as a graph runs.
"""

import bisect
import itertools
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import Dataset

from mmray.batches.micro_batch import (
    Layout,
    Masked,
    MicroBatch,
    Place,
    from_table,
    labelled,
    to_table,
)
from mmray.batches.plan import BatchMaker, BatchPlan
from mmray.config.resources import ResourceSettings, TileCacheSettings
from mmray.errors import PassingError, UserError
from mmray.families import Tile
from mmray.prepared.arrow import binary_cell
from mmray.run.evaluation.in_training import EvaluationPlans, TextMaker, batch_maker
from mmray.run.warnings import keep_warnings
from pipelines.dataset import ERROR, MaskActor, PickledActor, RenderActor, numbers
from pipelines.measures import StageClock, clocked

PASSES = "passes"
"""Column beside ERROR that tells whether the error is a PassingError."""

PICTURE = "picture"
"""Column of a row that is read: its first image as a small JPEG."""

TEXTS_PER_SHARE = 4
"""Most micro-batches of a share of an evaluation: several actors work while the model waits."""

SEGMENT_SHARES = 32_768
"""Number of shares, over all ranks, of one Ray Data execution. Measured: the process that schedules it grows by 5 to 9
kB a share, so by 0.3 GB at most."""

SHARE_BYTES = 2 << 20
"""Bytes that a share should at least hold: rendering that much takes longer than Ray takes for a block."""

LABEL_RESTARTS = 3
"""Number of times that a label actor whose process died is started again; then its rank fails, and training
restarts."""

RANKS_PER_MICRO_BATCH = 8
"""Number of ranks for each of which a share holds a micro-batch more, whatever its bytes: one process schedules the
shares of all ranks, some milliseconds each, so that their number a second must not grow with the ranks."""

MOST_PER_SHARE = 32
"""The most micro-batches of one share: one actor makes all of a share, while its rank waits for the first."""


@dataclass(frozen=True)
class Shares:
    """Steps [start, stop) of a plan in shares of `per_share` micro-batches; share k is for rank k % world_size."""

    plan: BatchPlan
    start: int
    stop: int
    per_share: int

    def __len__(self) -> int:
        return -(-(self.stop - self.start) * self.plan.micro_batches // self.per_share) * self.plan.world_size

    def places(self, number: int) -> list[Place]:
        """The places of the micro-batches of one share."""
        turn, rank = divmod(number, self.plan.world_size)
        first = self.start * self.plan.micro_batches + turn * self.per_share
        end = min(first + self.per_share, self.stop * self.plan.micro_batches)
        counted = (divmod(position, self.plan.micro_batches) for position in range(first, end))
        return [Place(step, rank, micro) for step, micro in counted]


@dataclass(frozen=True)
class Stream:
    """The shares of one Ray Data execution: those of training, and between its steps those of evaluations.

    All parts have the same number of ranks, so that share k of the stream is for rank k % world_size, too.
    """

    parts: tuple[Shares, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def part(self, number: int) -> tuple[Shares, int]:
        """The part of a share, and the share's number in it."""
        place = bisect.bisect_right(self._ends, number)
        return self.parts[place], number - (self._ends[place] - len(self.parts[place]))


class Render:
    """Actor that decodes the images of one share's micro-batches. warnings: file in which it keeps its warnings."""

    def __init__(self, stream: Stream, tile_cache: TileCacheSettings | None, warnings: str | None, job: str) -> None:
        torch.set_num_threads(1)
        if warnings:
            keep_warnings(warnings)
        self.stream, self.tile_cache = stream, tile_cache
        self.makers: dict[int, BatchMaker] = {}
        self.clock = StageClock("render", job)

    def maker(self, plan: BatchPlan) -> BatchMaker:
        """The maker of a plan's micro-batches. All plans of a stream are of one processor."""
        if id(plan) not in self.makers:
            self.makers[id(plan)] = batch_maker(plan, self.tile_cache)
        return self.makers[id(plan)]

    @clocked
    def __call__(self, share: pa.Table) -> pa.Table:
        shares, number = self.stream.part(share["number"][0].as_py())
        maker = self.maker(shares.plan)
        try:
            return joined([_rendered(maker, place) for place in shares.places(number)])
        except UserError as error:
            return pa.table({ERROR: [str(error)], PASSES: [isinstance(error, PassingError)]})


class Mask:
    """Actor that computes labels and positions of one share's micro-batches on `device`."""

    def __init__(self, plan: BatchPlan, device: str, job: str) -> None:
        torch.set_num_threads(1)
        self.maker = BatchMaker(plan, device)
        self.clock = StageClock("mask", job)

    @clocked
    def __call__(self, layouts: pa.Table) -> pa.Table:
        """The `Labelled` of each micro-batch, joined. layouts: the `Layout` of each, joined."""
        maker = self.maker
        return joined(
            [
                to_table(labelled(from_table(Layout, table), maker.family, maker.labels, maker.device))
                for table in parts(layouts)
            ]
        )


def _rendered(maker: BatchMaker, place: Place) -> pa.Table:
    """A micro-batch as a table; a row that is read comes with a small picture, for people."""
    table = to_table(maker.render(place))
    return table.append_column(PICTURE, binary_cell(maker.picture(place))) if isinstance(maker, TextMaker) else table


def joined(tables: list[pa.Table]) -> pa.Table:
    """Joins one-row tables into one row without copying: column `name` of table k becomes `k.name`."""
    columns = {f"{number}.{name}": table[name] for number, table in enumerate(tables) for name in table.column_names}
    return pa.table(columns)


def parts(share: pa.Table) -> list[pa.Table]:
    """The tables that `joined` joined."""
    columns: list[dict[str, pa.ChunkedArray]] = []
    for label in share.column_names:
        number, name = label.split(".", 1)
        if int(number) == len(columns):
            columns.append({})
        columns[int(number)][name] = share[label]
    return [pa.table(table_columns) for table_columns in columns]


def layouts_of(share: pa.Table) -> pa.Table:
    """Selects what a label actor needs of a rendered share: the columns of `Layout` of each of its micro-batches."""
    names = {field.name for field in fields(Layout)}
    return share.select([label for label in share.column_names if label.split(".", 1)[1] in names])


@dataclass(frozen=True)
class Feed:
    """The source of one rank's batches.

    shares: its iterator of the split; labels: the label actor that it asks.
    """

    shares: Any
    labels: Any

    def labelled(self, share: pa.Table) -> pa.Table:
        """A rendered share with the labels and positions of its micro-batches."""
        made: pa.Table = ray.get(self.labels.call.remote(layouts_of(share)))
        for name in made.column_names:
            share = share.append_column(name, made[name])
        return share


class Ingest:
    """The Ray Data graph that brings a plan's micro-batches to its ranks.

    gpus: whether ranks train on GPUs; warnings: file in which actors keep their warnings; job: the name
    under which they report their times to Prometheus.
    """

    def __init__(
        self,
        maker: BatchMaker,
        resources: ResourceSettings,
        gpus: bool,
        warnings: str | None = None,
        job: str = "",
        evaluation: EvaluationPlans | None = None,
    ) -> None:
        """evaluation: the evaluations whose batches come between the steps."""
        self.maker, self.plan, self.resources, self.gpus = maker, maker.plan, resources, gpus
        self.warnings, self.job, self.evaluation = warnings, job, evaluation

    @cached_property
    def per_share(self) -> int:
        """Number of micro-batches of a share, so that it holds about SHARE_BYTES, by the bins' mean numbers of tokens;
        more for many ranks."""
        family, statistics = self.maker.family, self.maker.prepared.statistics
        frames = family.dummy_frames
        sizes = tuple((frame.shape[1], frame.shape[0]) for frame in frames)
        features = max(1, family.feature_count(Tile(0, family.dummy_size, sizes)))
        visual_bytes = sum(frame.nbytes for frame in frames) / features
        token_bytes = 4 + 1 + 8 + 8 * 3  # its id, whether it is given, its label, its positions
        total = statistics["tokens"] * token_bytes + statistics["visual_tokens"] * visual_bytes
        mean = max(1.0, total / len(self.maker.prepared) * self.plan.micro_batch_bins)
        least = self.plan.world_size / RANKS_PER_MICRO_BATCH
        return int(np.clip(max(SHARE_BYTES / mean, least), 1, MOST_PER_SHARE))

    def segments(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Ranges of steps that together cover [start, stop), each run by one Ray Data execution."""
        steps = max(1, SEGMENT_SHARES * self.per_share // (self.plan.micro_batches * self.plan.world_size))
        for first in range(start, stop, steps):
            yield first, min(first + steps, stop)

    def stream(self, start: int, stop: int) -> Stream:
        """The shares of steps [start, stop), with those of the evaluations that are due after them."""
        parts, first = [], start
        for step in range(start + 1, stop + 1) if self.evaluation is not None else ():
            if self.evaluation is not None and self.evaluation.is_due(step):
                parts += [Shares(self.plan, first, step, self.per_share), *self._evaluation_shares]
                first = step
        return Stream((*parts, *([Shares(self.plan, first, stop, self.per_share)] if first < stop else [])))

    @cached_property
    def _evaluation_shares(self) -> list[Shares]:
        """The shares of one evaluation. Equal plans are one object: an actor opens each once."""
        assert self.evaluation is not None
        return [Shares(plan, 0, steps, min(self.per_share, TEXTS_PER_SHARE)) for plan, steps in self.evaluation.parts]

    @cached_property
    def _label_actors(self) -> list[Any]:
        """The label actors, started by the first split, for all of them."""
        resources, on_gpu = self.resources, self.resources.labels_on_gpus(self.gpus)
        make = partial(Mask, self.plan, "cuda" if on_gpu else "cpu", self.job)
        needs: dict[str, Any] = {"num_gpus": resources.gpu_share, "num_cpus": 0} if on_gpu else {"num_cpus": 1}
        actor = ray.remote(MaskActor).options(
            max_restarts=LABEL_RESTARTS, max_task_retries=-1, scheduling_strategy="SPREAD",
            label_selector=dict(resources.train_labels) or None, **needs,
        )  # fmt: skip
        count = self.plan.world_size if on_gpu else min(resources.mask_actors, self.plan.world_size)
        return [actor.remote(pickle.dumps(make)) for _ in range(count)]

    def split(self, start: int, stop: int) -> list[Feed]:
        """Builds the graph of steps [start, stop); returns the feeds of all ranks, for `receive`."""
        resources, shares = self.resources, self.stream(start, stop)
        render = partial(Render, shares, resources.tile_cache, self.warnings, self.job)
        dataset = numbers(len(shares), resources.train_labels)
        dataset = _map(dataset, RenderActor, render, min(resources.render_actors, len(shares)), num_cpus=1)
        iterators = dataset.streaming_split(self.plan.world_size, equal=True)
        label_actors = self._label_actors
        return [Feed(shares, label_actors[rank % len(label_actors)]) for rank, shares in enumerate(iterators)]

    def receive(self, feed: Feed, rank: int, start: int, stop: int) -> Iterator[list[MicroBatch]]:
        """Yields one rank's micro-batches, step by step, each checked against the schedule. feed: the rank's, of
        `split`.

        Raises UserError for a row that cannot be rendered, RuntimeError for a batch that is not the expected one.
        """
        received = Received(self, feed, rank, start, stop)
        for part in received.parts:
            for batches in received.steps(part):
                if part.plan is self.plan:
                    yield [batch for batch, _ in batches]


class Received:
    """One rank's part of a stream: the micro-batches of its parts, which are taken in order."""

    def __init__(self, ingest: Ingest, feed: Feed, rank: int, start: int, stop: int) -> None:
        """Opens the rank's feed of `Ingest.split`."""
        self.parts = ingest.stream(start, stop).parts
        self._family, self._rank, self._feed = ingest.maker.family, rank, feed
        self._shares = iter(feed.shares.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))

    def steps(self, part: Shares) -> Iterator[list[tuple[MicroBatch, bytes]]]:
        """Yields the micro-batches of a part, step by step, each checked against its plan; with the picture of a row
        that is read, which is empty for any other."""
        waiting: deque[pa.Table] = deque()
        for step in range(part.start, part.stop):
            batches = []
            for micro in range(part.plan.micro_batches):
                if not waiting:
                    waiting.extend(parts(self._feed.labelled(_next(self._shares, step))))
                table = waiting.popleft()
                batch = MicroBatch(from_table(Masked, table), self._family)
                _check(batch, Place(step, self._rank, micro), part.plan)
                picture = table[PICTURE][0].as_py() if PICTURE in table.column_names else b""
                batches.append((batch, picture))
            yield batches


def _check(batch: MicroBatch, expected: Place, plan: BatchPlan) -> None:
    bins = [number for number in plan.bins(expected) if number is not None]
    if batch.place != expected or batch.bins != bins:
        raise RuntimeError(f"expected {expected} with bins {bins}, received {batch.place} with bins {batch.bins}")


def _map(dataset: Dataset, kind: type[PickledActor], make: Callable[[], Any], actors: int, **resources: Any) -> Dataset:
    """Passes each block through one of `actors` actors, each with the callable that `make()` returns."""
    return dataset.map_batches(
        kind, batch_size=None, batch_format="pyarrow", fn_constructor_args=(pickle.dumps(make),),
        compute=ray.data.ActorPoolStrategy(size=actors), **resources,
    )  # fmt: skip


def _next(shares: Iterator[pa.Table], step: int) -> pa.Table:
    share = next(shares, None)
    if share is None or share.num_rows != 1:
        received = "no more batches" if share is None else f"a block of {share.num_rows} rows"
        raise RuntimeError(f"step {step}: the data stream gave {received}")
    if ERROR in share.column_names:
        kind = PassingError if share[PASSES][0].as_py() else UserError
        raise kind(share[ERROR][0].as_py())
    return share
