"""What Ray's share of feeding a run costs: the wait of a step, the start, and what is spent on each micro-batch.

Two ranks read real bins through real render and mask actors, one of each; a training step is a sleep of one second.
"""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import Result
from benchmarks.page_jobs import Pages, local_ray
from mmray.batches.plan import BatchMaker, BatchPlan
from mmray.config.job import Job
from mmray.prepared.driver import prepare
from mmray.schedule.schedule import Schedule
from pipelines.ingest import Ingest

RANKS = 2
STEP_SECONDS = 1.0
STEPS = 6
FAR = 1_000_000
SMALL_STEPS = 100
GOAL_WAIT = 0.02
GOAL_START = 1.3
"""Of two starts; each is some seconds of importing, in processes that come up side by side."""


class Run:
    """A graph over some steps, read by RANKS ranks at once."""

    def __init__(self, ingest: Ingest, start: int, steps: int) -> None:
        began = time.perf_counter()
        shards = ingest.split(start, start + steps)
        self.streams = [ingest.receive(shard, rank, start, start + steps) for rank, shard in enumerate(shards)]
        self.ranks = ThreadPoolExecutor(RANKS)
        list(self.ranks.map(next, self.streams))
        self.start_seconds = time.perf_counter() - began

    def waited(self, steps: int, step_seconds: float) -> float:
        """Seconds for which a rank waits at that many steps together, after the first; the slower one's."""

        def rank(stream: Any) -> float:
            total = 0.0
            for _ in range(steps):
                time.sleep(step_seconds)
                began = time.perf_counter()
                next(stream)
                total += time.perf_counter() - began
            return total

        return max(self.ranks.map(rank, self.streams))

    def close(self) -> None:
        for stream in self.streams:
            stream.close()
        self.ranks.shutdown()


def ingest_of(job: Job, ranks: int = RANKS) -> Ingest:
    """The graph of a job for a number of ranks, a bin each in every step."""
    dataset, _ = prepare(job)
    plan = BatchPlan(
        prepared=dataset.path, processor=job.model.processor_source, model_type=None, trust_remote_code=False,
        loss=job.loss, micro_batch_bins=1, world_size=ranks,
        schedule=Schedule(len(dataset), global_batch_bins=ranks, seed=0, fingerprint=dataset.fingerprint),
    )  # fmt: skip
    ingest = Ingest(BatchMaker(plan), job.resources, gpus=False)
    ingest.maker.family  # noqa: B018  (every worker has it before its data begin)
    return ingest


def run() -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        pages = Pages(Path(folder))
        job = pages.job("pages", pages.rows, 256, window_rows=256)
        texts = [
            row | {"text": f"A page. {row['text'][:1500]}".replace("<image>", ""), "images": []} for row in pages.rows
        ]
        small_job = pages.job("small", texts, 512, window_rows=512, token_capacity=512)
        large, small = ingest_of(job), ingest_of(small_job)
        with local_ray():
            return [of_steps(large, pages.name), *of_small(small)]


def of_steps(ingest: Ingest, data: str) -> Result:
    run = Run(ingest, 0, FAR)
    share = run.waited(STEPS, STEP_SECONDS) / STEPS / STEP_SECONDS
    run.close()
    return Result(
        name=f"wait for data of a step, {RANKS} ranks, {data}", ratio=share, goal=GOAL_WAIT, lower_is_better=True,
        explanation=f"{1000 * share * STEP_SECONDS:.1f} ms of {STEP_SECONDS:.0f} s, mean of {STEPS} steps",
    )  # fmt: skip


def of_small(ingest: Ingest) -> list[Result]:
    """What a small micro-batch costs, alone in its block and together with others, and the starts at two places.
    Another graph has run before: files are in memory."""
    per_share = ingest.per_share

    def measured(count: int, start: int) -> tuple[float, float]:
        ingest.per_share = count
        run = Run(ingest, start, FAR)
        cost = 1000 * run.waited(SMALL_STEPS - 1, 0) / (SMALL_STEPS - 1) / RANKS
        run.close()
        return run.start_seconds, cost

    near, alone = measured(1, 0)
    far, together = measured(per_share, FAR)
    began = time.perf_counter()
    for _ in ingest.maker.steps(0, 0, SMALL_STEPS):
        pass
    here = 1000 * (time.perf_counter() - began) / SMALL_STEPS
    return [
        Result(
            name=f"resume to first step at step {FAR:,} against step 0", ratio=far / near,
            explanation=f"{far:.1f} s, with {per_share} micro-batches to make, against {near:.1f} s, with one, from "
            "split to the first batch of both ranks",
            goal=GOAL_START, lower_is_better=True,
        ),
        Result(
            name="small micro-batches, several in a block against one", ratio=alone / together, goal=2.0,
            explanation=f"{alone:.1f} ms a micro-batch alone, {together:.1f} ms as one of {per_share}; "
            f"{here:.1f} ms to make it, without Ray",
        ),
    ]  # fmt: skip
