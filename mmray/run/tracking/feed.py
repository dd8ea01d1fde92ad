"""Feeding a tracker from a thread of its own, so that training never waits for one, and never ends with one.

`metrics.jsonl` is the record, a tracker a view of it: values that a tracker lacks are taken from there, whether it is
added to a run that is long under way, or was out of reach for a day. `tracking/NAME.json` records which steps it has,
beside its id of the run.

Trackers cannot forget. A run that continues from a checkpoint does some steps again; the tracker keeps the values it
got the first time, which are the same up to rounding, and holds each step once. Values on their way when a process was
killed (those of a second) may be missing there.

The first error, whatever it is, ends the feed with one warning. The next start of the run makes up for it.
"""

import contextlib
import itertools
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mmray.run.scoring.results import RowResult
from mmray.run.tracking.base import Tracker, TrackerSettings
from mmray.run.tracking.run import TrackedRun
from mmray.storage import replacing

log = logging.getLogger("mmray")

TRACKING_FOLDER = "tracking"
MOST_WAITING = 100_000
"""The most steps that wait for a slow tracker: some 50 MB."""
CLOSE_SECONDS = 60.0
"""The longest time, in seconds, that the end of a run waits for a tracker."""


@dataclass
class TrackerProgress:
    """The part of a run that a tracker has.

    steps: the last step of each name; failed: whether the tracker received less than the run logged.
    """

    id: str | None = None
    steps: dict[str, int] = field(default_factory=dict)
    failed: bool = False

    @classmethod
    def read(cls, path: Path) -> "TrackerProgress":
        """Reads the file; nothing is known where it is missing or incomplete."""
        try:
            return cls(**json.loads(path.read_text()))
        except (FileNotFoundError, ValueError):
            return cls()

    def write(self, path: Path) -> None:
        """Replaces the file atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, sync=False) as beside:
            beside.write_text(json.dumps(asdict(self)))

    def note(self, step: int, names: Iterable[str]) -> None:
        """Records that the tracker has these values of a step."""
        for name in names:
            self.steps[name] = max(step, self.steps.get(name, 0))

    def missing_values(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """The values of a step that the tracker lacks."""
        return {name: value for name, value in values.items() if step > self.steps.get(name, 0)}


Numbers = tuple[int, dict[str, float]]
"""A step, and its numbers by name."""

Texts = tuple[int, tuple[RowResult, ...]]
"""A step, and some texts of its evaluation."""


class Feed:
    """Hands the numbers of a run to one tracker, in the background."""

    def __init__(
        self, name: str, settings: TrackerSettings, run: TrackedRun, *, logged: Callable[[], Iterable[Numbers]],
        kept: int,
    ) -> None:  # fmt: skip
        """Reads what the tracker may have.

        logged: reads the metrics of the run, in order; kept: the last step that will not be done again.
        """
        self._name, self._settings, self._run = name, settings, run
        self._path = run.folder / TRACKING_FOLDER / f"{name}.json"
        self._progress = TrackerProgress.read(self._path)
        if self._progress.id and not self._progress.failed:
            for step, values in logged():
                self._progress.note(step, values)
        self._logged, self._kept = logged, kept
        self._waiting: queue.Queue[Numbers | Texts | None] = queue.Queue(MOST_WAITING)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._feed, name=f"tracker-{name}", daemon=True)

    def start(self) -> None:
        """Begins to feed, when the log holds no step any more that will be done again."""
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Queues the numbers of a step for the tracker and returns at once."""
        if not self._ended.is_set():
            try:
                self._waiting.put_nowait((step, dict(values)))
            except queue.Full:
                self._give_up("is too slow")

    def show(self, step: int, texts: Sequence[RowResult]) -> None:
        """Queues some texts for the tracker and returns at once. A tracker that is added later does not get them."""
        if not self._ended.is_set():
            try:
                self._waiting.put_nowait((step, tuple(texts)))
            except queue.Full:
                self._give_up("is too slow")

    def close(self) -> None:
        """Waits until the tracker has everything, but not longer than CLOSE_SECONDS."""
        deadline = time.monotonic() + CLOSE_SECONDS
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=0 if self._ended.is_set() else CLOSE_SECONDS)
        self._thread.join(0 if self._ended.is_set() else max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() and not self._ended.is_set():
            self._give_up(f"did not take all within {CLOSE_SECONDS:.0f} s")

    def _feed(self) -> None:
        try:
            tracker, self._progress.id = self._settings.open(self._run, self._progress.id)
            self._progress.write(self._path)
            for step, values in itertools.takewhile(lambda numbers: numbers[0] <= self._kept, self._logged()):
                self._tell(tracker, step, values)
            self._progress.failed = False
            self._progress.write(self._path)
            while not self._ended.is_set() and (item := self._waiting.get()) is not None:
                step, content = item
                if isinstance(content, tuple):
                    tracker.show(step, content)
                else:
                    self._tell(tracker, step, content)
            tracker.close()
            self._progress.write(self._path)
        except BaseException as error:  # noqa: BLE001 (of libraries that may raise or exit as they like)
            self._give_up(" ".join(f"{type(error).__name__}: {error}".split()))

    def _tell(self, tracker: Tracker, step: int, values: Mapping[str, float]) -> None:
        if new := self._progress.missing_values(step, values):
            tracker.write(step, new)
            self._progress.note(step, new)

    def _give_up(self, problem: str) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        log.warning(
            "tracking.%s: %.300s; training goes on without it, and the next start of this run makes up for it",
            self._name, problem,
        )  # fmt: skip
        self._progress.failed = True
        with contextlib.suppress(OSError):
            self._progress.write(self._path)
