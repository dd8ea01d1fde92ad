"""What a tracker is: two small Protocols. Adding one is one file with both, and one line in `settings.py`."""

from collections.abc import Mapping
from typing import ClassVar, Protocol

from mmray.run.tracking.run import TrackedRun


class Tracker(Protocol):
    """Takes the numbers of one run. All calls come from one thread."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a step, by names such as `train/loss` and `eval/loss`.

        Steps come in order, each name of a step once; a step may come again with other names. It may raise whatever it
        likes.
        """

    def close(self) -> None:
        """The last call: hand over what is still here, and say that the run ended."""


class TrackerSettings(Protocol):
    """The settings of one tracker in the job file, which can open it."""

    library: ClassVar[str]
    """The module that must be there to import."""

    def open(self, run: TrackedRun, run_id: str | None) -> tuple[Tracker, str]:
        """The tracker, and the run's id there.

        run_id: what an earlier call gave, for a run that continues: it goes on in the same place. None: a new run.
        """
