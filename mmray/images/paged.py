"""Names single pages of a file: of a PDF, or of an image that holds several (TIFF, GIF, WebP).

    scan.pdf#page=3            the third page, rendered with `images.pdf_dpi`
    scan.pdf#page=3&dpi=200    as a prepared dataset names it: the rendered pixels depend on nothing else
    scan.pdf#pages=1-5         five pages, in a row's list of images
    fax.tif#page=2             the second picture of the file

The syntax behind the file name is that of RFC 8118, "The application/pdf media type".
"""

import re
from dataclasses import dataclass

from mmray.errors import RowError

DEFAULT_PDF_DPI = 150
"""Resolution of a page that names none, in pixels an inch."""

MAX_PAGES = 10_000
"""The most pages that one `#pages=` may stand for."""

_SUFFIXES = r"\.(?:pdf|tiff?|gif|webp|a?png|avif)(?:@\d+\+\d+)?"
_PAGE = re.compile(
    rf"(?P<file>.+{_SUFFIXES})#page=(?P<page>\d+)(?:&dpi=(?P<dpi>0*[1-9]\d*))?", re.DOTALL | re.IGNORECASE
)
_PAGES = re.compile(rf"(?P<file>.+{_SUFFIXES})#pages=(?P<pages>[^#]*)", re.DOTALL | re.IGNORECASE)
_RANGE = re.compile(r"(\d+)-(\d+)(&dpi=0*[1-9]\d*)?")
_PDF = re.compile(r".+\.pdf(?:@\d+\+\d+)?", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class PageOfFile:
    """One page of a file.

    file: the path or URI, possibly of a part of a .tar.
    page: the page's number, from 1.
    dpi: the resolution in pixels an inch, for PDFs only; None: the default.
    """

    file: str
    page: int
    dpi: int | None = None

    def __str__(self) -> str:
        return f"{self.file}#page={self.page}" + (f"&dpi={self.dpi}" if self.dpi else "")

    @classmethod
    def written(cls, text: str) -> "PageOfFile | None":
        """Parses a text that names a page; returns None for one that names a whole file."""
        match = _PAGE.fullmatch(text) if "#page=" in text else None
        return cls(match["file"], int(match["page"]), int(match["dpi"]) if match["dpi"] else None) if match else None

    @property
    def is_pdf(self) -> bool:
        """True if the file's name ends as that of a PDF."""
        return bool(_PDF.fullmatch(self.file))


def file_of(text: str) -> str:
    """Returns the file of a page, by path or URI; a text that names no page is returned unchanged."""
    page = PageOfFile.written(text)
    return page.file if page else text


def each_page(text: str) -> list[str]:
    """Lists the pages that `#pages=1-5` stands for, each as `#page=`; any other text is listed unchanged.

    Raises RowError `wrong_type` for a malformed range.
    """
    match = _PAGES.fullmatch(text) if "#pages=" in text else None
    if match is None:
        return [text]
    span = _RANGE.fullmatch(match["pages"])
    first, last = (int(span[1]), int(span[2])) if span else (0, 0)
    if span is None or not 1 <= first <= last:
        raise RowError("wrong_type", f"image {text!r:.200}: write the first and the last page, such as #pages=1-5")
    if last - first >= MAX_PAGES:
        raise RowError("wrong_type", f"image {text!r:.200}: names more than {MAX_PAGES} pages; write fewer in a row")
    return [f"{match['file']}#page={page}{span[3] or ''}" for page in range(first, last + 1)]
