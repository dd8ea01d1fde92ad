"""A prepared dataset to the micro-batches of each rank, through Ray Data, in schedule order.

    places ─ Render (CPU actors: read bins, decode, tile) ─ Mask (GPU actors: labels, positions) ─ streaming_split

One block is one row is one micro-batch of one rank. With order kept, `streaming_split(equal=True)` deals blocks round
robin, so places are listed rank by rank within each micro-batch, and rank r receives just its own. Every worker checks
the place and the bins of what it receives against the schedule: a mismatch is an error, never a silent reorder.

The graph is built in segments of some thousand micro-batches, so that starting at step 1,000,000 costs what starting
at step 0 costs, and memory does not grow with the length of a run.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
import torch

from mmray.batch import Masked, MicroBatch, Place, Rendered, from_table, mask, to_table
from mmray.config import ResourceSettings
from mmray.errors import UserError
from mmray.families import Family
from mmray.loader import BatchMaker, BatchPlan
from pipelines.dataset import ERROR, one_row_blocks

SEGMENT_MICRO_BATCHES = 8192
"""Micro-batches, over all ranks, of one Ray Data execution: building its source takes 1 ms each."""


class Render:
    """Actor: one micro-batch with its pictures decoded."""

    def __init__(self, plan: BatchPlan) -> None:
        torch.set_num_threads(1)
        self.maker = BatchMaker(plan)

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        place = Place(int(batch["step"][0]), int(batch["rank"][0]), int(batch["micro"][0]))
        try:
            return to_table(self.maker.render(place))
        except UserError as error:
            return pa.table({ERROR: [str(error)]})


class Mask:
    """Actor: labels and positions of one micro-batch, on `device`."""

    def __init__(self, plan: BatchPlan, device: str) -> None:
        torch.set_num_threads(1)
        self.maker = BatchMaker(plan, device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        if ERROR in batch.column_names:
            return batch
        rendered = from_table(Rendered, batch)
        return to_table(mask(rendered, self.maker.family, self.maker.labels, self.maker.device))


def places(plan: BatchPlan, start: int, stop: int) -> list[Place]:
    """All micro-batches of steps [start, stop), in the order in which they are dealt to the ranks."""
    return [
        Place(step, rank, micro)
        for step in range(start, stop)
        for micro in range(plan.micro_batches)
        for rank in range(plan.world_size)
    ]


def segments(plan: BatchPlan, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Ranges of steps that together cover [start, stop), each run by one Ray Data execution."""
    steps = max(1, SEGMENT_MICRO_BATCHES // (plan.micro_batches * plan.world_size))
    for first in range(start, stop, steps):
        yield first, min(first + steps, stop)


def split(plan: BatchPlan, start: int, stop: int, resources: ResourceSettings, gpus: bool) -> list[Any]:
    """The iterators of all ranks over steps [start, stop). gpus: mask actors take a share of a GPU."""
    rows = [{"step": each.step, "rank": each.rank, "micro": each.micro} for each in places(plan, start, stop)]
    dataset = one_row_blocks(rows)
    dataset = dataset.map_batches(
        Render, batch_size=1, fn_constructor_args=(plan,), num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=min(resources.render_actors, len(rows))),
    )  # fmt: skip
    share = {"num_gpus": resources.gpu_share} if gpus else {"num_cpus": 1}
    dataset = dataset.map_batches(
        Mask, batch_size=None, batch_format="pyarrow", **share,
        fn_constructor_args=(plan, "cuda" if gpus else "cpu"),
        compute=ray.data.ActorPoolStrategy(size=min(resources.mask_actors, len(rows))),
    )  # fmt: skip
    return list(dataset.streaming_split(plan.world_size, equal=True))


def receive(
    shard: Any, plan: BatchPlan, family: Family, rank: int, start: int, stop: int
) -> Iterator[list[MicroBatch]]:
    """One rank's micro-batches, step by step, each checked against the schedule.

    Raises UserError for a row that cannot be rendered, RuntimeError for a batch that is not the expected one.
    """
    tables = iter(shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
    for step in range(start, stop):
        batches = []
        for micro in range(plan.micro_batches):
            batch = MicroBatch(from_table(Masked, _next(tables, step)), family)
            _check(batch, plan, Place(step, rank, micro))
            batches.append(batch)
        yield batches


def _next(tables: Iterator[pa.Table], step: int) -> pa.Table:
    table = next(tables, None)
    if table is None or table.num_rows != 1:
        found = "no more batches" if table is None else f"a block of {table.num_rows} batches"
        raise RuntimeError(f"step {step}: the data stream gave {found}")
    if ERROR in table.column_names:
        raise UserError(table[ERROR][0].as_py())
    return table


def _check(batch: MicroBatch, plan: BatchPlan, expected: Place) -> None:
    bins = [number for number in plan.bins(expected) if number is not None]
    if batch.place != expected or batch.bins != bins:
        raise RuntimeError(f"expected {expected} with bins {bins}, received {batch.place} with bins {batch.bins}")
