"""The proof that every bin was trained on once: `trained.jsonl`, one line for each step that was done.

    {"step": 7, "data": "9f0c…", "workers": 2, "bins": [[14, 3], [9, 21]]}

`bins` are those whose micro-batches each rank really received, read from the batches and gathered over all ranks, not
computed from the schedule; `data` is the fingerprint of the prepared dataset. 0.4 kB a step at 64 bins.

The file is only appended to. A step that is done again after a crash has a second line. All lines from that step on
that were written before belong to work that was lost, and `read_trained` leaves them out.
"""

from dataclasses import dataclass
from pathlib import Path

from mmray.training.json_lines import read_json_lines

TRAINED_FILE = "trained.jsonl"


@dataclass(frozen=True)
class TrainedStep:
    """The bins that one step, counted from 1, trained on."""

    step: int
    data: str
    """Fingerprint of the prepared dataset."""
    workers: int
    bins: list[list[int]]
    """Bins of each rank, in the order it ran them; empty bins are left out."""

    @property
    def all_bins(self) -> list[int]:
        """The bins of all ranks, sorted."""
        return sorted(number for rank in self.bins for number in rank)


def read_trained(run: str | Path) -> list[TrainedStep]:
    """The steps of a run's local folder, each once and in order, as they were finally done, without lost work."""
    steps: list[TrainedStep] = []
    for line in read_json_lines(Path(run) / TRAINED_FILE):
        while steps and steps[-1].step >= line["step"]:
            steps.pop()
        steps.append(TrainedStep(**line))
    return steps
