"""Measures pages of PDFs without rendering, and renders them, with PDFium.

A page of w x h points has ceil(w * dpi / 72) x ceil(h * dpi / 72) pixels, after its rotation and crop box; it is
rendered into a bitmap of exactly that size. A size takes 0.1 ms where the document is open, a page of text about 20 ms.

Pages are rendered whole and then cut. Rendering the region of each of six tiles takes as long for text, and three times
as long for a scan, whose picture is then decoded six times. At half the scale, text differs from that of a resized page
by 6.5 of 255 on average, where a reduced JPEG differs by 0.3. A job that wants fewer pixels lowers `pdf_dpi`.

Pages of one document follow each other when preparing and are shuffled apart when training, so each process keeps the
documents open that it used last. PDFium allows one thread at a time; threads that wait for object storage do not block
one another.
"""

import atexit
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pypdfium2
import pypdfium2.raw as pdfium
from PIL import Image

from mmray.base.words import counted, one_line
from mmray.errors import RowError
from mmray.images.contents import CONTENTS_BYTES, contents
from mmray.images.paged import DEFAULT_PDF_DPI, PageOfFile
from mmray.images.source import PASS_THROUGH_ERRORS, describe_source, image_file, source_state
from mmray.images.tar_member import PartOfFile

MAX_DOCUMENTS = 16
"""The most documents that a process keeps open."""

MAX_BYTES = 256 << 20
"""The most bytes of documents from remote storage or archives that a process keeps in memory besides the last one."""

FRESH_SECONDS = 60.0
"""How long, in seconds, a document in remote storage is used without checking whether it has changed."""

_POINTS_PER_INCH = 72


@dataclass
class _OpenDocument:
    document: pypdfium2.PdfDocument
    state: tuple[str, str] | None
    num_bytes: int
    since: float


class Documents:
    """The open PDFs of a process, in the order of use. Threads share them: they fetch documents at the same time, each
    document once, and use PDFium one after another."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._open: OrderedDict[str, _OpenDocument] = OrderedDict()
        self._fetching: dict[str, threading.Lock] = {}

    @contextmanager
    def using(self, file: str) -> Iterator[pypdfium2.PdfDocument]:
        """Yields the document of a path or URI, locked for this thread.

        Raises RowError: those of `open_image`, `pdf_encrypted`, `pdf_damaged`.
        """
        while True:
            with self._lock:
                entry = self._fresh(file)
                if entry:
                    yield entry.document
                    return
                fetching = self._fetching.setdefault(file, threading.Lock())
            with fetching:
                self._fetch(file)

    def _fetch(self, file: str) -> None:
        """Opens a document, unless another thread has done so meanwhile. Its bytes are fetched while other threads use
        PDFium."""
        try:
            with self._lock:
                is_there = self._fresh(file) is not None
            if not is_there:
                state, data = source_state(file), _fetched(file)
                with self._lock:
                    self._add(file, state, data)
        finally:
            with self._lock:
                self._fetching.pop(file, None)

    def close(self) -> None:
        """Closes all documents."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].document.close()

    def _fresh(self, file: str) -> _OpenDocument | None:
        """Returns the open document if the file still holds it; else closes it and returns None."""
        entry = self._open.pop(file, None)
        if entry is None:
            return None
        is_remote = "://" in file
        if time.monotonic() - entry.since > FRESH_SECONDS if is_remote else entry.state != source_state(file):
            entry.document.close()
            return None
        self._open[file] = entry
        return entry

    def _add(self, file: str, state: tuple[str, str] | None, data: bytes | None) -> None:
        document = _opened(file, data)
        self._open[file] = _OpenDocument(document, state, len(data or b""), time.monotonic())
        while len(self._open) > 1 and (len(self._open) > MAX_DOCUMENTS or self._num_bytes > MAX_BYTES):
            self._open.popitem(last=False)[1].document.close()

    @property
    def _num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self._open.values())


_documents = Documents()


def _forget() -> None:
    """Drops the open documents in a forked process, which shares positions in open files with its parent."""
    global _documents
    _documents = Documents()


os.register_at_fork(after_in_child=_forget)
atexit.register(lambda: _documents.close())


def pdf_size(page: PageOfFile, max_pixels: int) -> tuple[int, int]:
    """Returns the (width, height) in pixels of a rendered page.

    Raises RowError: those of `Documents.using`; `pdf_page` where the document has no such page; `pdf_empty_page` for
    a page without area; `image_too_large` above `max_pixels`.
    """
    with _explained(page) as document:
        return _size(page, document, max_pixels)


