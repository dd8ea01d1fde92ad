"""The interface of a tracker: two small Protocols. Adding one takes one file with both, and one line in
`settings.py`."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

from mmray.run.scoring.results import RowResult
from mmray.run.tracking.run import TrackedRun


class Tracker(Protocol):
    """Receives the numbers of one run. All calls come from one thread."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Receives the numbers of a step, by names such as `train/loss` and `eval/loss`.

        Steps come in order, each name of a step once; a step may come again with other names. Any exception may be
        raised.
        """

    def show(self, step: int, texts: Sequence[RowResult]) -> None:
        """Receives some texts that an evaluation read, with their references and pictures. Any exception may be
        raised."""

    def close(self) -> None:
        """Hands over what is still buffered and marks the run as ended. This is the last call."""


class TrackerSettings(Protocol):
    """The settings of one tracker in the job file, which can open it."""

    library: ClassVar[str]
    """The module that must be importable."""

    def open(self, run: TrackedRun, run_id: str | None) -> tuple[Tracker, str]:
        """Opens the tracker; returns it with the id of the run there.

        run_id: the id from an earlier call, for a run that continues in the same place; None: a new run.
        """
