"""Shows things in a notebook: HTML that changes in place while a cell runs, and objects as small cards.

IPython is imported only inside a notebook, which has it; nothing else of Jupyter is needed (no widgets).
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmray.display.html import template

UPDATE_SECONDS = 2.0


def in_notebook() -> bool:
    """True when this process is a notebook's kernel, which can show HTML."""
    if "ipykernel" not in sys.modules:
        return False
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


class LiveOutput:
    """Output of a notebook cell whose content can be replaced, from any thread."""

    def __init__(self) -> None:
        from IPython.display import display

        self._handle = display(_Html(""), display_id=True)

    def replace(self, content: str) -> None:
        """Replace the content. content: HTML, escaped by the caller."""
        self._handle.update(_Html(content))


@contextmanager
def live(content: Callable[[], str]) -> Iterator[None]:
    """Shows the HTML that `content` returns; updates it every `UPDATE_SECONDS` while the block runs, and at its end.

    >>> with live(lambda: Run(job.output.run)._repr_html_()):
    ...     train(job, open_prepared(job))
    """
    shown, stop = LiveOutput(), threading.Event()

    def show() -> None:
        while not stop.wait(UPDATE_SECONDS):
            shown.replace(content())

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        shown.replace(content())


@dataclass(frozen=True)
class Fact:
    """A line of a card. share: from 0 to 1, drawn as a bar; colour: of the bar, a class of `charts.css.jinja`."""

    name: str
    text: str
    share: float | None = None
    colour: str = "tokens"


@dataclass(frozen=True)
class Segment:
    """A part of a strip that is drawn to scale. width: its share of the strip, from 0 to 1."""

    width: float
    colour: str
    title: str


def card(title: str, where: str, facts: list[Fact], *, chart: Any = None, strip: list[Segment] | None = None) -> str:
    """Render an object as a card: a few kB of HTML for light and dark pages, with all text escaped.

    where: the line under the title; chart: a `display.charts.Plot`; strip: segments drawn side by side.
    """
    return template("card.html.jinja").render(title=title, where=where, facts=facts, chart=chart, strip=strip or [])


@dataclass(frozen=True)
class _Html:
    content: str

    def _repr_html_(self) -> str:
        return self.content
