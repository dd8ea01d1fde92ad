"""Renders a bin as one web page that needs nothing else: no script, no other file, no network.

The page shows the text as tokens, each with its places and its id in a tooltip, and the tiles that training cuts from
each image, made smaller. The template escapes everything from the data; in case that fails, the page forbids scripts
and foreign content too (Content-Security-Policy).
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mmray.base.visible import visible
from mmray.display.html import template
from mmray.errors import RowError, UserError
from mmray.families import Family
from mmray.images import TilingPolicy, plan_tiles, render_tiles
from mmray.images.header import MAX_PIXELS
from mmray.images.source import describe_source
from mmray.inspect.view import BinView, Piece, SampleView

MAX_PICTURE_PIXELS = 4_000_000
"""Largest number of pixels of all pictures of a page, after scaling: about 1.5 MB as JPEG."""
MAX_PICTURE_SIDE = 1024
JPEG_QUALITY = 70
ROLE_COLOURS = 6
"""Number of role colours in the template; further roles use them again from the first."""


@dataclass(frozen=True)
class Picture:
    """A tile on the page. size: (width, height) of the tile in pixels, before scaling."""

    label: str
    size: tuple[int, int]
    data_uri: str


@dataclass(frozen=True)
class ShownImage:
    """An image of a sample on the page: its overview, then its tiles, or the reason why it cannot be shown.

    size: (width, height) in pixels; columns: number of tiles in a row; direction: reading order of a row, a value of
    HTML's `dir`; error: the reason.
    """

    name: str
    size: tuple[int, int]
    overview: tuple[Picture, ...] = ()
    tiles: tuple[Picture, ...] = ()
    columns: int = 1
    direction: str = "ltr"
    error: str | None = None


@dataclass(frozen=True)
class ShownBin:
    """A bin with its pictures, for `templates/bin.html.jinja`.

    samples: samples with their images; role_class: the CSS class of each role.
    """

    view: BinView
    samples: tuple[tuple[SampleView, tuple[ShownImage, ...]], ...]
    role_class: dict[str, str]


def shown_bin(view: BinView, tiling: TilingPolicy, *, most_pixels: int, most_samples: int | None = None) -> ShownBin:
    """Cut and scale the pictures of a bin.

    view: the bin, with turns; tiling: the dataset's policy; most_pixels: largest number of pixels of all pictures;
    most_samples: number of samples that are shown, from the first; None: all.
    """
    samples = view.samples[:most_samples]
    scale = _scale(samples, tiling, most_pixels)
    return ShownBin(
        view=view,
        samples=tuple((sample, tuple(_shown(image, tiling, scale) for image in sample.images)) for sample in samples),
        role_class={role: f"role-{number % ROLE_COLOURS}" for number, role in enumerate(view.roles)},
    )


def page_of(view: BinView, family: Family, tiling: TilingPolicy) -> str:
    """Render the page of a bin. view: the bin, with turns; tiling: the dataset's policy."""
    return template("inspect.html.jinja").render(
        view=view,
        bin=shown_bin(view, tiling, most_pixels=MAX_PICTURE_PIXELS),
        tooltip=lambda sample, piece: _tooltip(sample, piece, family),
        family=type(family).__name__,
    )


def _tooltip(sample: SampleView, piece: Piece, family: Family) -> str:
    """The tooltip of a piece: its places, its ids, and their entries in the vocabulary."""
    if piece.is_run:
        last = piece.start + len(piece.token_ids) - 1
        places = f"bin {sample.start + piece.start}–{sample.start + last} · sample {piece.start}–{last}"
        return f"{places} · id {piece.token_ids[0]} · {visible(piece.text)}"
    tokens = family.tokenizer.convert_ids_to_tokens(list(piece.token_ids))
    return "\n".join(
        f"bin {sample.start + place} · sample {place} · id {token_id} · {visible(str(token))}"
        for place, (token_id, token) in enumerate(zip(piece.token_ids, tokens), start=piece.start)
    )


def _scale(samples: Sequence[SampleView], tiling: TilingPolicy, most_pixels: int) -> float:
    """The scale of all tiles, at most 1, that keeps the page small."""
    sizes = [
        size
        for sample in samples
        for image in sample.images
        for size in plan_tiles((image["width"], image["height"]), tiling).tile_sizes
    ]
    pixels, longest = sum(width * height for width, height in sizes), max(map(max, sizes), default=1)
    return min(1.0, MAX_PICTURE_SIDE / longest, (most_pixels / max(pixels, 1)) ** 0.5)


def _shown(image: dict[str, Any], tiling: TilingPolicy, scale: float) -> ShownImage:
    size = image["width"], image["height"]
    source = image["data"] if image["data"] is not None else image["uri"]
    name, plan = describe_source(source), plan_tiles(size, tiling)
    try:
        tiles = render_tiles(source, plan, max_pixels=max(MAX_PIXELS, size[0] * size[1]))
    except (RowError, UserError, OSError) as error:
        return ShownImage(name, size, error=str(error))
    pictures = tuple(
        Picture(label or "", tile.size, data_uri(tile, scale)) for label, tile in zip(plan.labels, tiles, strict=True)
    )
    columns, rows = plan.grid
    on_page = len(pictures) - columns * rows
    return ShownImage(
        name,
        size,
        overview=pictures[:on_page],
        tiles=pictures[on_page:],
        columns=columns,
        direction=tiling.reading_order,
    )


def data_uri(tile: Image.Image, scale: float) -> str:
    """A scaled picture as a JPEG in a data URI."""
    size = tuple(max(round(side * scale), 1) for side in tile.size)
    smaller = tile if size == tile.size else tile.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    smaller.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
