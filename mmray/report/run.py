"""Reads a training run from its folder, for reports and notebooks."""

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmray.base.words import counted
from mmray.display.charts import Plot, Series, over_steps
from mmray.display.notebook import Fact, card, live
from mmray.errors import UserError
from mmray.report.step_table import StepTable
from mmray.run.folder import RunFolder
from mmray.run.history import HISTORY_FILE, read_history
from mmray.run.metrics import METRICS_FILE, SHARE_STEPS, read_metrics
from mmray.run.place import CURSOR_FILE
from mmray.run.scoring.results import (
    EVALUATIONS_FOLDER,
    METRICS,
    PREDICTIONS,
    RowResult,
    ShownRows,
    from_parquet,
)
from mmray.run.skipped import SKIPPED_FILE
from mmray.run.warnings import WARNINGS_FILE, read_warnings
from mmray.schedule.cursor import Cursor
from mmray.schedule.mixture import shares_at
from mmray.storage import Folder
from mmray.training.json_lines import iter_json_lines, read_json_lines

MOST_MARKS = 8
MARKS = {"resume": "resumed", "preemption": "preempted", "damaged_checkpoint": "damaged", "continue_on": "other data"}
"""Events that are marked in charts, with their labels."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint in the run's folder. step: number of steps that its weights were trained for."""

    name: str
    step: int


