"""A training run as it lies in its folder, for reports and notebooks."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmray.cursor import Cursor
from mmray.errors import UserError
from mmray.kept_warnings import WARNINGS_FILE, read_warnings
from mmray.training.history import HISTORY_FILE, read_history
from mmray.training.metrics import METRICS_FILE, read_metrics


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint in the run's folder. step: steps that its weights have seen."""

    name: str
    step: int


class Run:
    """Read access to a run's folder, as it was when its parts were first asked for: a new Run sees more.

    >>> run = Run("/shared/ocr_pages/run")
    >>> run.column("loss")[-1], run.history[-1]["event"], [each.step for each in run.checkpoints]
    (1.83, 'finish', [800, 1000])

    Raises UserError for a folder that holds no run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.is_one(self.folder):
            raise UserError(f"{folder} holds no run: no {METRICS_FILE}; give output.run of a job that trains")

    @staticmethod
    def is_one(folder: str | Path) -> bool:
        """Whether a folder holds a run."""
        return any((Path(folder) / name).exists() for name in (METRICS_FILE, HISTORY_FILE))

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: training steps and evaluations."""
        path = self.folder / METRICS_FILE
        return read_metrics(path) if path.exists() else []

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The training steps."""
        return [line for line in self.metrics if "loss" in line]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations."""
        return [line for line in self.metrics if "eval_loss" in line]

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """What happened to the run (`training.history`); none where it was written before there was a history."""
        return read_history(self.folder)

    @cached_property
    def warnings(self) -> list[str]:
        """Warnings of workers and actors."""
        return read_warnings(self.folder / WARNINGS_FILE)

    @cached_property
    def checkpoints(self) -> list[SavedCheckpoint]:
        """The checkpoints that are there, by step. Damaged ones are left out."""
        found = []
        for file in self.folder.glob("checkpoint_*/cursor.json"):
            try:
                found.append(SavedCheckpoint(file.parent.name, Cursor.read(file).step))
            except UserError:
                continue
        return sorted(found, key=lambda each: each.step)

    def column(self, name: str) -> np.ndarray:
        """A value of every training step, float64 [steps]; NaN where it was not finite or is not known."""
        return _numbers(self.steps, name)

    def eval_column(self, name: str) -> np.ndarray:
        """The same of every evaluation."""
        return _numbers(self.evaluations, name)

    @property
    def last_step(self) -> int:
        """Steps done."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def is_finished(self) -> bool:
        """Whether the last thing that happened was its end. False too of runs without a history."""
        return bool(self.history) and self.history[-1]["event"] == "finish"

    @property
    def lasted(self) -> timedelta | None:
        """From the first to the last event, interruptions included; None without two events."""
        times = [datetime.fromisoformat(event["time"]) for event in self.history]
        return max(times) - min(times) if len(times) > 1 else None

    @cached_property
    def workers(self) -> np.ndarray:
        """Ranks of every training step, float64 [steps]: as metrics say, else as the history does; NaN: not known."""
        steps, told = self.column("step"), np.full(len(self.steps), np.nan)
        for event in self.history:
            if event["event"] in ("start", "resume") and event["workers"]:
                told[steps > event["step"]] = event["workers"]
        counted = self.column("workers")
        return np.where(np.isnan(counted), told, counted)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, steps={self.last_step}, finished={self.is_finished})"


def _numbers(lines: list[dict[str, Any]], name: str) -> np.ndarray:
    values = (line.get(name) for line in lines)
    return np.asarray([np.nan if value is None else value for value in values], dtype=np.float64)
