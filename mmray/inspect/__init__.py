"""Shows one bin to a person: its samples, their images, the turns of their text, and the tokens that are trained on.

`view.py` computes what to show, `terminal.py` prints it, `page.py` makes a web page of it.
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
    """Print one bin: counts, a table of its samples, and their text with trained tokens marked.

    processor: folder or hub name; default: where it was when the dataset was prepared. A dataset that does not name its
    processor is shown without text.

    Raises UserError for a bin that does not exist, a processor that cannot be loaded, and another one than the
    dataset's.
    """
    family = family_of_prepared(prepared, processor, trust_remote_code=trust_remote_code)
    print_view(console, view_bin(prepared, bin_number, family))
    if family is None:
        console.print("counts only: the dataset does not name its processor; --processor shows the text", style="dim")


def write_bin_page(
    path: str, prepared: PreparedDataset, bin_number: int, processor: str | None = None, *,
    trust_remote_code: bool = False,
) -> int:  # fmt: skip
    """Write one bin as a web page that holds its pictures too; returns the size of the page in bytes.

    Arguments and UserErrors as in `print_bin`; also raises UserError when the processor is unknown.
    """
    return write_html(path, _bin_page(prepared, bin_number, processor, trust_remote_code))


def show_bin(
    prepared: PreparedDataset, bin_number: int, processor: str | None = None, *, trust_remote_code: bool = False
) -> InlinePage:
    """Show one bin as a page in a notebook. Arguments and UserErrors as in `write_bin_page`."""
    return InlinePage(_bin_page(prepared, bin_number, processor, trust_remote_code))


def _bin_page(prepared: PreparedDataset, bin_number: int, processor: str | None, trust_remote_code: bool) -> str:
    family = family_of_prepared(prepared, processor, trust_remote_code=trust_remote_code)
    if family is None:
        raise UserError(f"{prepared.path} does not name its processor; give it with --processor")
    return page_of(view_bin(prepared, bin_number, family), family, prepared.tiling)
