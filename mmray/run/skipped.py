"""Samples that a run left out of its loss: `skipped.jsonl`, and the limit above which the run stops.

    {"step": 7, "split": "train", "id": "a#1", "source": "rows.jsonl:3", "reason": "image_corrupt", "message": "…"}

The file has one line for each such sample of each step, as it was finally done: a run that resumes cuts the file back
to its checkpoint, as it does its metrics. So a step has as many lines as its `skipped_samples` in `metrics.jsonl`.

Some images that cannot be read are no reason to stop a run of weeks. Many at once are: a share that is not mounted, or
a key that has expired, would turn all further steps into training on nothing.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Self

from mmray.batches.micro_batch import MicroBatch
from mmray.batches.render import SkippedSample
from mmray.errors import UserError
from mmray.run.metrics import METRICS_FILE
from mmray.training.json_lines import JsonLines, iter_json_lines, read_json_lines, replace_json_lines

SKIPPED_FILE = "skipped.jsonl"

WINDOW = 10_000
"""Number of latest samples that the limit applies to."""

ALWAYS_ALLOWED = 20
"""Number of skipped samples among the latest that never stops a run, whatever their share."""

EXAMPLES = 3

log = logging.getLogger("mmray")


class SkipLimit:
    """Counts the samples of the latest steps. max_share: share of them that may be skipped."""

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._steps: deque[tuple[int, int]] = deque()
        self._samples = self._skipped = 0

    def count(self, samples: int, skipped: int) -> bool:
        """Counts one more step with its samples and skipped samples; returns whether the limit still holds."""
        self._steps.append((samples, skipped))
        self._samples, self._skipped = self._samples + samples, self._skipped + skipped
        while self._samples - self._steps[0][0] >= WINDOW:
            samples, skipped = self._steps.popleft()
            self._samples, self._skipped = self._samples - samples, self._skipped - skipped
        return self._skipped <= max(ALWAYS_ALLOWED, self._max_share * self._samples)

    def __str__(self) -> str:
        return f"{self._skipped} of the last {self._samples} samples"


@dataclass
class BatchCounts:
    """The samples in some micro-batches: their number, and those of them that are skipped."""

    samples: int = 0
    skipped: list[SkippedSample] = field(default_factory=list)

    @classmethod
    def of(cls, batches: Iterable[MicroBatch]) -> Self:
        """The counts of these micro-batches."""
        counts = cls()
        for batch in batches:
            counts.samples += batch.num_samples
            counts.skipped += batch.skipped
        return counts

    def through(self, steps: Iterable[list[MicroBatch]]) -> Iterator[list[MicroBatch]]:
        """Yields the micro-batches unchanged and counts them as they pass."""
        for batches in steps:
            step_counts = BatchCounts.of(batches)
            self.samples += step_counts.samples
            self.skipped += step_counts.skipped
            yield batches


class SkippedLog:
    """Rank 0's record of a run's skipped samples."""

    def __init__(self, run: Path, step: int, max_share: float) -> None:
        """Opens the log. run: folder whose metrics end with `step`, the last that is done; max_share: share of samples
        that may be skipped."""
        self._path, self._max_share = run / SKIPPED_FILE, max_share
        self._limits = {"train": SkipLimit(max_share), "eval": SkipLimit(max_share)}
        lines = read_json_lines(self._path)
        if any(line["step"] > step for line in lines):
            replace_json_lines(self._path, [line for line in lines if line["step"] <= step])
        for line in iter_json_lines(run / METRICS_FILE):
            self._limits["train"].count(line.get("samples", 0), line.get("skipped_samples", 0))

    def add(self, step: int, split: Literal["train", "eval"], counts: BatchCounts) -> None:
        """Records a step of all ranks: a line and a warning for each skipped sample.

        Raises UserError when there are too many of them.
        """
        if counts.skipped:
            with closing(JsonLines(self._path)) as file:
                for sample in counts.skipped:
                    file.append({"step": step, "split": split} | asdict(sample))
                    log.warning("left out of the loss: %s", sample)
        limit = self._limits[split]
        if not limit.count(counts.samples, len(counts.skipped)):
            examples = "; ".join(map(str, counts.skipped[:EXAMPLES]))
            raise UserError(
                f"{limit} of {split} have pictures that cannot be used, data.max_skipped_share is "
                f"{self._max_share:g}: is the storage of the images there? The run stops, so that it does not go on "
                f"without them; all are in {self._path}. {examples}"
            )
