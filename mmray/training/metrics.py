"""The numbers of a run: `metrics.jsonl`, one line a step, mirrored to TensorBoard.

The file is the record; TensorBoard is a view. A run that resumes does some steps again, so the log is first
cut back to the checkpoint's step: every step stands in it once, as it was finally done.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsLog:
    """Writes the metrics of one run into its folder. One process, rank 0, holds it."""

    def __init__(self, folder: Path) -> None:
        """folder: the run's; made where absent, continued where it has metrics."""
        self.path = folder / METRICS_FILE
        self._tensorboard_folder = folder / TENSORBOARD_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._drop_torn_line()
        self._file = self.path.open("a")
        self._writer = SummaryWriter(str(self._tensorboard_folder))

    def write(self, step: int, **values: float | int | None) -> None:
        """Append one line and hand it to the operating system: it survives the death of this process.

        step: from 1. values: of a training step `epoch, loss, tokens, trained_tokens, bins, lr, grad_norm,
        step_seconds, data_wait_seconds`; of an evaluation `epoch, eval_loss, …`. A value that is not finite
        is written as null.
        """
        line = {"step": step} | {key: _finite(value) for key, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for key, value in line.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(_tag(key), value, step)

    def truncate_after(self, step: int) -> None:
        """Forget what was logged after `step`, in one atomic replacement; TensorBoard hides it."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        self._file.close()
        self._replace(kept)
        self._file = self.path.open("a")
        self._writer.close()
        self._writer = SummaryWriter(str(self._tensorboard_folder), purge_step=step + 1)

    def close(self) -> None:
        """Close the file and flush TensorBoard."""
        self._file.close()
        self._writer.close()

    def _drop_torn_line(self) -> None:
        """A process that died while writing may have left half a line, which the next would be glued to."""
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._replace(read_metrics(self.path))

    def _replace(self, lines: list[dict[str, Any]]) -> None:
        beside = self.path.with_suffix(".jsonl.tmp")
        with beside.open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a torn last one."""
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in complete.splitlines()]


def _finite(value: float | int | None) -> float | int | None:
    return None if value is None or not math.isfinite(value) else value


def _tag(key: str) -> str:
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
