"""A run of 10^6 steps in its records: reading them for a report, continuing after them, sending them to a store.

What is timed is CPU time, in processes of their own, whose memory is counted beside that of a run of 10 steps. The
schedule's part is a mixture on 4,096 ranks: one rank's bins of a step, computed by each rank for itself.
"""

import functools
import json
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from benchmarks.common import Result, best_seconds
from mmray.run import log_pieces
from mmray.run.folder import PUBLISH_SECONDS
from mmray.run.log_pieces import SentLog, publish_log
from mmray.schedule.mixture import MixedDataset, MixedSchedule, Mixture
from mmray.storage import Folder

STEPS = 10**6
BINS, RANKS = 64, 16
CHECKPOINT_STEPS = 500
GOAL_SECONDS, GOAL_MEGABYTES = 15.0, 300.0
SENT_STEPS = 20_000
STEPS_A_PUBLICATION = 5
"""Steps of 3 s between two publications."""

REPORT = """
from mmray.report import Run, run_table
from mmray.report.run_page import run_page
run = Run(folder)
run_table(run)
assert len(run_page(run)) > 10_000
assert len(run.steps) == steps
"""
TRACE = """
from mmray.training.bins_log import TrainedLog
log = TrainedLog(folder)
assert len(log) == steps and log.get(steps).step == steps
"""
RESUME = """
from pathlib import Path
from mmray.run.metrics import MetricsLog
from mmray.run.skipped import SkippedLog
from mmray.run.tracking import TrackedRun
from mmray.training.json_lines import JsonLines
folder = Path(folder)
MetricsLog(TrackedRun("benchmark", folder, {}, None), steps).close()
SkippedLog(folder, steps, 0.01)
JsonLines(folder / "trained.jsonl").close()
"""
MEASURED = """
import resource, sys, time
folder, steps = sys.argv[1], int(sys.argv[2])
{imports}
began = time.process_time()
{work}
print(time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
"""


def run() -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        long, short = Path(folder) / "long", Path(folder) / "short"
        write_run(long, STEPS)
        write_run(short, 10)
        megabytes = sum(path.stat().st_size for path in long.iterdir()) / 1e6
        results = [
            *reading("report", REPORT, long, short, f"table and page; records of {megabytes:,.0f} MB"),
            *reading("trace", TRACE, long, short, "trained.jsonl, to the last step"),
            *reading("resume", RESUME, long, short, "what rank 0 reads before its first step"),
        ]
    return [*results, sending(), mixture_on_many_ranks()]


def write_run(folder: Path, steps: int) -> None:
    """The records of a run as rank 0 writes them."""
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "trained.jsonl").open("w") as trained:
        for step in range(1, steps + 1):
            metrics.write(json.dumps(metrics_line(step)) + "\n")
            bins = [[(step * BINS + rank * 4 + place) % 10**8 for place in range(4)] for rank in range(RANKS)]
            line = {"step": step, "data": "9f0c3a5e7d1b2468", "workers": RANKS, "bins": bins}
            trained.write(json.dumps(line) + "\n")
    with (folder / "history.jsonl").open("w") as history:
        event = {"time": "2026-11-30T12:00:00+00:00", "workers": RANKS}
        history.write(json.dumps(event | {"event": "start", "step": 0}) + "\n")
        for step in range(CHECKPOINT_STEPS, steps + 1, CHECKPOINT_STEPS):
            values = {"event": "checkpoint", "step": step, "name": f"checkpoint_{step:08d}_3f2a1b4c", "seconds": 2.5}
            history.write(json.dumps(event | values) + "\n")


def metrics_line(step: int) -> dict[str, float]:
    return {
        "step": step, "epoch": round(step / 31_250, 6), "loss": 1.8 + 1 / step, "tokens": 900_000 + step % 7919,
        "trained_tokens": 310_000 + step % 3571, "bins": BINS, "workers": RANKS, "samples": 310 + step % 11,
        "skipped_samples": int(step % 9973 == 0), "lr": 1e-5 * (1 - step / 2e6), "grad_norm": 0.7 + 1 / (step % 97 + 1),
        "step_seconds": 3.0123456789 + step % 13 / 100, "data_wait_seconds": 0.001234567,
    }  # fmt: skip


