"""Pictures of documents, and the files that hold them, in the formats, modes and turns that users have.

Text is drawn with Pillow's own scalable font, so no font file is needed. What is stored rotated or mirrored
is so stored that the EXIF fix gives the upright page; what is stored with transparency is black text on
nothing, so that a loader that forgets to put it over white shows a black page.
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmray.synthetic.documents import Document

_ORIENTATION_TAG = 0x0112

# EXIF orientation -> what to do to the upright page so that a viewer's fix brings it back.
_STORED_AS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class _Layout:
    size: tuple[int, int]  # (width, height), pixels
    font_size: int
    margin: int


_LAYOUTS = {
    "invoice": _Layout((330, 446), 17, 18),
    "receipt": _Layout((178, 448), 14, 10),
    "timetable": _Layout((448, 300), 18, 20),
    "form": _Layout((340, 340), 17, 18),
    "label": _Layout((90, 40), 16, 6),
}


@dataclass(frozen=True)
class Storage:
    """The form in which a picture is stored.

    suffix: ".jpg" or ".png".
    mode: Pillow's mode of the stored file: "RGB", "L", "P" or "RGBA".
    orientation: EXIF orientation, 1 to 8; other than 1 only in JPEG.
    """

    suffix: str = ".jpg"
    mode: str = "RGB"
    orientation: int = 1


def storage_of(index: int) -> Storage:
    """The storage of page `index`: of 21, three are PNG (palette, RGBA, grey), seven are JPEG stored turned
    or mirrored (orientations 2 to 8), one is a grey JPEG and ten are plain JPEG.
    """
    place = index % 21
    if place in (4, 11, 18):
        return Storage(".png", {4: "P", 11: "RGBA", 18: "L"}[place])
    if place % 2 and place <= 15:
        return Storage(orientation=2 + (1, 3, 5, 7, 9, 13, 15).index(place))
    return Storage(mode="L") if place == 10 else Storage()


def draw_page(document: Document) -> Image.Image:
    """The upright page, RGB, black on white, at most 448 pixels a side. No line leaves the page."""
    return _draw(document, "RGB", "white")


def save_page(document: Document, path: Path, storage: Storage) -> None:
    """Draws a document and writes its file; the same bytes for the same arguments and Pillow."""
    if storage.mode == "RGBA":
        page = _draw(document, "RGBA", (0, 0, 0, 0))
    elif storage.mode == "P":
        page = draw_page(document).quantize(16)
    else:
        page = draw_page(document).convert(storage.mode)
    if storage.suffix == ".png":
        page.save(path)
        return
    exif = Image.Exif()
    if storage.orientation != 1:
        exif[_ORIENTATION_TAG] = storage.orientation
        page = page.transpose(_STORED_AS[storage.orientation])
    page.save(path, quality=90, exif=exif)


def _draw(document: Document, mode: str, background: str | tuple[int, int, int, int]) -> Image.Image:
    layout = _LAYOUTS[document.kind]
    width, height = layout.size
    page = Image.new(mode, layout.size, background)
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(layout.font_size)
    step = min(layout.font_size * 2, (height - 2 * layout.margin) // len(document.lines))
    for number, (left, right) in enumerate(document.lines):
        top = layout.margin + number * step
        pen.text((layout.margin, top), left, fill="black", font=font)
        pen.text((width - layout.margin, top), right, fill="black", font=font, anchor="ra")
    return page
