"""Plans the tiles of a page from its size (`plan_tiles`), and cuts them as planned (`cut_tiles`).

Preparing plans from the header's size; training cuts from the pixels, days later and on other machines. The plan is a
pure function of size and policy, so both see the same tiles. Cells are the page divided by whole numbers, edges rounded
down: every pixel is in some tile, and a page narrower than its number of columns has tiles that repeat pixels rather
than empty ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from PIL import Image

from mmray.errors import RowError
from mmray.images.policy import OverviewBucket, ShapeBucket, TilingPolicy

Box = tuple[int, int, int, int]
UNTILED_SHAPE = "page"
OVERVIEW_LABEL, OVERVIEW_TOKEN = "<global_img>", "<global-img>"

_AnyBucket = TypeVar("_AnyBucket", ShapeBucket, OverviewBucket)
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePlan:
    """The tiles of one page, in reading order, the overview first. Tuples have one entry for each tile."""

    size: tuple[int, int]
    """The size (width, height) of the upright page in pixels."""
    shape: str
    """The visual shape, a key to group pages by: equal for cut pages with the same grid and tile_sizes, for example
    "2x3@512x512" or, with an overview, "2x3@512x512+448x448"; "page" for every page that is not cut."""
    grid: tuple[int, int]
    """The grid (columns, rows) of tiles, without the overview."""
    boxes: tuple[Box, ...]
    """The region that each tile shows: (left, top, right, bottom) in pixels of the upright page, right and bottom
    excluded."""
    tile_sizes: tuple[tuple[int, int], ...]
    """The size (width, height) of each tile in pixels."""
    labels: tuple[str | None, ...]
    """The text before each tile; None: no text."""
    upscale: tuple[bool, ...]
    """True for each tile whose smaller box is enlarged to fit the tile; otherwise the box keeps its scale."""
    pad_color: tuple[int, int, int]
    """The colour (red, green, blue) of the part of a tile that its box does not fill."""
    label_end: str = "\n"
    """The text between a label and its tile."""
    exact_pixels: bool
    """True if `render_tiles` decodes and resizes exactly as `load_image` and `cut_tiles` do; otherwise faster."""

    @property
    def inner_sizes(self) -> tuple[tuple[int, int], ...]:
        """The (width, height) in pixels to which each box is scaled, at the top left of its tile."""
        return tuple(map(_inner_size, self.boxes, self.tile_sizes, self.upscale))

    @property
    def label_texts(self) -> tuple[str, ...]:
        """The text before each tile, its label with `label_end`; empty where it has no label."""
        return tuple(f"{label}{self.label_end}" if label else "" for label in self.labels)

    @property
    def is_tiled(self) -> bool:
        """True if the policy cuts or scales the page; otherwise it is left to the model family's processor."""
        return self.shape != UNTILED_SHAPE or self.tile_sizes != (self.size,)


def plan_tiles(size: tuple[int, int], policy: TilingPolicy) -> TilePlan:
    """Plans the tiles of a page. size: its (width, height) in pixels, upright.

    Raises ValueError for a page smaller than 1 x 1.
    """
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"a page has at least 1 x 1 pixels, not {width} x {height}")
    if not policy.is_tiled:
        return _untiled_plan((width, height), policy)
    ratio = height / width
    bucket = _bucket_of(policy.shape_buckets, ratio)
    is_small = width * height < _chosen(bucket.min_area, policy.min_area)
    grid = (1, 1) if is_small else bucket.grid
    cells = _cells(grid, policy.reading_order)
    overlap = _chosen(bucket.overlap, policy.overlap)
    boxes = [_cell_box(size, grid, cell, overlap) for cell in cells]
    tile_size = bucket.tile_size or policy.tile_size
    tile_sizes = [tile_size or _native_size(box, policy) for box in boxes]
    labels = [_label(row, column, policy) for column, row in cells]
    upscale = [not policy.no_upscale and not policy.native_resolution] * len(cells)
    shape = f"{grid[0]}x{grid[1]}@{_sizes_key(tile_sizes)}"
    overview_size = _overview_size(bucket, ratio, policy)
    if overview_size and not is_small:
        boxes.insert(0, (0, 0, width, height))
        tile_sizes.insert(0, overview_size)
        labels.insert(0, OVERVIEW_TOKEN if policy.labels == "tokens" else OVERVIEW_LABEL)
        upscale.insert(0, not policy.no_upscale)
        shape += f"+{overview_size[0]}x{overview_size[1]}"
    has_labels = policy.labels and len(boxes) > 1
    return TilePlan(
        size=(width, height),
        shape=shape,
        grid=grid,
        boxes=tuple(boxes),
        tile_sizes=tuple(tile_sizes),
        labels=tuple(labels) if has_labels else (None,) * len(boxes),
        upscale=tuple(upscale),
        pad_color=policy.pad_color,
        exact_pixels=policy.exact_pixels,
        label_end="" if policy.labels == "tokens" else "\n",
    )


