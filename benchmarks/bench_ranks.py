"""One driver and many ranks: what the graph that feeds them costs the process that schedules it, and where it bends.

The graph, the split, the label actor and each rank's checks of its batches are the real ones. The ranks are threads of
8 processes; they have no model: each takes its batches, and answers polls, as Ray Train's controller asks each of its
workers once a second. What is counted is CPU time and memory of the process that schedules the graph, and of the one
that polls: seconds here would be those of a machine that also renders for all ranks.
"""

import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from benchmarks.bench_ingest import ingest_of
from benchmarks.common import Result
from benchmarks.page_jobs import Pages, local_ray
from pipelines.ingest import Feed, Ingest

PROCESSES = 8
MANY, FEW = 256, 16
SHARES = 3_072
"""Shares that are dealt in all, by the number of ranks: each takes fewer when there are more."""
POLLS = 20


@ray.remote(num_cpus=0)
class Ranks:
    """Some ranks, as threads of one process."""

    def __init__(self, ranks: list[int], ingest: Ingest, start: int, stop: int) -> None:
        self._ranks, self._ingest, self._range = ranks, ingest, (start, stop)
        self._taken = dict.fromkeys(ranks, 0)

    def take(self, feeds: list[Feed]) -> int:
        """Takes all steps of all its ranks, each checked against the schedule; returns the number of micro-batches."""

        def rank(number: int, feed: Feed) -> None:
            for batches in self._ingest.receive(feed, number, *self._range):
                self._taken[number] += len(batches)

        with ThreadPoolExecutor(len(self._ranks)) as threads:
            list(threads.map(rank, self._ranks, feeds))
        return sum(self._taken.values())

    def poll(self, rank: int) -> int:
        """The micro-batches that a rank has taken."""
        return self._taken[rank]


class Watched:
    """CPU time and memory of the process that schedules the graph, sampled while it runs."""

    def __init__(self) -> None:
        self._process: psutil.Process | None = None
        self.megabytes: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            if self._process is None:
                self._process = coordinator()
            if self._process is not None:
                self.megabytes.append(self._process.memory_info().rss / 1e6)

    def close(self) -> float:
        """Ends; returns the CPU seconds of the process, its start and imports too."""
        assert self._process is not None
        times = self._process.cpu_times()
        self._ended.set()
        self._thread.join()
        return float(times.user + times.system)


def coordinator() -> psutil.Process | None:
    """The process that schedules the newest split."""
    found = [process for process in psutil.process_iter(["cmdline", "create_time"])
             if "SplitCoordinator" in " ".join(process.info["cmdline"] or [])]  # fmt: skip
    return max(found, key=lambda process: process.info["create_time"], default=None)


def run() -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        pages = Pages(Path(folder))
        texts = [row | {"text": row["text"].replace("<image>", "")[:400], "images": []} for row in pages.rows]
        job = pages.job("texts", texts, 2048, window_rows=2048, token_capacity=512)
        with local_ray():
            few, many, double = (taken(ingest_of(job, ranks), ranks, shares) for ranks, shares in
                                 ((FEW, SHARES), (MANY, SHARES), (MANY, 2 * SHARES)))  # fmt: skip
            polled = polls(ingest_of(job, MANY))
    share = 1e3 * (double.cpu - many.cpu) / SHARES
    share_few = 1e3 * few.cpu / SHARES
    growth = (max(double.megabytes) - max(many.megabytes)) / SHARES * 1000
    return [
        Result(
            name=f"CPU of the graph's scheduler for a share, {MANY} ranks against {FEW}", ratio=share / share_few,
            goal=1.5, lower_is_better=True,
            explanation=f"{share:.1f} ms a share in the second {SHARES:,} of {MANY} ranks, {share_few:.1f} ms with the "
            f"start among {FEW}: it bends at {1000 / share:.0f} shares a second, of up to 32 micro-batches each: "
            f"{MANY} ranks then get a share every {MANY * share / 1000:.1f} s",
        ),
        Result(
            name=f"memory of the graph's scheduler, {2 * SHARES:,} shares against {SHARES:,}, {MANY} ranks",
            ratio=max(double.megabytes) / max(many.megabytes), goal=1.2, lower_is_better=True,
            explanation=f"{max(double.megabytes):.0f} MB against {max(many.megabytes):.0f}: {growth:.0f} kB a share, "
            "and a graph ends after 32,768",
        ),
        Result(
            name=f"CPU of polling {MANY} ranks once, against 1 s", ratio=polled, goal=0.1, lower_is_better=True,
            explanation=f"{1e3 * polled:.0f} ms: a call to each rank, as Ray Train's controller makes one each second",
        ),
    ]  # fmt: skip


class Taken:
    """What it cost to bring ranks their batches."""

    def __init__(self, cpu: float, megabytes: list[float]) -> None:
        self.cpu, self.megabytes = cpu, megabytes


def ranks_of(ingest: Ingest, world_size: int, steps: int) -> tuple[list[Any], list[list[int]]]:
    parts = [part.tolist() for part in np.array_split(np.arange(world_size), PROCESSES)]
    return [Ranks.options(max_concurrency=3).remote(part, ingest, 0, steps) for part in parts], parts


def taken(ingest: Ingest, world_size: int, shares: int) -> Taken:
    """Deals shares to ranks that only take them."""
    ingest.per_share = 1
    steps = shares // world_size
    actors, parts = ranks_of(ingest, world_size, steps)
    watched = Watched()
    feeds = ingest.split(0, steps)
    counts = ray.get([actor.take.remote([feeds[rank] for rank in part]) for actor, part in zip(actors, parts)])
    assert sum(counts) == steps * world_size, counts
    result = Taken(watched.close(), watched.megabytes)
    for actor in actors:
        ray.kill(actor)
    return result


def polls(ingest: Ingest) -> float:
    """CPU seconds of this process for asking all ranks once."""
    actors, parts = ranks_of(ingest, MANY, 1)

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