class Run:
    """Gives read access to a run's folder. Each part is read once, when first used; a new Run reads what is new.

    >>> run = Run("/shared/ocr_pages/run")
    >>> run.column("loss")[-1], run.history[-1]["event"], [checkpoint.step for checkpoint in run.checkpoints]
    (1.83, 'finish', [800, 1000])

    Raises UserError for a folder that holds no run.
    """

    def __init__(self, folder: str | Path) -> None:
        run = RunFolder(folder)
        self.folder = run.fetch()
        """Local folder of its files; for a run in an object store, of copies of them."""
        if not self.is_one(self.folder):
            raise UserError(f"{folder} holds no run: no {METRICS_FILE}; give output.run of a job that trains")
        self._checkpoint_names = run.checkpoint_names()

    @staticmethod
    def is_one(folder: str | Path) -> bool:
        """True when a folder, by path or URI, holds a run."""
        return any(Folder(str(folder)).exists(name) for name in (METRICS_FILE, HISTORY_FILE))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, training steps and evaluations, read anew. For 10^6 steps they take 1.5 GB;
        `column` takes 8 MB."""
        return read_metrics(self.folder / METRICS_FILE)

    @cached_property
    def _read(self) -> tuple[StepTable, list[dict[str, Any]]]:
        steps, evaluations = StepTable(), []
        for line in iter_json_lines(self.folder / METRICS_FILE):
            if "loss" in line:
                steps.add(line)
            elif "eval_loss" in line:
                evaluations.append(line)
        return steps, evaluations

    @property
    def steps(self) -> StepTable:
        """The numbers of all training steps; its length is their number."""
        return self._read[0]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that are evaluations."""
        return self._read[1]

    @cached_property
    def latest_evaluation(self) -> tuple[dict[str, Any], list[RowResult]] | None:
        """The metrics of the newest evaluation that read texts, and those of its texts that come with a picture or lie
        at the ends of the ranking; None without one."""
        folder = self.folder / EVALUATIONS_FOLDER
        done = [path for path in folder.glob("*") if path.name.isdecimal() and (path / METRICS).exists()]
        if not done:
            return None
        newest = max(done, key=lambda path: int(path.name))
        try:
            values = json.loads((newest / METRICS).read_text(encoding="utf-8"))
            results, _ = from_parquet((newest / PREDICTIONS).read_bytes())
        except (OSError, ValueError):  # it is being written at the moment
            return None
        return values, [results[place] for place in ShownRows.of(results).all]

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """The events of the run (`run.history`); empty for a run of an earlier version, without a history."""
        return read_history(self.folder)

    @cached_property
    def warnings(self) -> list[str]:
        """Warnings of workers and actors."""
        return read_warnings(self.folder / WARNINGS_FILE)

    @cached_property
    def skipped(self) -> list[dict[str, Any]]:
        """Samples that were left out of the loss (`run.skipped`), by step."""
        return read_json_lines(self.folder / SKIPPED_FILE)

    @cached_property
    def checkpoints(self) -> list[SavedCheckpoint]:
        """The checkpoints in the folder, by step, without damaged ones."""
        checkpoints = []
        for name in self._checkpoint_names:
            try:
                checkpoints.append(SavedCheckpoint(name, Cursor.read(self.folder / name / CURSOR_FILE).step))
            except UserError:
                continue
        return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)

    def column(self, name: str) -> np.ndarray:
        """A value of every training step, float64 [steps]; NaN where it is unknown or was not finite."""
        return self.steps.column(name)

    def eval_column(self, name: str) -> np.ndarray:
        """A value of every evaluation, float64 [evaluations]; NaN where it is unknown or was not finite."""
        return _numbers(self.evaluations, name)

    def columns_by_name(self, key: str) -> dict[str, np.ndarray]:
        """The numbers that every training step of a mixture has by name, float64 [steps] each; NaN where it has none.

        key: `loss_by_set` or `bins_by_dataset`.
        """
        return self.steps.columns_by_name(key)

    @cached_property
    def shares(self) -> dict[str, np.ndarray]:
        """The share of each dataset in the bins of the SHARE_STEPS steps up to each step, float64 [steps], by name."""
        bins = {name: np.nan_to_num(column) for name, column in self.columns_by_name("bins_by_dataset").items()}
        recent = {name: _recent_sums(column) for name, column in bins.items()}
        total = np.sum(list(recent.values()), axis=0)
        with np.errstate(invalid="ignore"):
            return {name: column / total for name, column in recent.items()}

    @cached_property
    def asked_shares(self) -> dict[str, np.ndarray]:
        """The share that was asked for of each dataset in every training step, float64 [steps], by its name.

        NaN in steps before a dataset joined, and after it left.
        """
        steps, asked = self.column("step"), {name: np.full(len(self.steps), np.nan) for name in self.shares}
        for event in (event for event in self.history if event["event"] in ("start", "continue_on")):
            after = steps > event["step"]
            for column in asked.values():
                column[after] = np.nan
            if "mixture" in event:
                shares = shares_at(event["mixture"], steps[after].astype(int).tolist())
                for number, dataset in enumerate(event["mixture"]["datasets"]):
                    if dataset["name"] in asked:
                        asked[dataset["name"]][after] = shares[:, number]
        return asked

    @property
    def last_step(self) -> int:
        """Number of the last training step; 0 before the first."""
        return int(self.column("step")[-1]) if self.steps else 0

    @property
    def is_finished(self) -> bool:
        """True when the last event is the end of the run. False for runs without a history."""
        return bool(self.history) and self.history[-1]["event"] == "finish"

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run, as it last began or went on; None for runs whose history does not tell."""
        totals = [event["total_steps"] for event in self.history if "total_steps" in event]
        return totals[-1] if totals else None

    @property
    def state(self) -> str:
        """The state of the run by its last event: finished, stopped, or else under way or broken off."""
        if not self.history:
            return f"after step {self.last_step:,}"
        event = self.history[-1]
        if event["event"] == "finish":
            return "finished" + (f": {event['reason']}" if event.get("reason") else "")
        if event["event"] == "stop":
            return f"stopped: {event['reason']}"
        return f"under way or broken off; last event: {event['event']} after step {event['step']:,}, {event['time']}"

    @property
    def steps_done(self) -> str:
        """The number of the last training step, of that of the whole run where it is known."""
        return f"{self.last_step:,}" + (f" of {self.total_steps:,}" if self.total_steps is not None else "")

    @property
    def lasted(self) -> timedelta | None:
        """Time from the first to the last event, interruptions included; None without two events."""
        times = [datetime.fromisoformat(event["time"]) for event in self.history]
        return max(times) - min(times) if len(times) > 1 else None

    @cached_property
    def workers(self) -> np.ndarray:
        """Number of ranks in every training step, float64 [steps], from metrics or else the history; NaN if unknown."""
        steps, from_history = self.column("step"), np.full(len(self.steps), np.nan)
        for event in self.history:
            if event["event"] in ("start", "resume") and event["workers"]:
                from_history[steps > event["step"]] = event["workers"]
        counted = self.column("workers")
        return np.where(np.isnan(counted), from_history, counted)

    def _repr_html_(self) -> str:
        if not self.steps:
            return card("Run: no step is finished yet", str(self.folder), [])
        state = "finished" if self.is_finished else "so far"
        resumes = [event["step"] for event in self.history if event["event"] == "resume"]
        facts = [Fact("loss", _from_to(self.column("loss")))]
        if self.evaluations:
            facts.append(Fact("evaluation loss", _from_to(self.eval_column("eval_loss"))))
        if self.checkpoints:
            facts.append(
                Fact("checkpoints", ", ".join(f"step {checkpoint.step:,}" for checkpoint in self.checkpoints[-4:]))
            )
        if resumes:
            facts.append(Fact("resumed", ", ".join(f"at step {step:,}" for step in resumes[-8:])))
        return card(f"Run: {counted(self.last_step, 'step')}, {state}", str(self.folder), facts, chart=loss_chart(self))

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, steps={self.last_step}, finished={self.is_finished})"


def live_run(folder: str | Path) -> AbstractContextManager[None]:
    """Shows a run in a notebook and updates it while the block runs; the run may begin inside the block.

    >>> with live_run(job.output.run):
    ...     train(job, open_prepared(job))
    """

    def content() -> str:
        if not Run.is_one(folder):
            return card("Run: has not begun yet", str(folder), [])
        return Run(folder)._repr_html_()

    return live(content)


def loss_chart(run: Run) -> Plot:
    """Draw the loss of training and evaluations over steps, with marks for events. run: has at least one step."""
    steps, trained = run.column("step"), run.column("loss")
    series = [Series("training", "tokens", steps, trained)]
    if run.evaluations:
        dots = run.eval_column("step"), run.eval_column("eval_loss")
        series.append(Series("evaluation", "warn", *dots, dots=True))
    note = "A mean over the trained tokens of each step."
    return over_steps("Loss", note, series, marks=marks(run), first_step=int(steps[0]), last_step=run.last_step)


def marks(run: Run) -> list[tuple[int, str]]:
    """The (step, label) of each mark in charts; labels of one step are joined, and empty with more than MOST_MARKS."""
    at: dict[int, list[str]] = {}
    for event in run.history:
        if event["event"] in MARKS:
            at.setdefault(event["step"], []).append(MARKS[event["event"]])
    texts = [(step, ", ".join(dict.fromkeys(names))) for step, names in sorted(at.items())]
    return texts if len(texts) <= MOST_MARKS else [(step, "") for step, _ in texts]


def _from_to(values: np.ndarray) -> str:
    first, last = ("not finite" if np.isnan(value) else f"{value:.4g}" for value in (values[0], values[-1]))
    return f"{last}, from {first}"


def _recent_sums(values: np.ndarray) -> np.ndarray:
    """The sums of the last SHARE_STEPS values up to each one, float64 [n]."""
    sums = np.concatenate([np.zeros(SHARE_STEPS), np.cumsum(values)])
    return sums[SHARE_STEPS:] - sums[:-SHARE_STEPS]


def _numbers(lines: list[dict[str, Any]], name: str) -> np.ndarray:
    values = (line.get(name) for line in lines)
    return np.asarray([np.nan if value is None else value for value in values], dtype=np.float64)
