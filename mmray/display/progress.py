"""Shows progress: a live bar in a terminal, a bar that is redrawn in place in a notebook, some lines in a log.

The rate is that of the last minute: rows done by an earlier run do not count, and a slow start falsifies the remaining
time for a minute at most.
"""

import html
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mmray.display.notebook import LiveOutput, in_notebook

LOG_SECONDS = 10
"""Shortest time between two lines of a log."""
REDRAW_SECONDS = 0.5
"""Shortest time between two drawings of a notebook's bar."""
RATE_SECONDS = 60
"""Length of time over which the rate is measured."""
MANY_FILES = 1_000
"""Number of files from which on reading through them is shown."""


@dataclass(frozen=True)
class State:
    """The state of some progress. rate: in units a second, None while it is unknown."""

    title: str
    unit: str
    done: int
    total: int
    seconds: float
    rate: float | None
    note: str = ""

    @property
    def part(self) -> float:
        """The share that is done, from 0 to 1; 1 when there is nothing to do."""
        return self.done / self.total if self.total else 1.0

    @property
    def count(self) -> str:
        """The count in words: `3/10 steps (30%)`."""
        return f"{self.done:,}/{self.total:,} {self.unit} ({self.part:.0%})"

    @property
    def pace(self) -> str:
        """The rate and the remaining time in words: `120 rows/s, 1:10 left`; empty while the rate is unknown."""
        if not self.rate:
            return ""
        speed = f"{self.rate:,.0f} {self.unit}/s" if self.rate >= 10 else f"{self.rate:.2g} {self.unit}/s"
        return f"{speed}, {_duration((self.total - self.done) / self.rate)} left" if self.done < self.total else speed


class View(Protocol):
    """Displays progress in a terminal, a notebook or a log."""

    def show(self, state: State) -> None:
        """Show the state; the view decides how often it draws."""

    def close(self) -> None:
        """End the display; the last state stays visible."""


class ProgressBar:
    """Shows progress inside a block: `with ProgressBar("preparing", "rows") as bar: bar.update(done, total, note)`."""

    def __init__(self, title: str, unit: str) -> None:
        self.title, self.unit = title, unit
        self._started = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque()

    def __enter__(self) -> Self:
        self._view = _view()
        return self

    def update(self, done: int, total: int, note: str = "", *, idle_seconds: float = 0.0) -> None:
        """Show a new state.

        note: a few words at the end of the line; idle_seconds: time since the beginning that does not count in the
        rate.
        """
        now = time.monotonic() - idle_seconds
        if self._recent and (done < self._recent[-1][1] or now < self._recent[-1][0]):
            self._recent.clear()  # it continues from an earlier state
        if not self._recent or done != self._recent[-1][1]:
            self._recent.append((now, done))
        while len(self._recent) > 2 and now - self._recent[1][0] > RATE_SECONDS:
            self._recent.popleft()
        (first, begun), (last, reached) = self._recent[0], self._recent[-1]
        rate = (reached - begun) / (last - first) if last > first else None
        seconds = time.monotonic() - self._started
        self._view.show(State(self.title, self.unit, done, total, seconds, rate, note))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._view.close()


def shown(stack: ExitStack, title: str, unit: str, least: int = 0) -> Callable[[int, int], None]:
    """Returns a function that shows progress by a bar, which appears when there is something to show.

    stack: closes the bar, which is closed earlier when all is done; least: smallest total that is shown.
    """
    bars: list[ProgressBar] = []

    def show(done: int, total: int) -> None:
        if total < least:
            return
        if not bars:
            bars.append(stack.enter_context(ProgressBar(title, unit)))
        bars[0].update(done, total)
        if done >= total:
            stack.close()

    return show


def _view() -> View:
    if in_notebook():
        return _Notebook()
    return _Terminal() if sys.stderr.isatty() else _Log()


class _Terminal:
    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(),
            TextColumn("{task.fields[state]}", markup=False), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
        )  # fmt: skip
        self._bar.start()
        self._task: Any = None

    def show(self, state: State) -> None:
        if self._task is None:
            self._task = self._bar.add_task(state.title, total=None, state="", note="")
        words = f"{state.count}  {state.pace}"
        self._bar.update(self._task, completed=state.done, total=state.total, state=words, note=state.note)

    def close(self) -> None:
        self._bar.stop()


class _Log:
    def __init__(self) -> None:
        self._last_line, self._last_done = float("-inf"), -1

    def show(self, state: State) -> None:
        if state.done == self._last_done:
            return
        if state.seconds - self._last_line >= LOG_SECONDS or state.done >= state.total:
            self._last_line, self._last_done = state.seconds, state.done
            pace = f", {state.pace}" if state.pace else ""
            line = f"{state.title}: {state.count} in {_duration(state.seconds)}{pace}  {state.note}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class _Notebook:
    """Shows HTML that Jupyter replaces in place; without widgets, so a saved notebook keeps it."""

    def __init__(self) -> None:
        self._shown = LiveOutput()
        self._drawn = float("-inf")
        self._state: State | None = None

    def show(self, state: State) -> None:
        self._state = state
        if state.seconds - self._drawn >= REDRAW_SECONDS or state.done >= state.total:
            self._draw(state)

    def close(self) -> None:
        if self._state:
            self._draw(self._state)

    def _draw(self, state: State) -> None:
        self._drawn = state.seconds
        words = "  ".join(filter(None, (state.count, state.pace, _duration(state.seconds), state.note)))
        bar = f'<progress max="1" value="{state.part}"></progress>'
        self._shown.replace(f"{bar} {html.escape(f'{state.title}: {words}')}")


def _duration(seconds: float) -> str:
    """Format a duration: `14 s`, `2:05`, `1:02:05`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole_seconds:02}" if hours else f"{minutes}:{whole_seconds:02}"
