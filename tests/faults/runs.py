"""A training run as a person has one, with what it really trained on, to be disturbed."""

import json
import time
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from jobs.checks import open_prepared
from mmray.batches.plan import BatchPlan
from mmray.config.job import Job
from mmray.run.history import read_history
from mmray.run.plan import run_plan
from mmray.training.bins_log import read_trained
from mmray.training.json_lines import read_json_lines
from tests.conftest import Inputs
from tests.faults.machines import JobProcess, Machines, OneMachine, kill, wait_for

TARGETS = {
    "a train worker": "RayTrainWorker",
    "the render actor": "RenderActor",
    "the mask actor": "MaskActor",
    "the split coordinator": "SplitCoordinator",
    "the train controller": "TrainController",
}
"""What may be killed besides rank 0 and the driver, by the title of its process."""


@dataclass(frozen=True)
class Audit:
    """What a run trained on up to a step, against its schedule."""

    step: int
    lost: int
    doubled: int


class TrainingRun:
    """A job on machines. The driver is a process; it is started again by `start`, as a person would."""

    def __init__(
        self, machines: Machines | OneMachine, inputs: Inputs, folder: Path, name: str, **changes: Any
    ) -> None:
        self._machines, self.folder = machines, folder / name
        settings = {
            "training__checkpoint_every_steps": 5, "training__max_failures": 1000, "training__learning_rate": 2e-4,
            "output__run": str(self.folder / "run"), **changes,
        }  # fmt: skip
        self.content = inputs.job(folder, **settings)
        self.run = Path(self.job.output.run)
        self.driver: JobProcess | None = None

    @property
    def machines(self) -> Machines | OneMachine:
        """Where it runs, to break something there."""
        assert self._machines is not None
        return self._machines

    @property
    def _address(self) -> str | None:
        return self._machines.address if self._machines else None

    @cached_property
    def job(self) -> Job:
        return Job.model_validate(self.content)

    @cached_property
    def batches(self) -> BatchPlan:
        """The order that it must train in."""
        plan = run_plan(self.job, open_prepared(self.job), gpus=False)
        return plan.batches("train", plan.schedule, 1)

    def prepare(self) -> None:
        """Prepare the job's rows, once for all runs of a folder."""
        JobProcess("prepare", self.content, self.folder, self._address).succeed()

    def start(self, *options: str) -> JobProcess:
        """Start the driver, or start it again."""
        self.driver = JobProcess("train", self.content, self.folder, self._address, *options)
        return self.driver

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of its training steps."""
        lines = read_json_lines(self.run / "metrics.jsonl")
        return [line for line in lines if "loss" in line]

    @property
    def step(self) -> int:
        """The last step that is done; 0 where there is none."""
        lines = self.metrics
        return lines[-1]["step"] if lines else 0

    def reach(self, step: int) -> int:
        """Wait until a step is done, the driver running; the step that it is at then."""

        def there() -> int | None:
            now = self.step
            if now < step and self.driver is not None and self.driver.code is not None:
                raise RuntimeError(f"{self.driver.log} ended at step {now} of {step}:\n{self.driver.output[-4000:]}")
            return now if now >= step else None

        return int(wait_for(there, f"step {step} of {self.run}"))

    def reach_workers(self, count: int, steps: int = 12) -> None:
        """Wait until so many steps have been done by so many workers."""

        def there() -> bool:
            if self.driver is not None and self.driver.code is not None:
                raise RuntimeError(f"{self.driver.log} ended:\n{self.driver.output[-4000:]}")
            last = self.metrics[-steps:]
            return len(last) == steps and all(line["workers"] == count for line in last)

        wait_for(there, f"{count} workers of {self.run}")

    def finish(self) -> None:
        """Wait for its good end."""
        assert self.driver is not None
        self.driver.succeed(seconds=3600)

    def stop(self) -> None:
        """End it here; nothing more is expected of it."""
        assert self.driver is not None
        self.driver.kill()

    @property
    def rank_0(self) -> psutil.Process:
        """The worker that writes the metrics."""
        path = str(self.run / "metrics.jsonl")
        workers = self.machines.processes(TARGETS["a train worker"])
        return next(worker for worker in workers if path in [file.path for file in worker.open_files()])

    @property
    def other_rank(self) -> psutil.Process:
        """A worker that does not."""
        first = self.rank_0
        return next(each for each in self.machines.processes(TARGETS["a train worker"]) if each != first)

    def kill(self, target: str) -> None:
        """kill -9 of one of TARGETS: the newest, in case an old one is still ending."""
        kill(self.machines.processes(TARGETS[target])[-1])

    def audit(self) -> Audit:
        """Bins that should have trained and did not, or did more than once, in all steps so far."""
        trained = read_trained(self.run)
        lost = doubled = 0
        for number, step in enumerate(trained):
            assert step.step == number + 1, f"step {step.step} follows {number}"
            expected = Counter(each for each in self.batches.order.bins(number) if each is not None)
            seen = Counter(step.all_bins)
            lost += (expected - seen).total()
            doubled += (seen - expected).total()
        return Audit(len(trained), lost, doubled)

    def epochs(self) -> tuple[int, int]:
        """Whole epochs trained, and how many bins of them were not seen exactly once."""
        steps, length = read_trained(self.run), self.batches.schedule.steps_per_epoch
        every = set(range(len(self.batches.dataset)))
        epochs = [steps[first : first + length] for first in range(0, len(steps) - length + 1, length)]
        seen = [Counter(number for step in epoch for number in step.all_bins) for epoch in epochs]
        return len(epochs), sum(len(every - each.keys()) + (each - Counter(every)).total() for each in seen)

    def resumes(self) -> list[dict[str, Any]]:
        """The resumes of its history."""
        return [line for line in read_history(self.run) if line["event"] == "resume"]

    def note(self, **values: Any) -> None:
        """A line of what was done to it, for a person."""
        with (self.folder / "disturbed.jsonl").open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 1)} | values) + "\n")


def furthest_loss(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    """The largest relative difference of the losses of any step of two runs."""
    assert [line["step"] for line in ours] == [line["step"] for line in theirs][: len(ours)]
    return max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours, theirs))


def steps_done_again(run: TrainingRun) -> int:
    """Steps that were trained more than once, counted each time."""
    lines = (run.run / "trained.jsonl").read_bytes().count(b"\n")
    return lines - run.audit().step
