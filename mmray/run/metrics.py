"""The metrics of a run: `metrics.jsonl`, one line for each step, mirrored to TensorBoard and other trackers.

The file is the record; trackers are views. A run that resumes does some steps again, so the log is first cut back to
the checkpoint's step: it holds every step once, as it was finally done.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmray.run.scoring.results import RowResult
from mmray.run.tracking.base import Tracker, TrackerSettings
from mmray.run.tracking.feed import Feed
from mmray.run.tracking.run import TrackedRun
from mmray.run.tracking.tensorboard import TensorBoard
from mmray.training.json_lines import (
    JsonLines,
    iter_json_lines,
    last_json_line,
    read_json_lines,
    replace_json_lines,
)

METRICS_FILE = "metrics.jsonl"

SHARE_STEPS = 100
"""Number of latest steps in which the share of each dataset of a mixture is counted."""


class MetricsLog:
    """Writes the metrics of one run into its folder, and to its trackers. One process, rank 0, holds it."""

    def __init__(self, run: TrackedRun, step: int, trackers: Mapping[str, TrackerSettings] | None = None) -> None:
        """Opens the log and removes the metrics of all steps after `step`, in one atomic replacement.

        step: the last step that is done. trackers: by name, besides TensorBoard.
        """
        path = run.folder / METRICS_FILE

        def logged() -> Iterator[tuple[int, dict[str, float]]]:
            return ((line["step"], _scalars(line)) for line in iter_json_lines(path))

        self._trackers: list[Tracker] = [TensorBoard(run.folder, step)]
        feeds = [Feed(name, settings, run, logged=logged, kept=step) for name, settings in (trackers or {}).items()]
        last = last_json_line(path)  # steps never go down
        if last is not None and last["step"] > step:
            replace_json_lines(path, (line for line in iter_json_lines(path) if line["step"] <= step))
        self._file = JsonLines(path)
        for feed in feeds:
            feed.start()
        self._trackers += feeds

    def write(self, step: int, **values: float | int | Mapping[str, float | None] | None) -> None:
        """Appends one line and hands it to the operating system: it survives the death of this process.

        step: counted from 1.
        values: of a training step `epoch, loss, tokens, …` as docs/training.md lists them, `loss_by_set` and
        `bins_by_dataset` among them as numbers by name; of an evaluation `epoch, eval_loss, …`. A value that is not
        finite is written as null.
        """
        line = {"step": step} | {
            key: {name: _finite(number) for name, number in value.items()} if isinstance(value, Mapping)
            else _finite(value)
            for key, value in values.items()
        }  # fmt: skip
        self._file.append(line)
        scalars = _scalars(line)
        for tracker in self._trackers:
            tracker.write(step, scalars)

    def show(self, step: int, texts: Sequence[RowResult]) -> None:
        """Hands some texts of an evaluation, with their pictures, to the trackers."""
        if texts:
            for tracker in self._trackers:
                tracker.show(step, texts)

    def close(self) -> None:
        """Closes the file, and waits for trackers to take what they do not have yet."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without an incomplete last one; none where there is no file."""
    return read_json_lines(path)


def shares_of_bins(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The share of each dataset of a mixture in the bins of the last SHARE_STEPS of some training steps, by its name;
    none where the last step was not one of a mixture.

    lines: of metrics.jsonl, those of training steps only.
    """
    counts: Counter[str] = Counter()
    if lines and "bins_by_dataset" in lines[-1]:
        for line in lines[-SHARE_STEPS:]:
            counts.update(line.get("bins_by_dataset", {}))
    return {name: count / counts.total() for name, count in counts.items()}


def _finite(value: float | int | None) -> float | int | None:
    return None if value is None or not math.isfinite(value) else value


def _scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line under the names that trackers show: `train/loss`, `eval/loss`, `train/loss_by_set/a`."""
    kind = "eval" if any(key.startswith("eval_") for key in line) else "train"
    numbers: dict[str, float | None] = {}
    for key, value in line.items():
        name = f"{kind}/{key.removeprefix('eval_')}"
        if isinstance(value, Mapping):
            numbers |= {f"{name}/{inner}": number for inner, number in value.items()}
        elif key != "step":
            numbers[name] = value
    return {name: number for name, number in numbers.items() if number is not None}
