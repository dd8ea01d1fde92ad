"""Pages of a file: of a PDF, or of a picture that holds several (TIFF, GIF, WebP).

    scan.pdf#page=3            the third page, rendered with `images.pdf_dpi`
    scan.pdf#page=3&dpi=200    as a prepared dataset names it: what is rendered depends on nothing else
    scan.pdf#pages=1-5         five pages, in a row's list of images
    fax.tif#page=2             the second picture of the file

The words are those of RFC 8118, "The application/pdf media type", for what stands behind a PDF's name.
"""

import re
from dataclasses import dataclass

from mmray.errors import RowError

DEFAULT_PDF_DPI = 150
"""Pixels an inch of a page that names no resolution."""

MAX_PAGES = 10_000
"""Pages that one `#pages=` may stand for."""

_SUFFIXES = r"\.(?:pdf|tiff?|gif|webp|a?png|avif)(?:@\d+\+\d+)?"
_PAGE = re.compile(rf"(?P<file>.+{_SUFFIXES})#page=(?P<page>\d+)(?:&dpi=(?P<dpi>\d+))?", re.DOTALL | re.IGNORECASE)
_PAGES = re.compile(rf"(?P<file>.+{_SUFFIXES})#pages=(?P<pages>[^#]*)", re.DOTALL | re.IGNORECASE)
_RANGE = re.compile(r"(\d+)-(\d+)(&dpi=\d+)?")
_PDF = re.compile(r".+\.pdf(?:@\d+\+\d+)?", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class PageOfFile:
    """One page. file: path, URI, or either of a part of a .tar; page: its number, from 1; dpi: pixels an inch, of PDFs
    alone, None for the default."""

    file: str
    page: int
    dpi: int | None = None

    def __str__(self) -> str:
        return f"{self.file}#page={self.page}" + (f"&dpi={self.dpi}" if self.dpi else "")

    @classmethod
    def written(cls, text: str) -> "PageOfFile | None":
        """The page that a text names; None for one that names a whole file."""
        match = _PAGE.fullmatch(text) if "#page=" in text else None
        return cls(match["file"], int(match["page"]), int(match["dpi"] or 0) or None) if match else None

    @property
    def is_pdf(self) -> bool:
        """Whether the file's name is that of a PDF."""
        return bool(_PDF.fullmatch(self.file))


def file_of(text: str) -> str:
    """The file of a page, by path or URI; a text that names no page is one itself."""
    page = PageOfFile.written(text)
    return page.file if page else text


def each_page(text: str) -> list[str]:
    """The pages that `#pages=1-5` stands for, as `#page=`; anything else stands for itself.

    Raises RowError `wrong_type` for what is no range.
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
