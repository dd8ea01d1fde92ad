"""How a page is cut into tiles: settings, checked once, so that planning is arithmetic that cannot fail.

A policy with nothing set cuts nothing: the page is one tile of its own size, and the model family's
processor sizes it. Cutting is asked for by one of `preset`, `grid`, `buckets`; every other setting says
how, and is refused where nothing is cut, since a setting without effect is a mistake someone will look for
later.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self, cast

from PIL import ImageColor
from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, model_validator

from mmray.base.settings import Settings
from mmray.images.paged import DEFAULT_PDF_DPI

Size = tuple[PositiveInt, PositiveInt]
"""(width, height) in pixels."""

MAX_CELLS = 1024
"""Most tiles of a grid: an A0 sheet at 300 dpi has 682 of 448 x 448 pixels."""


def _not_too_many(grid: tuple[int, int]) -> tuple[int, int]:
    columns, rows = grid
    if columns * rows > MAX_CELLS:
        raise ValueError(f"a grid has at most {MAX_CELLS:,} tiles; {columns} x {rows} are {columns * rows:,}")
    return grid


Grid = Annotated[tuple[PositiveInt, PositiveInt], AfterValidator(_not_too_many)]
"""(columns, rows), of at most MAX_CELLS tiles."""


def _square(value: object) -> object:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _color(value: object) -> object:
    """A colour by its name in HTML, or as #rrggbb, in channels."""
    if not isinstance(value, str):
        return value
    try:
        return ImageColor.getrgb(value)
    except ValueError as error:
        raise ValueError(f"no colour {value!r}; write a name such as white, #rrggbb, or [red, green, blue]") from error


SquareOrSize = Annotated[Size, BeforeValidator(_square, json_schema_input_type=PositiveInt | Size)]
"""(width, height) in pixels; one number for both."""

Channel = Annotated[int, Field(ge=0, le=255)]
_Channels = tuple[Channel, Channel, Channel]
Color = Annotated[_Channels, BeforeValidator(_color, json_schema_input_type=str | _Channels)]
"""(red, green, blue) of 0 to 255, or the name of a colour."""
Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Overlap = Annotated[float, Field(ge=0, le=0.49)]

PRESET_TILE_SIZE = (512, 512)
"""Tile size of a preset where the policy names none, (width, height) in pixels."""


_OF_WHOLE_PAGES = ("patch_multiple", "pdf_dpi", "max_pixels", "min_pixels")
"""Settings that also have an effect on pages that are not cut."""
_LATER = ("pdf_dpi", "max_pixels", "min_pixels", "max_tile_pixels")
_LATER_OF_BUCKETS = ("tile_size", "overlap", "overview", "min_area")
"""Settings that came after the first version of prepared datasets."""


class ShapeBucket(Settings):
    """The grid for pages in a range of shapes."""

    max_ratio: Ratio | None = None
    """Upper limit, exclusive, of a page's height divided by its width. A page uses the first bucket whose limit it is
    under. null, in the last bucket only: no limit."""

    grid: Grid
    """Number of tiles as (columns, rows)."""

    tile_size: SquareOrSize | None = None
    """Size of the tiles of these pages, (width, height) in pixels, or one number for both; null: the policy's. With a
    grid of [1, 1] the whole page stands on a canvas of this size."""

    overlap: Overlap | None = None
    """How far a tile of these pages extends beyond its cell on each side, as a fraction of the cell's width and height;
    null: the policy's."""

    overview: SquareOrSize | Literal[False] | None = None
    """Size of the additional first tile that shows the whole page; false: none; null: the policy's."""

    min_area: Annotated[int, Field(ge=0)] | None = None
    """Smallest area (width times height) of such a page that is cut; null: the policy's."""


