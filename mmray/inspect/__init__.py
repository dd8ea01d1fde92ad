"""One bin, shown to a person before GPU hours are spent: which samples stand in it, their images, whose turn each
stretch of text is, and which tokens train.

`view.py` works out what there is to see, `terminal.py` prints it, `page.py` makes a web page of it.
"""

from rich.console import Console

from mmray.display.html import InlinePage, write_html
from mmray.errors import UserError
from mmray.inspect.page import page_of
from mmray.inspect.terminal import print_view
from mmray.inspect.view import family_of_prepared, view_bin
from mmray.prepared import PreparedDataset

__all__ = ["print_bin", "show_bin", "write_bin_page"]


def print_bin(
    console: Console, prepared: PreparedDataset, bin_number: int, processor: str | None = None, *,
    trust_remote_code: bool = False,
) -> None:  # fmt: skip
    """Print one bin: counts, a table of its samples, their text with what trains of it.

    processor: folder or hub name; default: where it was when the dataset was prepared. A dataset that does not know is
    shown without text. Raises UserError for a bin that is not there, a processor that cannot be loaded, and another
    one than the dataset's.
    """
    family = family_of_prepared(prepared, processor, trust_remote_code=trust_remote_code)
    print_view(console, view_bin(prepared, bin_number, family))
    if family is None:
        console.print("counts only: the dataset does not name its processor; --processor shows the text", style="dim")


def write_bin_page(
    path: str, prepared: PreparedDataset, bin_number: int, processor: str | None = None, *,
    trust_remote_code: bool = False,
) -> int:  # fmt: skip
    """Write one bin as a web page that holds its pictures too; returns its bytes. Arguments and UserErrors as of
    `print_bin`; a processor must be known."""
    return write_html(path, _bin_page(prepared, bin_number, processor, trust_remote_code))


def show_bin(
    prepared: PreparedDataset, bin_number: int, processor: str | None = None, *, trust_remote_code: bool = False
) -> InlinePage:
    """The same page as the output of a notebook's cell."""
    return InlinePage(_bin_page(prepared, bin_number, processor, trust_remote_code))


def _bin_page(prepared: PreparedDataset, bin_number: int, processor: str | None, trust_remote_code: bool) -> str:
    family = family_of_prepared(prepared, processor, trust_remote_code=trust_remote_code)
    if family is None:
        raise UserError(f"{prepared.path} does not name its processor; give it with --processor")
    return page_of(view_bin(prepared, bin_number, family), family, prepared.tiling)