def label_tokens(policy: TilingPolicy) -> list[str]:
    """Lists the model's own tokens that a policy writes as labels; none for labels as text."""
    if policy.labels != "tokens":
        return []
    grids = [bucket.grid for bucket in policy.shape_buckets]
    columns, rows = (max(grid[side] for grid in grids) for side in (0, 1))
    return [OVERVIEW_TOKEN, *(_label(row, column, policy) for row in range(rows) for column in range(columns))]


def cut_tiles(image: Image.Image, plan: TilePlan) -> list[Image.Image]:
    """Cuts the RGB tiles of a page, in the plan's order and sizes. A page that is not cut is returned unchanged.

    A box is scaled to fit its tile (bicubic, aspect ratio kept) and stands at the tile's top left; the remaining part
    of the tile is pad_color. Boxes are not centred because text begins at the top left, and so a page's coordinates in
    a tile are one multiplication.

    Raises RowError `image_changed` where the page's size differs from the plan's; ValueError for a mode other than RGB.
    """
    check_planned(image.size, plan)
    if not plan.is_tiled:
        return [image]
    if image.mode != "RGB":
        raise ValueError(f"tiles are cut from the RGB pages of load_image, not from mode {image.mode!r}")
    return [
        padded(_cut(image, box, inner_size), tile_size, plan.pad_color)
        for box, inner_size, tile_size in zip(plan.boxes, plan.inner_sizes, plan.tile_sizes, strict=True)
    ]


def check_planned(size: tuple[int, int], plan: TilePlan) -> None:
    """Raises RowError `image_changed` where a page's size, (width, height) in pixels, differs from the plan's."""
    if size != plan.size:
        planned_size, image_size = ("{} x {}".format(*pair) for pair in (plan.size, size))
        message = f"planned for {planned_size} pixels, the image now has {image_size}; prepare the dataset again"
        raise RowError("image_changed", message)


def padded(inner: Image.Image, tile_size: tuple[int, int], pad_color: tuple[int, int, int]) -> Image.Image:
    """Returns a tile with `inner` at its top left."""
    if inner.size == tile_size:
        return inner
    tile = Image.new("RGB", tile_size, pad_color)
    tile.paste(inner, (0, 0))
    return tile


def _untiled_plan(size: tuple[int, int], policy: TilingPolicy) -> TilePlan:
    scaled_size = _whole_size(size, policy)
    return TilePlan(
        size=size,
        shape=UNTILED_SHAPE,
        grid=(1, 1),
        boxes=((0, 0, *size),),
        tile_sizes=(scaled_size,),
        labels=(None,),
        upscale=(scaled_size[0] * scaled_size[1] > size[0] * size[1],),
        pad_color=policy.pad_color,
        exact_pixels=policy.exact_pixels,
    )


def _bucket_of(buckets: Sequence[_AnyBucket], ratio: float) -> _AnyBucket:
    return next(bucket for bucket in buckets if bucket.max_ratio is None or ratio < bucket.max_ratio)


def _chosen(of_bucket: _Number | None, of_policy: _Number) -> _Number:
    return of_policy if of_bucket is None else of_bucket


def _overview_size(bucket: ShapeBucket, ratio: float, policy: TilingPolicy) -> tuple[int, int] | None:
    if bucket.overview is not None:
        return bucket.overview or None
    return _bucket_of(policy.overview_buckets, ratio).size if policy.overview else None


def _label(row: int, column: int, policy: TilingPolicy) -> str:
    if policy.labels == "tokens":
        return f"<row_{row + 1}_col_{column + 1}>"
    return f"<row{row + 1}_col{column + 1}>"


