"""One driver and many ranks: what the graph that feeds them costs the process that schedules it, and where it bends.

The graph, the split, the label actor and each rank's checks of its batches are the real ones. The ranks are threads of
8 processes; they have no model: each takes its batches, and answers polls, as Ray Train's controller asks each of its
workers once a second. What is counted is CPU time and memory of the process that schedules the graph, and of the one
that polls: seconds here would be those of a machine that also renders for all ranks.
"""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from benchmarks.bench_ingest import ingest_of
from benchmarks.common import Result
from benchmarks.page_jobs import Pages, local_ray
from mmray.config.job import Job
from pipelines.ingest import Feed

PROCESSES = 8
MANY, FEW = 256, 16
SHARES = 2_048
"""Shares that are dealt in all: each rank takes fewer when there are more of them."""
POLLS = 20


@ray.remote(num_cpus=0)
class Ranks:
    """Some ranks, as threads of one process."""

    def __init__(self, ranks: list[int], job: Job, world_size: int, steps: int) -> None:
        self._ranks, self._ingest, self._steps = ranks, ingest_of(job, world_size), steps
        self._taken = dict.fromkeys(ranks, 0)

    def take(self, feeds: list[Feed]) -> int:
        """Takes all steps of all its ranks, each checked against the schedule; returns the number of micro-batches."""

        def rank(number: int, feed: Feed) -> None:
            for batches in self._ingest.receive(feed, number, 0, self._steps):
                self._taken[number] += len(batches)

        with ThreadPoolExecutor(len(self._ranks)) as threads:
            list(threads.map(rank, self._ranks, feeds))
        return sum(self._taken.values())

    def count(self) -> int:
        """The micro-batches that all its ranks have taken."""
        return sum(self._taken.values())

    def poll(self, rank: int) -> int:
        """The micro-batches that a rank has taken."""
        return self._taken[rank]


@dataclass(frozen=True)
class Moment:
    """What the process that schedules the graph has used when so many shares had been taken."""

    shares: int
    cpu: float
    """Seconds, its start and imports too."""
    megabytes: float

    @classmethod
    def now(cls, shares: int) -> "Moment":
        process = coordinator()
        assert process is not None
        times = process.cpu_times()
        return cls(shares, times.user + times.system, process.memory_info().rss / 1e6)


def coordinator() -> psutil.Process | None:
    """The process that schedules the newest split."""
    found = [process for process in psutil.process_iter(["cmdline", "create_time"])
             if "SplitCoordinator" in " ".join(process.info["cmdline"] or [])]  # fmt: skip
    return max(found, key=lambda process: process.info["create_time"], default=None)


def run() -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        pages = Pages(Path(folder))
        texts = [
            row | {"text": f"A page. {row['text'][:400]}".replace("<image>", ""), "images": []} for row in pages.rows
        ]
        job = pages.job("texts", texts, 2048, window_rows=2048, token_capacity=512)
        with local_ray():
            few, many = (taken(job, ranks) for ranks in (FEW, MANY))
            polled = polls(job)
    share_few, share = (1e3 * (last.cpu - first.cpu) / (last.shares - first.shares) for first, last in (few, many))
    first, last = many
    growth = 1e3 * (last.megabytes - first.megabytes) / (last.shares - first.shares)
    return [
        Result(
            name=f"CPU of the graph's scheduler for a share, {MANY} ranks against {FEW}", ratio=share / share_few,
            goal=1.5, lower_is_better=True,
            explanation=f"{share:.1f} ms a share of {MANY} ranks, {share_few:.1f} of {FEW}, after the first of each: "
            f"it bends at {1000 / share:.0f} shares a second, of up to 32 micro-batches each; {MANY} ranks then get a "
            f"share every {MANY * share / 1000:.1f} s",
        ),
        Result(
            name=f"memory of the graph's scheduler after {SHARES:,} shares against the first {MANY}, {MANY} ranks",
            ratio=last.megabytes / first.megabytes, goal=1.2, lower_is_better=True,
            explanation=f"{last.megabytes:.0f} MB against {first.megabytes:.0f}: {growth:.0f} kB a share, and a graph "
            "ends after 32,768",
        ),
        Result(
            name=f"CPU of polling {MANY} ranks once, against 1 s", ratio=polled, goal=0.1, lower_is_better=True,
            explanation=f"{1e3 * polled:.0f} ms: a call to each rank, as Ray Train's controller makes one each second",
        ),
    ]  # fmt: skip


def ranks_of(job: Job, world_size: int, steps: int) -> tuple[list[Any], list[list[int]]]:
    parts = [part.tolist() for part in np.array_split(np.arange(world_size), PROCESSES)]
    return [Ranks.options(max_concurrency=3).remote(part, job, world_size, steps) for part in parts], parts


def taken(job: Job, world_size: int) -> tuple[Moment, Moment]:
    """Deals shares to ranks that only take them: when each rank may have its first, and when all have all."""
    ingest = ingest_of(job, world_size)
    ingest.per_share = 1
    steps = SHARES // world_size
    actors, parts = ranks_of(job, world_size, steps)
    feeds = ingest.split(0, steps)
    left = [actor.take.remote([feeds[rank] for rank in part]) for actor, part in zip(actors, parts)]
    first = None
    while left:
        _, left = ray.wait(left, num_returns=len(left), timeout=0.5)
        shares = sum(ray.get([actor.count.remote() for actor in actors]))
        if first is None and shares >= world_size:
            first = Moment.now(shares)
    last = Moment.now(shares)
    assert first is not None
    assert last.shares == steps * world_size
    for actor in actors:
        ray.kill(actor)
    return first, last


def polls(job: Job) -> float:
    """CPU seconds of this process for asking all ranks once."""
    actors, parts = ranks_of(job, MANY, 1)

    def ask() -> None:
        ray.get([actor.poll.remote(rank) for actor, part in zip(actors, parts) for rank in part])

    ask()
    began = time.process_time()
    for _ in range(POLLS):
        ask()
    seconds = (time.process_time() - began) / POLLS
    for actor in actors:
        ray.kill(actor)
    return seconds
