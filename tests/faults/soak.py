"""Kills at random times, one after another, over one run of many epochs; then its proof against an undisturbed one.

Bounded in kills, by the run's number of steps, and in time. What is killed and when follows from the seed and the pace
of the machine: most kills come at any time, often in the middle of a start or a recovery, every fifth soon after a new
step, so that the run goes forward.
"""

import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.conftest import Inputs, write_inputs
from tests.faults.machines import Machines, kill, wait_for
from tests.faults.runs import TARGETS, TrainingRun, furthest_loss, steps_done_again
from tests.faults.table import Row

SEED, KILLS = 20, 20
STEPS = 160
MOST_SECONDS = 40 * 60.0
TOLERANCE = 1e-3
"""Of the final loss, relative to that of the undisturbed run."""

DRIVER = "the driver"
WEIGHTS = {"a train worker": 4, DRIVER: 2, "the render actor": 2, "the mask actor": 2, "the split coordinator": 1}


@dataclass(frozen=True)
class Kill:
    """One kill: of what, seconds after the soak began, at which step the run was."""

    target: str
    seconds: float
    step: int


class Soak:
    """One disturbed run."""

    def __init__(self, run: TrainingRun, seed: int, kills: int) -> None:
        self.run, self.kills = run, kills
        self._steps = run.job.training.steps or 0
        self._random = random.Random(seed)
        self._began = time.monotonic()
        self.done: list[Kill] = []
        self.starts = 0

    def disturb(self) -> None:
        """Kill so many times, starting the driver again whenever it has ended; then let the run finish."""
        self._start()
        while len(self.done) < self.kills and self._seconds < MOST_SECONDS and self.run.step < self._steps:
            self._alive()
            self._wait()
            self._kill(self._random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0])
        while self._ended_badly():
            self._start()

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _start(self) -> None:
        self.starts += 1
        self.run.start()

    def _wait(self) -> None:
        """For any time up to half a minute; before every fifth kill until shortly after a new step."""
        if len(self.done) % 5 != 4:
            time.sleep(self._random.uniform(2, 30))
            return
        reached = max(each.step for each in self.done)
        wait_for(lambda: self._alive() and self.run.step > reached, f"a step after {reached}")
        time.sleep(self._random.uniform(0, 5))

    def _alive(self) -> bool:
        driver = self.run.driver
        if driver is not None and driver.code is not None and self.run.step < self._steps:
            self._start()  # the driver was killed, or it gave up because its controller was
        return True

    def _kill(self, target: str) -> None:
        driver = self.run.driver
        assert driver is not None
        step = self.run.step
        if target == DRIVER:
            if driver.code is not None:
                return
            driver.kill()
        else:
            processes = self.run.machines.processes(TARGETS[target])
            if not processes:
                return  # not started yet; something else is drawn
            kill(self._random.choice(processes))
        self.done.append(Kill(target, round(self._seconds, 1), step))
        self.run.note(killed=target, step=step)

    def _ended_badly(self) -> bool:
        driver = self.run.driver
        assert driver is not None
        if self.starts > 3 * self.kills:
            raise RuntimeError(f"{self.starts} drivers were started and the run is at step {self.run.step}")
        return driver.wait(MOST_SECONDS) != 0


def soak(folder: Path, *, seed: int = SEED, kills: int = KILLS, steps: int = STEPS) -> list[Row]:
    """Run it; the row for the table. Everything else of it is in `folder`/soak.json."""
    inputs: Inputs = write_inputs(folder / "inputs")
    began = time.monotonic()
    with Machines(head_cpus=6) as machines:
        run = TrainingRun(machines, inputs, folder, "soak", training__steps=steps)
        run.prepare()
        whole = TrainingRun(None, inputs, folder, "whole", training__steps=steps)
        whole.start()  # meanwhile, on a Ray of its own
        disturbed = Soak(run, seed, kills)
        disturbed.disturb()
        whole.finish()
    audit, (epochs, wrong) = run.audit(), run.epochs()
    ours, theirs = run.metrics, whole.metrics
    final = abs(ours[-1]["loss"] - theirs[-1]["loss"]) / theirs[-1]["loss"]
    resumes = run.resumes()
    counts = {target: sum(each.target == target for each in disturbed.done) for target in WEIGHTS}
    report = {
        "seed": seed, "kills": [asdict(each) for each in disturbed.done], "counts": counts,
        "driver_starts": disturbed.starts, "resumes": len(resumes), "steps": audit.step, "epochs": epochs,
        "bins_not_exactly_once": wrong, "lost": audit.lost, "doubled": audit.doubled,
        "final_loss": ours[-1]["loss"], "final_loss_undisturbed": theirs[-1]["loss"], "final_difference": final,
        "largest_difference": furthest_loss(ours, theirs), "finite": all(math.isfinite(x["loss"]) for x in ours),
        "steps_done_again": steps_done_again(run), "seconds": round(time.monotonic() - began),
    }  # fmt: skip
    (folder / "soak.json").write_text(json.dumps(report, indent=1))
    checks = {
        f"only {len(disturbed.done)} kills": len(disturbed.done) >= kills,
        f"{audit.step} steps": audit.step == steps == len(ours),
        "bins not exactly once": wrong == audit.lost == audit.doubled == 0,
        "a loss that is not finite": report["finite"],
        f"final loss off by {final:.2g}": final <= TOLERANCE,
    }
    failed = [name for name, holds in checks.items() if not holds]
    killed = ", ".join(f"{count} × {target}" for target, count in counts.items() if count)
    outcome = (
        f"{audit.step} steps, {epochs} epochs, every bin once in each; final loss {ours[-1]['loss']:.6f}, undisturbed "
        f"{theirs[-1]['loss']:.6f}, largest difference of any step {report['largest_difference']:.1g}"
    )
    return [
        Row(
            "soak", f"{len(disturbed.done)} kills at random times (seed {seed}): {killed}", audit.lost,
            audit.doubled, f"{report['steps_done_again']} steps in {len(resumes)} resumes",
            "FAILED: " + "; ".join(failed) if failed else outcome,
        )
    ]  # fmt: skip
