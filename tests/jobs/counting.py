"""Callbacks that workers of Ray import: one counts the steps it was told of, and checkpoints carry the count."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from mmray.errors import UserError
from mmray.run.callback import Callback, DoneStep, Loop, Step
from mmray.run.checkpoints import newest_looking_whole


class Mistaken(Callback):
    """Raises a mistake of the user on one rank alone, while the others go on to the step and wait."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def before_step(self, loop: Loop, step: Step) -> None:
        if step.number == self.step and loop.run.ranks.rank == self.rank:
            raise UserError("this row cannot be trained on; mend it")


class KilledOnce(Callback):
    """Kills its own process before a step, on one rank, once a checkpoint is whole; a file says that it is done."""

    def __init__(self, step: int, rank: int, file: Path) -> None:
        self.step, self.rank, self.file = step, rank, file

    def before_step(self, loop: Loop, step: Step) -> None:
        if step.number != self.step or loop.run.ranks.rank != self.rank or self.file.exists():
            return
        while newest_looking_whole(loop.run.folder) is None:  # it may still be on its way
            time.sleep(0.05)
        self.file.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)


class Counting(Callback):
    """Appends `step:count` to a file for each step, on rank 0."""

    def __init__(self, file: Path) -> None:
        self.file, self.count = file, 0

    def after_step(self, loop: Loop, done: DoneStep) -> None:
        self.count += 1
        if loop.run.is_first:
            with self.file.open("a") as file:
                file.write(f"{done.number}:{self.count}\n")

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
