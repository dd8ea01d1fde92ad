"""Faults of training.

Those in FAULTS disturb one run, one after another, so that each costs a recovery and no start of its own. After each,
all that the run trained on so far is compared with the schedule, and its losses with those of an undisturbed run.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from mmray.run.checkpoints import newest_looking_whole
from mmray.run.history import read_history
from tests.conftest import Inputs
from tests.faults.machines import Machines, kill, remount, small_disk, wait_for
from tests.faults.runs import TrainingRun, furthest_loss, steps_done_again
from tests.faults.table import Row

TOLERANCE = 1e-3
Fault = Callable[[TrainingRun], str]


def kill_worker(run: TrainingRun) -> str:
    kill(run.other_rank)
    return "kill -9 of one of two ranks"


def kill_rank_0(run: TrainingRun) -> str:
    kill(run.rank_0)
    return "kill -9 of the rank that writes metrics and history"


def kill_render_actor(run: TrainingRun) -> str:
    run.kill("the render actor")
    return "kill -9 of the only actor that decodes pictures"


def kill_mask_actor(run: TrainingRun) -> str:
    run.kill("the mask actor")
    return "kill -9 of the only actor that computes labels"


def kill_split_coordinator(run: TrainingRun) -> str:
    run.kill("the split coordinator")
    return "kill -9 of the actor that deals batches to ranks"


def kill_driver(run: TrainingRun) -> str:
    assert run.driver is not None
    run.driver.kill()
    run.start()
    return "kill -9 of `jobs/train.py`; the same command again"


def kill_controller(run: TrainingRun) -> str:
    run.kill("the train controller")
    assert run.driver is not None
    code = run.driver.wait()
    run.start()
    return f"kill -9 of Ray Train's controller: the command ends with {code}; the same command again"


def kill_while_checkpointing(run: TrainingRun) -> str:
    """As soon as the folder of the next checkpoint appears."""
    before = set(checkpoints(run))
    wait_for(lambda: set(checkpoints(run)) - before, "the next checkpoint", pause=0.002)
    kill(run.rank_0)
    return "kill -9 of rank 0 the moment the checkpoint's folder appears"


def _damage(run: TrainingRun, spoil: Callable[[Path], None]) -> None:
    """Stop the driver, spoil the newest checkpoint, start again."""
    assert run.driver is not None
    run.driver.kill()
    wait_for(lambda: not run.machines.processes("RayTrainWorker"), "the workers' end")
    newest = newest_looking_whole(run.run)
    assert newest is not None
    spoil(newest)
    run.start()


def flip_bit(run: TrainingRun) -> str:
    def spoil(checkpoint: Path) -> None:
        file = _largest(checkpoint)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    _damage(run, spoil)
    return "one bit flipped in the newest checkpoint"


def truncate(run: TrainingRun) -> str:
    _damage(run, lambda checkpoint: os.truncate(_largest(checkpoint), 1000))
    return "a file of the newest checkpoint cut to 1,000 bytes"


def lose_a_file(run: TrainingRun) -> str:
    _damage(run, lambda checkpoint: _largest(checkpoint).unlink())
    return "a rank's file of the newest checkpoint deleted"


FAULTS: dict[str, Fault] = {
    "a train worker dies": kill_worker,
    "rank 0 dies": kill_rank_0,
    "the render actor dies": kill_render_actor,
    "the mask actor dies": kill_mask_actor,
    "the split coordinator dies": kill_split_coordinator,
    "the driver dies": kill_driver,
    "the train controller dies": kill_controller,
    "death while a checkpoint is written": kill_while_checkpointing,
    "checkpoint damaged: a bit": flip_bit,
    "checkpoint damaged: truncated": truncate,
    "checkpoint damaged: a file missing": lose_a_file,
}


def checkpoints(run: TrainingRun) -> list[Path]:
    """Its checkpoint folders, the newest last."""
    return sorted(run.run.glob("checkpoint_0*"))


def _largest(checkpoint: Path) -> Path:
    """A file of the newest checkpoint that holds a rank's shard."""
    return max((file for file in checkpoint.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def disturb(run: TrainingRun, whole: TrainingRun, names: list[str]) -> Iterator[Row]:
    """One fault after another over one run that has been started; a row for each, when it has recovered."""
    done = 0
    for name in names:
        done = run.reach(done + 7)
        resumes, damaged = len(run.resumes()), len(_damaged(run))
        what = FAULTS[name](run)
        at = run.step
        reached = run.reach(at + 3)
        resumed = run.resumes()[resumes:]
        passed_over = _damaged(run)[damaged:]
        redone = f"{at - resumed[-1]['step']} steps" if resumed else "nothing"
        notes = [f"{len(resumed)} resume"] if resumed else ["no worker noticed"]
        notes += [f"passed over {each['checkpoint']}: {each['problem']}" for each in passed_over]
        if name.startswith("checkpoint damaged") and not passed_over:
            notes.append("FAILED: the damage was not seen")
        yield judged(run, whole, name, what, redone, "; ".join(notes), needs=at + 3)
        done = reached


def judged(
    run: TrainingRun, whole: TrainingRun, name: str, what: str, redone: str, note: str, *, needs: int,
    tolerance: float = TOLERANCE,
) -> Row:  # fmt: skip
    """The row of a fault: all that trained so far against the schedule, losses against the undisturbed run's."""
    audit, lines = run.audit(), run.metrics
    whole.reach(lines[-1]["step"])
    difference = furthest_loss(lines, whole.metrics)
    holds = audit.lost == audit.doubled == 0 and audit.step >= needs and difference <= tolerance
    losses = f"losses as undisturbed within {difference:.0e}" if difference else "losses as undisturbed to the bit"
    return Row(name, what, audit.lost, audit.doubled, redone, f"{'' if holds else 'FAILED: '}{note}; {losses}")


def _damaged(run: TrainingRun) -> list[dict[str, Any]]:
    return _events(run, "damaged_checkpoint")


def _events(run: TrainingRun, event: str) -> list[dict[str, Any]]:
    return [line for line in read_history(run.run) if line["event"] == event]


# ---- Runs of their own ----


def lose_a_node(inputs: Inputs, folder: Path, whole: TrainingRun) -> Row:
    """Two machines with a rank each, for a second one has no room; one goes, another comes."""
    resources = {"workers": 2, "cpus_per_worker": 2, "encode_actors": 2}
    with Machines(head_cpus=1) as machines:
        machines.add_node(cpus=3)
        gone = machines.add_node(cpus=3)
        run = TrainingRun(machines, inputs, folder, "node", training__steps=40, resources=resources)
        run.start()
        at = run.reach(12)
        machines.kill_node(gone)
        machines.add_node(cpus=3)
        run.finish()
    redone = at - run.resumes()[-1]["step"]
    return judged(
        run, whole, "a machine dies", "kill -9 of everything on a node with a rank; another node comes",
        f"{redone} steps", f"{len(run.resumes())} resume", needs=40,
    )  # fmt: skip


def come_and_go(inputs: Inputs, folder: Path, whole: TrainingRun) -> Row:
    """A run of one to three workers while machines come, are taken away with a notice, and die."""
    resources = {"workers": [1, 3], "cpus_per_worker": 3, "resize_seconds": 5}
    with Machines(head_cpus=5) as machines:
        first = machines.add_node(cpus=3)
        run = TrainingRun(machines, inputs, folder, "elastic", training__steps=200, resources=resources)
        run.start()
        run.reach_workers(2)
        second = machines.add_node(cpus=3)
        run.reach_workers(3)
        machines.kill_node(first)
        run.reach_workers(2)
        machines.announce_end(second, seconds=60)
        noticed = wait_for(lambda: _events(run, "preemption"), "the notice")[0]["step"]
        saved = wait_for(
            lambda: [each for each in _events(run, "checkpoint") if each["step"] >= noticed], "a checkpoint"
        )
        machines.kill_node(second)
        run.reach_workers(1)
        run.finish()
    seen = [workers for workers, _ in groupby(line["workers"] for line in run.metrics)]
    note = f"workers {' → '.join(map(str, seen))}; checkpoint at step {saved[0]['step']} on the notice at {noticed}"
    holds = seen == [2, 3, 2, 1] and saved[0]["step"] == noticed
    return judged(
        run, whole, ELASTIC, "workers: [1, 3]; a node comes, one dies, one goes after a notice",
        f"{steps_done_again(run)} steps", f"{'' if holds else 'FAILED: '}{note}", needs=200,
    )  # fmt: skip


def change_workers(inputs: Inputs, folder: Path, whole: TrainingRun) -> Row:
    """2 → 3 → 1 → 2: the same command with another number, each time to a later step."""
    counts, stops = (2, 3, 1, 2), (10, 20, 30, 40)
    with Machines(head_cpus=5) as machines:
        for count, stop in zip(counts, stops, strict=True):
            run = TrainingRun(
                machines, inputs, folder, "counts", training__steps=stop,
                resources={"workers": count, "encode_actors": 2},
            )  # fmt: skip
            run.start()
            run.finish()
    seen = [line["workers"] for line in run.metrics]
    assert seen == [count for count in counts for _ in range(10)], seen
    return judged(
        run, whole, "other numbers of workers", "resources.workers 2 → 3 → 1 → 2, ten steps each", "0 steps",
        "3 resumes", needs=40,
    )  # fmt: skip


def fill_disk(inputs: Inputs, folder: Path, whole: TrainingRun) -> Row | None:
    """The run's folder on a file system that is full after some checkpoints; later it has room again."""
    name, what = "the disk is full while a checkpoint is written", "a run folder of few megabytes, later enlarged"
    with small_disk(folder / "disk", megabytes=64) as disk, Machines(head_cpus=5) as machines:
        if disk is None:
            return None
        run = TrainingRun(
            machines, inputs, folder, "full", training__steps=40, training__max_failures=1,
            output__run=str(disk / "run"),
        )  # fmt: skip
        run.start()
        run.reach(12)
        ballast = disk / "ballast"
        with ballast.open("wb") as file:
            while True:
                try:
                    file.write(bytes(1 << 16))
                    file.flush()
                except OSError:
                    break
        assert run.driver is not None
        code = run.driver.wait()
        message = run.driver.output.strip().splitlines()[-1]
        at = run.step
        ballast.unlink()
        remount(disk, "size=256m")
        run.start()
        run.finish()
        row = judged(
            run, whole, name, f"{what}; the command ended with {code}: {message[:160]}",
            f"{at - run.resumes()[-1]['step']} steps", "the same command continued", needs=40,
        )  # fmt: skip
        shutil.copytree(run.run, folder / "full" / "run", dirs_exist_ok=True)
    return row


ELASTIC = "machines come and go"
OWN: dict[str, Callable[[Inputs, Path, TrainingRun], Row | None]] = {
    "a machine dies": lose_a_node,
    ELASTIC: come_and_go,
    "other numbers of workers": change_workers,
    "the disk is full while a checkpoint is written": fill_disk,
}