def reading(name: str, work: str, long: Path, short: Path, what: str) -> list[Result]:
    (seconds, most), (_, least) = (measured(work, folder, steps) for folder, steps in ((long, STEPS), (short, 10)))
    return [
        Result(
            name=f"{name} of 10^6 steps, CPU time against {GOAL_SECONDS:.0f} s", ratio=seconds / GOAL_SECONDS, goal=1.0,
            lower_is_better=True, explanation=f"{seconds:.1f} s: {what}",
        ),
        Result(
            name=f"{name} of 10^6 steps, memory against {GOAL_MEGABYTES:.0f} MB",
            ratio=(most - least) / GOAL_MEGABYTES, goal=1.0, lower_is_better=True,
            explanation=f"{most:,.0f} MB at most, {least:,.0f} MB for 10 steps",
        ),
    ]  # fmt: skip


def measured(work: str, folder: Path, steps: int) -> tuple[float, float]:
    """CPU seconds of some work in a process of its own, without imports, and the most megabytes that it had."""
    imports = "\n".join(line for line in work.splitlines() if line.startswith("from "))
    rest = "\n".join(line for line in work.splitlines() if not line.startswith("from "))
    code = MEASURED.format(imports=imports, work=rest)
    command = [sys.executable, "-c", code, str(folder), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split()[-2:])
    return seconds, megabytes


class CountedFolder(Folder):
    """A store in memory that counts what it is sent."""

    sent = 0

    def write(self, name: str, data: bytes) -> None:
        type(self).sent += len(data)
        super().write(name, data)


def sending() -> Result:
    """The bytes that a growing log sends to a store, in pieces against whole."""
    store, sent, whole = CountedFolder(f"memory://{uuid.uuid4().hex}"), SentLog(), 0
    CountedFolder.sent = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "metrics.jsonl"
        with place.open("w") as file:
            for step in range(1, SENT_STEPS + 1):
                file.write(json.dumps(metrics_line(step)) + "\n")
                if step % STEPS_A_PUBLICATION == 0:
                    file.flush()
                    publish_log(store, place, "metrics.jsonl", sent)
                    whole += place.stat().st_size
        size = place.stat().st_size
    piece = log_pieces.PIECE_BYTES / 1e6
    line = size / SENT_STEPS
    long_whole = line * STEPS**2 / STEPS_A_PUBLICATION / 2
    long_pieces = STEPS / STEPS_A_PUBLICATION * piece * 1e6 / 2
    return Result(
        name=f"bytes of metrics.jsonl sent to a store, whole against in pieces, {SENT_STEPS:,} steps",
        ratio=whole / CountedFolder.sent,
        explanation=f"{whole / 1e9:.1f} GB against {CountedFolder.sent / 1e9:.1f} GB, a publication every "
        f"{PUBLISH_SECONDS} s at 3 s a step, pieces of {piece:.0f} MB. 10^6 steps: {long_whole / 1e12:.0f} TB whole, "
        f"{long_pieces / 1e12:.2f} TB in pieces",
        goal=2.0,
    )  # fmt: skip


def mixture_on_many_ranks() -> Result:
    """One rank's bins of a step of a mixture: 4,096 ranks against 8, a bin each."""
    datasets = tuple(MixedDataset("", str(n), f"benchmark {n}", 10**9 // 64, 1 + n % 7) for n in range(64))

    def work(ranks: int) -> object:
        return MixedSchedule(Mixture(datasets), ranks, seed=0).rank_bins(10**5, ranks - 1, ranks, 1)

    few, many = (best_seconds(functools.partial(work, ranks), 3, clock=time.process_time) for ranks in (8, 4096))
    return Result(
        name="one rank's bins of step 10^5, a mixture of 64 datasets on 4,096 ranks against 8", ratio=many / few,
        explanation=f"{1e3 * many:.1f} ms against {1e3 * few:.1f} ms to build the schedule and compute them; 10^9 bins",
        lower_is_better=True, goal=512.0,
    )  # fmt: skip