def render_pdf(page: PageOfFile, max_pixels: int) -> Image.Image:
    """Renders a page as a person sees it, RGB on white, with its annotations and filled forms.

    Raises what `pdf_size` raises.
    """
    with _explained(page) as document:
        width, height = _size(page, document, max_pixels)
        opened = document[page.page - 1]
        bitmap = pypdfium2.PdfBitmap.new_native(width, height, pdfium.FPDFBitmap_BGR, rev_byteorder=True)
        try:
            bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
            place, flags = (bitmap, opened, 0, 0, width, height, 0), pdfium.FPDF_ANNOT | pdfium.FPDF_REVERSE_BYTE_ORDER
            pdfium.FPDF_RenderPageBitmap(*place, flags)
            if document.formenv:
                pdfium.FPDF_FFLDraw(document.formenv, *place, flags)
            return bitmap.to_pil().copy()
        finally:
            bitmap.close()
            opened.close()


def num_pages(file: str) -> int:
    """Counts the pages of a PDF by path or URI. Raises what `Documents.using` raises."""
    with _explained(PageOfFile(file, 1)) as document:
        return len(document)


def page_text(page: PageOfFile) -> str:
    """Returns the text layer of a page, with `\\n` between lines; empty where the page has none.

    Raises what `pdf_size` raises.
    """
    with _explained(page) as document:
        _check_page(page, document)
        opened = document[page.page - 1]
        text_page = opened.get_textpage()
        try:
            text = text_page.get_text_bounded()
        finally:
            text_page.close()
            opened.close()
    lines = text.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8", "ignore").decode().split("\n")
    return "\n".join(line.rstrip() for line in lines).strip()


@contextmanager
def _explained(page: PageOfFile) -> Iterator[pypdfium2.PdfDocument]:
    """Yields the page's document, locked for this thread; turns errors of PDFium into a RowError that names the
    page."""
    try:
        with _documents.using(page.file) as document:
            yield document
    except (*PASS_THROUGH_ERRORS, RowError):
        raise
    except Exception as error:  # a parser of foreign bytes may raise anything
        raise RowError("pdf_damaged", f"{describe_source(str(page))}: {one_line(error)}; store it anew") from error


def _fetched(file: str) -> bytes | None:
    """Fetches the bytes of a document that PDFium cannot read from a path; returns None for one that it can."""
    by_path = "://" not in file and PartOfFile.written(file) is None
    with image_file(file) as opened:
        return None if by_path else opened.read()


def _opened(file: str, data: bytes | None) -> pypdfium2.PdfDocument:
    try:
        document = pypdfium2.PdfDocument(Path(file) if data is None else data)
        document.init_forms()
    except pypdfium2.PdfiumError as error:
        if error.err_code in (pdfium.FPDF_ERR_PASSWORD, pdfium.FPDF_ERR_SECURITY):
            message = f"{describe_source(file)}: the PDF is encrypted; store it without a password"
            raise RowError("pdf_encrypted", message) from error
        with image_file(file) as opened:
            head = opened.read(CONTENTS_BYTES)
        if b"%PDF-" not in head:
            raise RowError("pdf_damaged", f"{describe_source(file)}: no PDF, but {contents(head)}") from error
        raise RowError("pdf_damaged", f"{describe_source(file)}: {one_line(error)}; store the PDF anew") from error
    return document


def _check_page(page: PageOfFile, document: pypdfium2.PdfDocument) -> None:
    if not 1 <= page.page <= len(document):
        count = len(document)
        message = f"{describe_source(str(page))}: the PDF has {counted(count, 'page')}; name one of 1 to {count}"
        raise RowError("pdf_page", message)


def _size(page: PageOfFile, document: pypdfium2.PdfDocument, max_pixels: int) -> tuple[int, int]:
    _check_page(page, document)
    dpi, points = page.dpi or DEFAULT_PDF_DPI, document.get_page_size(page.page - 1)
    if not all(math.isfinite(length) and length > 0 for length in points):
        raise RowError(
            "pdf_empty_page", f"{describe_source(str(page))}: the page is {points} points large; leave it out"
        )
    width, height = (math.ceil(length * dpi / _POINTS_PER_INCH) for length in points)
    if width * height > max_pixels:
        size = f"{width} x {height} = {width * height} pixels at {dpi} dpi, more than {max_pixels}"
        remedy = "lower images.pdf_dpi or raise the limit (data.max_image_pixels in a job)"
        raise RowError("image_too_large", f"{describe_source(str(page))}: {size}; {remedy}")
    return width, height
