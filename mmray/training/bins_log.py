"""The proof that every bin was trained on once: `trained.jsonl`, one line for each step that was done.

    {"step": 7, "data": "9f0c…", "workers": 2, "bins": [[14, 3], [9, 21]]}

`bins` are those whose micro-batches each rank really received, read from the batches and gathered over all ranks, not
computed from the schedule; `data` is the fingerprint of the prepared dataset. 0.4 kB a step at 64 bins. A step of a
mixture also names the dataset of each bin, whose number is the one within its dataset:

    {"step": 7, "data": "mixture-51…", "workers": 2, "bins": [[14, 3], [9, 21]], "datasets": ["9f0c…", "77b0…"],
     "dataset_of": [[0, 1], [0, 0]]}

`datasets` are the fingerprints of the mixture's datasets, in its order, and `dataset_of` numbers of that list.

The file is only appended to. A step that is done again after a crash has a second line. All lines from that step on
that were written before belong to work that was lost, and `read_trained` leaves them out.
"""

import contextlib
import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TRAINED_FILE = "trained.jsonl"
_STEP = re.compile(rb'\{"step": (\d+),')


@dataclass(frozen=True)
class TrainedStep:
    """The bins that one step, counted from 1, trained on."""

    step: int
    data: str
    """Fingerprint of the prepared dataset, or of the mixture."""
    workers: int
    bins: list[list[int]]
    """Bins of each rank, in the order it ran them, by their numbers in their datasets; empty bins are left out."""
    datasets: list[str] | None = None
    """Fingerprints of the datasets of a mixture; None for one dataset."""
    dataset_of: list[list[int]] | None = None
    """Dataset of each of `bins`, as a number in `datasets`; None for one dataset."""

    @property
    def all_bins(self) -> list[int]:
        """The bins of all ranks, sorted."""
        return sorted(number for rank in self.bins for number in rank)

    @property
    def named_bins(self) -> list[tuple[str, int]]:
        """The bins of all ranks as (fingerprint of the dataset, number in it), sorted."""
        if self.datasets is None or self.dataset_of is None:
            return [(self.data, number) for number in self.all_bins]
        return sorted(
            (self.datasets[dataset], number)
            for rank, datasets in zip(self.bins, self.dataset_of, strict=True)
            for number, dataset in zip(rank, datasets, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        """The line of the log, as plain values of JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class TrainedLog:
    """The steps of a run's local folder, each once, as they were finally done, without lost work.

    Holds 16 bytes a step: a step is read when it is asked for.
    """

    def __init__(self, run: str | Path) -> None:
        """Finds the steps; a run without the file has none."""
        self._path = Path(run) / TRAINED_FILE
        self.steps, self._starts = array("q"), array("q")
        start = 0
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                matched = _STEP.match(line)
                step = int(matched[1]) if matched else int(json.loads(line)["step"])
                while self.steps and self.steps[-1] >= step:
                    self.steps.pop()
                    self._starts.pop()
                self.steps.append(step)
                self._starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[TrainedStep]:
        return (self._at(place) for place in range(len(self)))

    def get(self, step: int) -> TrainedStep | None:
        """A step by its number; None where it was not done."""
        place = bisect_left(self.steps, step)
        return self._at(place) if place < len(self) and self.steps[place] == step else None

    def _at(self, place: int) -> TrainedStep:
        with self._path.open("rb") as file:
            file.seek(self._starts[place])
            return TrainedStep(**json.loads(file.readline()))


def read_trained(run: str | Path) -> list[TrainedStep]:
    """The steps of a run's local folder, each once and in order, as they were finally done, without lost work.

    A long run has many: `TrainedLog` reads one at a time.
    """
    return list(TrainedLog(run))