def _cells(grid: tuple[int, int], reading_order: str) -> list[tuple[int, int]]:
    """Lists the (column, row) of each cell, counted from 0 at the top left, in reading order."""
    columns = range(grid[0]) if reading_order == "ltr" else range(grid[0] - 1, -1, -1)
    return [(column, row) for row in range(grid[1]) for column in columns]


def _cell_box(size: tuple[int, int], grid: tuple[int, int], cell: tuple[int, int], overlap: float) -> Box:
    left, right = _span(size[0], grid[0], cell[0], overlap)
    top, bottom = _span(size[1], grid[1], cell[1], overlap)
    return left, top, right, bottom


def _span(length: int, parts: int, index: int, overlap: float) -> tuple[int, int]:
    """Returns start and end of one of `parts` cells along `length` pixels, widened by the overlap; never empty."""
    start = index * length // parts
    end = max((index + 1) * length // parts, start + 1)
    margin = round(overlap * length / parts)
    return max(start - margin, 0), min(end + margin, length)


def _whole_size(size: tuple[int, int], policy: TilingPolicy) -> tuple[int, int]:
    """Returns the size of a page that is not cut: its aspect ratio within the policy's limits of pixels."""
    num_pixels = size[0] * size[1]
    if policy.max_pixels and num_pixels > policy.max_pixels:
        wanted, is_larger = policy.max_pixels, False
    elif policy.min_pixels and num_pixels < policy.min_pixels:
        wanted, is_larger = policy.min_pixels, True
    else:
        return size
    short, long = sorted(size)
    exact_short = short * math.sqrt(wanted / num_pixels)
    scaled_short = math.ceil(exact_short) if is_larger else max(1, math.floor(exact_short))
    scaled_long = max(1, round(long * scaled_short / short))
    if is_larger:
        scaled_long = max(scaled_long, -(-wanted // scaled_short))
    else:
        scaled_long = min(scaled_long, max(1, wanted // scaled_short))
    return (scaled_short, scaled_long) if size[0] <= size[1] else (scaled_long, scaled_short)


def _native_size(box: Box, policy: TilingPolicy) -> tuple[int, int]:
    """Returns the size of a tile in the page's resolution, or in as many pixels as max_tile_pixels allows."""
    multiple, max_pixels = policy.patch_multiple, policy.max_tile_pixels
    width, height = _padded_size(box, multiple)
    if max_pixels is None or width * height <= max_pixels:
        return width, height
    scale = math.sqrt(max_pixels / (width * height))
    width, height = (max(1, int(side * scale / multiple)) * multiple for side in (width, height))
    return width, height


def _padded_size(box: Box, multiple: int) -> tuple[int, int]:
    """Returns the size of a box, rounded up to multiples."""
    left, top, right, bottom = box
    return -(-(right - left) // multiple) * multiple, -(-(bottom - top) // multiple) * multiple


def _sizes_key(tile_sizes: Sequence[tuple[int, int]]) -> str:
    """Writes one size where all are equal, else the runs of equal sizes: "512x512" or "400x512*2,384x512"."""
    runs = [(size, len(list(run))) for size, run in groupby(tile_sizes)]
    if len(runs) == 1:
        ((width, height), _) = runs[0]
        return f"{width}x{height}"
    counted = [(f"{width}x{height}", count) for (width, height), count in runs]
    return ",".join(f"{size}*{count}" if count > 1 else size for size, count in counted)


def _inner_size(box: Box, tile_size: tuple[int, int], upscale: bool) -> tuple[int, int]:
    width, height = box[2] - box[0], box[3] - box[1]
    scale = min(tile_size[0] / width, tile_size[1] / height)
    if not upscale:
        scale = min(scale, 1.0)
    return _scaled(width, scale, tile_size[0]), _scaled(height, scale, tile_size[1])


def _scaled(length: int, scale: float, limit: int) -> int:
    return min(max(round(length * scale), 1), limit)


def _cut(image: Image.Image, box: Box, inner_size: tuple[int, int]) -> Image.Image:
    box_size = (box[2] - box[0], box[3] - box[1])
    if inner_size != box_size:
        return image.resize(inner_size, Image.Resampling.BICUBIC, box=box)
    return image if box_size == image.size else image.crop(box)
