"""Renders web pages and pieces of them that need nothing else: no script, no other file, no network.

Templates are in `mmray/display/templates`, and escape everything from the data. In case that fails, pages forbid
scripts and foreign content too (Content-Security-Policy).
"""

import html
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from mmray.base.visible import visible
from mmray.storage import explained


@cache
def template(name: str) -> Template:
    """Load a template of `mmray/display/templates`, which escapes.

    Filters: `visible` (text of the data), `count` (1,234), `percent` (12.3%).
    """
    environment = Environment(
        loader=PackageLoader("mmray.display", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "count": "{:,}".format, "percent": "{:.1%}".format}
    return environment.get_template(name)


def write_html(path: str | Path, page: str) -> int:
    """Writes a page, and the folder that it lies in; returns its size in bytes.

    Raises UserError when the file cannot be written.
    """
    with explained(f"the page {path}"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return Path(path).write_bytes(page.encode(errors="backslashreplace"))


class InlinePage:
    """Shows a whole page in a notebook's output, inside a frame: the styles of page and notebook stay apart."""

    def __init__(self, page: str, height: int = 640) -> None:
        """page: the HTML; height: height of the frame in pixels."""
        self.page, self.height = page, height

    def _repr_html_(self) -> str:
        return (
            f'<iframe sandbox srcdoc="{html.escape(self.page)}" '
            f'style="width: 100%; height: {self.height}px; border: 0; border-radius: 8px"></iframe>'
        )