class OverviewBucket(Settings):
    """The overview's size for pages in a range of shapes."""

    max_ratio: Ratio | None = None
    """Upper limit, exclusive, of a page's height divided by its width. A page uses the first bucket whose limit it is
    under. null, in the last bucket only: no limit."""

    size: Size
    """Size of the overview tile, (width, height) in pixels."""


PRESETS = {
    "ocr_pages": (
        ShapeBucket(max_ratio=0.9, grid=(3, 2)),
        ShapeBucket(max_ratio=1.7, grid=(2, 3)),
        ShapeBucket(max_ratio=None, grid=(2, 4)),
    ),
}
"""Ready-made buckets. ocr_pages: landscape sheets, portrait sheets, and what is longer (receipts,
columns)."""


class TilingPolicy(Settings):
    """How pages are cut into tiles. Sizes are (width, height) in pixels of the upright page."""

    preset: Literal["ocr_pages"] | None = None
    """A ready-made set of grids. ocr_pages: 3 columns x 2 rows for pages with height / width under 0.9, 2 x 3 under
    1.7, 2 x 4 above; tiles of 512 x 512 unless tile_size or native_resolution says otherwise. Excludes grid and
    buckets."""

    grid: Grid | None = None
    """One grid for every page, (columns, rows). Excludes preset and buckets."""

    buckets: tuple[ShapeBucket, ...] | None = None
    """Grids chosen by the page's shape, by ascending max_ratio; the last one has max_ratio null. Excludes preset and
    grid."""

    tile_size: SquareOrSize | None = None
    """Size of every tile, (width, height) in pixels, or one number for both. A crop is scaled to fit, keeping its
    aspect ratio, and padded at the right or the bottom. Excludes native_resolution."""

    native_resolution: bool = False
    """Keep the page's own pixels and only pad tiles, at the right and the bottom, to multiples of patch_multiple.
    Excludes tile_size."""

    max_tile_pixels: PositiveInt | None = None
    """Largest area (width times height) of a tile under native_resolution; larger tiles are scaled down to fit. null:
    no limit."""

    max_pixels: PositiveInt | None = None
    """Largest area (width times height) of a page that is not cut into tiles; a larger page is scaled down to fit
    before the model's processor sizes it. null: the processor's own limit."""

    min_pixels: PositiveInt | None = None
    """Smallest area (width times height) of a page that is not cut into tiles; a smaller page is enlarged to it before
    the model's processor sizes it. null: the processor's own limit."""

    overlap: Overlap = 0.0
    """How far a tile extends beyond its cell on each side, as a fraction of the cell's width and height. Tiles end at
    the page's edge."""

    min_area: Annotated[int, Field(ge=0)] = 0
    """Smallest area (width times height) of a page that is cut. A smaller page becomes one tile, without overview and
    label."""

    overview: Size | tuple[OverviewBucket, ...] | None = None
    """Size of an additional first tile that shows the whole page: (width, height) in pixels, or sizes chosen by the
    page's shape, by ascending max_ratio, the last one with max_ratio null. null: no overview."""

    no_upscale: bool = False
    """Pad a crop that is smaller than its tile at its own scale, instead of enlarging it."""

    pad_color: Color = (255, 255, 255)
    """Colour of the padding: (red, green, blue) of 0 to 255, or a name (`white`, `"#f0f0f0"`)."""

    reading_order: Literal["ltr", "rtl"] = "ltr"
    """Order of the tiles in a row, left to right or right to left. Rows go from top to bottom."""

    labels: bool | Literal["tokens"] = False
    """Write a label before each tile of a page of several tiles: <global_img> before the overview, <row1_col1> and so
    on before the others. Columns are counted from the left in either reading order. A page of one tile has no label.
    tokens: write the model's own tokens <global-img>, <row_1_col_1> and so on, which Idefics3, SmolVLM and
    Granite-Docling have; a label is then one token, and as text several."""

    exact_pixels: bool = False
    """Decode pages whole and resize them with Pillow. false: tiles are made two to seven times faster. A JPEG at least
    2.4 times as wide and high as its tiles is then decoded at a half, a quarter or an eighth of its size, and its tiles
    differ by 0.3 of 255 on average (1.5 on a sheet full of small print). Other tiles differ by 1 or 2 of 255, and by up
    to 25 in at most one of 150 pixels, along sharp edges. The setting changes what the model sees but no tokens; like
    every setting here, it is fixed when the dataset is prepared."""

    pdf_dpi: Annotated[int, Field(ge=18, le=1200)] = DEFAULT_PDF_DPI
    """Resolution of rendered PDF pages, in pixels per inch; a set of rows may set its own. Image files keep their own
    pixels."""

    patch_multiple: PositiveInt = 1
    """Number of pixels that tile widths and heights are a multiple of. Set by the model family."""

    @property
    def is_tiled(self) -> bool:
        """True if pages are cut into tiles."""
        return bool(self.preset or self.grid or self.buckets)

    @property
    def shape_buckets(self) -> tuple[ShapeBucket, ...]:
        """Grids by page shape, from preset, grid or buckets. Empty: pages are not cut."""
        if self.preset:
            return PRESETS[self.preset]
        if self.grid:
            return (ShapeBucket(grid=self.grid),)
        return self.buckets or ()

    @property
    def overview_buckets(self) -> tuple[OverviewBucket, ...]:
        """Sizes of the overview by page shape. Empty: no overview."""
        if not self.overview:
            return ()
        buckets = tuple(bucket for bucket in self.overview if isinstance(bucket, OverviewBucket))
        return buckets or (OverviewBucket(size=cast(Size, self.overview)),)

    @property
    def fixed_sizes(self) -> tuple[Size, ...]:
        """Every size, (width, height) in pixels, that the policy and its buckets set for tiles and overviews."""
        sizes = [self.tile_size, *(bucket.size for bucket in self.overview_buckets)]
        for bucket in self.buckets or ():
            sizes += [bucket.tile_size, bucket.overview or None]
        return tuple(size for size in sizes if size)

    def aligned(self, multiple: int) -> Self:
        """Adapt the policy to a model family whose merged patches cover `multiple` x `multiple` pixels.

        Sizes of tiles and overview are rounded to the nearest multiple (a half upwards, to at least one), and
        patch_multiple, which native tiles are padded to, is set. Raises ValueError for multiple < 1.
        """
        if multiple < 1:
            raise ValueError(f"tile sizes are multiples of at least 1 pixel, not {multiple}")

        def nearest(size: Size) -> Size:
            width, height = (max(1, (2 * pixels + multiple) // (2 * multiple)) * multiple for pixels in size)
            return width, height

        return self._with(patch_multiple=multiple, **self._sized(nearest))

    def with_fixed_tiles(self, size: Size) -> Self:
        """Adapt the policy to a model family that only accepts tiles of one size, by giving it to tiles and overview.

        A policy that cuts nothing is returned as it is, because the family's processor sizes the page. Raises
        ValueError for native_resolution, which cannot give tiles of one size.
        """
        if not self.is_tiled:
            return self
        if self.native_resolution:
            raise ValueError(
                f"native_resolution: this model takes tiles of {size[0]} x {size[1]} pixels only; "
                "remove native_resolution"
            )
        return self._with(**self._sized(lambda _: size))

    def record(self) -> dict[str, Any]:
        """Return the settings as plain JSON for a prepared dataset's record.

        Settings newer than the first version of the record are left out if they have their default.
        """
        fields = type(self).model_fields
        unsaid = {name for name in _LATER if getattr(self, name) == fields[name].default}
        record = self.model_dump(mode="json", exclude=unsaid)
        for bucket in record["buckets"] or ():
            for name in _LATER_OF_BUCKETS:
                if bucket[name] is None:
                    del bucket[name]
        return record

    def _sized(self, sized: Callable[[Size], Size]) -> dict[str, Any]:
        """Returns the settings that hold sizes, each size changed."""
        overview = [OverviewBucket(max_ratio=b.max_ratio, size=sized(b.size)) for b in self.overview_buckets]
        buckets = [
            bucket.model_copy(
                update={
                    "tile_size": bucket.tile_size and sized(bucket.tile_size),
                    "overview": sized(bucket.overview) if bucket.overview else bucket.overview,
                }
            )
            for bucket in self.buckets or ()
        ]
        return {
            "tile_size": self.tile_size and sized(self.tile_size),
            "overview": overview[0].size if len(overview) == 1 else overview or None,
            "buckets": buckets or None,
        }

    def _with(self, **changes: object) -> Self:
        return self.model_validate({**self.model_dump(), **changes})

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        grids = [name for name in ("preset", "grid", "buckets") if getattr(self, name) is not None]
        if len(grids) > 1:
            raise ValueError(f"{' and '.join(grids)} exclude each other; keep one of them")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels ({self.min_pixels}) is more than max_pixels ({self.max_pixels}); lower it")
        if grids and (self.max_pixels or self.min_pixels):
            raise ValueError("max_pixels and min_pixels size pages that are not cut; set tile_size or max_tile_pixels")
        if not grids:
            self._check_nothing_is_set()
            return self
        if self.buckets is not None:
            _check_buckets("buckets", self.buckets)
        if self.overview is not None:
            _check_buckets("overview", self.overview_buckets)
        if self.preset and not self.tile_size and not self.native_resolution:
            object.__setattr__(self, "tile_size", PRESET_TILE_SIZE)
        self._check_tile_sizes(grids[0])
        return self

    def _check_nothing_is_set(self) -> None:
        fields = type(self).model_fields
        names = [name for name, field in fields.items() if getattr(self, name) != field.default]
        without_effect = [name for name in names if name not in _OF_WHOLE_PAGES]
        if without_effect:
            listed = ", ".join(without_effect)
            raise ValueError(f"{listed}: without effect, as pages are not cut; remove, or set preset, grid or buckets")

    def _check_tile_sizes(self, grid: str) -> None:
        if self.tile_size and self.native_resolution:
            raise ValueError("tile_size and native_resolution exclude each other; keep one of them")
        sized_buckets = [bucket for bucket in self.buckets or () if bucket.tile_size]
        if sized_buckets and self.native_resolution:
            raise ValueError("tile_size of a bucket and native_resolution exclude each other; keep one of them")
        has_size = self.tile_size or (sized_buckets and len(sized_buckets) == len(self.buckets or ()))
        if not has_size and not self.native_resolution:
            raise ValueError(f"tile_size: {grid} needs it; set it, or native_resolution: true")
        if self.max_tile_pixels and not self.native_resolution:
            raise ValueError("max_tile_pixels: without effect, as tile_size sizes tiles; remove it")
        has_overview = self.overview or any(bucket.overview for bucket in self.buckets or ())
        if self.no_upscale and self.native_resolution and not has_overview:
            raise ValueError("no_upscale: without effect, as native_resolution scales nothing; remove it")


def _check_buckets(field: str, buckets: Sequence[ShapeBucket | OverviewBucket]) -> None:
    """Check that the buckets of a field cover every shape once: ascending limits, and none on the last bucket only."""
    limits = [bucket.max_ratio for bucket in buckets]
    if not limits or limits[-1] is not None:
        raise ValueError(f"{field}: the last bucket takes every remaining page; end with max_ratio: null")
    closed = [limit for limit in limits[:-1] if limit is not None]
    if len(closed) < len(limits) - 1:
        raise ValueError(f"{field}: a max_ratio of null takes every remaining page; only the last may have it")
    if closed != sorted(set(closed)):
        raise ValueError(f"{field}: max_ratio must ascend from bucket to bucket, not {closed}; sort them")
