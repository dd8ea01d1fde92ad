"""Progress that reads well where it is shown: a live bar in a terminal and in a notebook, in a log file a line now and
then."""

import html
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmray.notebook import Shown, in_notebook

NOTEBOOK_SECONDS = 0.3
"""Least time between two states of a notebook's bar."""
LOG_SECONDS = 10
"""Least time between two lines of a log."""


class ProgressBar:
    """`with ProgressBar("preparing", "rows") as bar: bar.update(done, total, note)`."""

    def __init__(self, title: str, unit: str) -> None:
        self.title, self.unit = title, unit
        self._live: Progress | None = None
        self._shown: Shown | None = None
        self._last_line, self._last_done = float("-inf"), -1
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        if in_notebook():
            self._shown = Shown()
        elif sys.stderr.isatty():
            self._live = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                TextColumn(self.unit), TimeElapsedColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(stderr=True),
            )  # fmt: skip
            self._live.start()
            self._task = self._live.add_task(self.title, total=None, note="")
        return self

    def update(self, done: int, total: int, note: str = "") -> None:
        """Set the state. note: a few words at the end of the line."""
        if self._live is not None:
            self._live.update(self._task, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        least = LOG_SECONDS if self._shown is None else NOTEBOOK_SECONDS
        if done != self._last_done and (now - self._last_line >= least or done >= total):
            self._last_line, self._last_done = now, done
            part = done / total if total else 1.0
            seconds = now - self._started
            line = f"{self.title}: {done:,}/{total:,} {self.unit} ({part:.0%}) in {seconds:.0f} s  {note}"
            if self._shown is None:
                print(line.rstrip(), file=sys.stderr, flush=True)
            else:
                self._shown.replace(f'<progress max="1" value="{part}"></progress> {html.escape(line)}')

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
