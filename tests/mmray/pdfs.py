"""PDFs that tests write."""

from pathlib import Path
from typing import Any

import pypdfium2
import pypdfium2.raw as pdfium

ENCRYPTED = b"""%%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 100 100]>>endobj
4 0 obj<</Filter/Standard/V 1/R 2/O<%s>/U<%s>/P -4>>endobj
trailer<</Root 1 0 R/Encrypt 4 0 R/ID[<00><00>]>>
%%%%EOF""" % (b"41" * 32, b"42" * 32)
"""A PDF that asks for a password that nobody knows."""


def pdf_of(path: Path | str, pages: list[dict[str, Any]]) -> str:
    """A PDF whose pages have a coloured square of 40 points at the lower left of the media box, unrotated, and text.

    Of a page: points (width, height), crop (left, bottom, right, top), rotation in degrees, color, text.
    """
    document = pypdfium2.PdfDocument.new()
    for number, settings in enumerate(pages, 1):
        page = document.new_page(*settings.get("points", (200.0, 300.0)))
        square = pdfium.FPDFPageObj_CreateNewRect(0, 0, 40, 40)
        pdfium.FPDFPageObj_SetFillColor(square, *settings.get("color", (255, 0, 0)), 255)
        pdfium.FPDFPath_SetDrawMode(square, pdfium.FPDF_FILLMODE_WINDING, False)
        pdfium.FPDFPage_InsertObject(page, square)
        if text := settings.get("text", f"Page {number}"):
            font = pdfium.FPDFText_LoadStandardFont(document, b"Helvetica")
            line = pdfium.FPDFPageObj_CreateTextObj(document, font, 12)
            letters = text.encode("utf-16-le") + b"\0\0"
            pdfium.FPDFText_SetText(line, (pdfium.FPDF_WCHAR * (len(letters) // 2)).from_buffer_copy(letters))
            pdfium.FPDFPageObj_Transform(line, 1, 0, 0, 1, 60, 60)
            pdfium.FPDFPage_InsertObject(page, line)
        if "crop" in settings:
            page.set_cropbox(*settings["crop"])
        page.set_rotation(settings.get("rotation", 0))
        pdfium.FPDFPage_GenerateContent(page)
    document.save(str(path))
    document.close()
    return str(path)
