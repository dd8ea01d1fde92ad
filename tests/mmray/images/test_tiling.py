"""Plans of tiles and tiles cut by them: laws over many pages, and examples worked out by hand."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmray.errors import RowError
from mmray.images import (
    OverviewBucket,
    ShapeBucket,
    TilePlan,
    TilingPolicy,
    cut_tiles,
    image_size,
    load_image,
    plan_tiles,
)
from mmray.images.tiling import label_tokens

PAGES = Path(__file__).resolve().parents[4] / "shared/data/pages"
needs_pages = pytest.mark.skipif(not PAGES.is_dir(), reason="the shared test data is not here")

sides = st.integers(1, 40) | st.integers(1, 5000)
page_sizes = st.tuples(sides, sides)
grids = st.tuples(st.integers(1, 6), st.integers(1, 6))
tile_sizes = st.tuples(st.integers(1, 600), st.integers(1, 600))


@st.composite
def policies(draw: st.DrawFn) -> TilingPolicy:
    """Policies that cut, of every kind."""
    native = draw(st.booleans())
    overview = draw(st.none() | tile_sizes)
    buckets = draw(
        st.none()
        | st.tuples(grids, grids).map(lambda g: (ShapeBucket(max_ratio=1.0, grid=g[0]), ShapeBucket(grid=g[1])))
    )
    return TilingPolicy(
        grid=None if buckets else draw(grids),
        buckets=buckets,
        tile_size=None if native else draw(tile_sizes),
        native_resolution=native,
        overlap=draw(st.just(0.0) | st.floats(0, 0.49)),
        min_area=draw(st.sampled_from([0, 500, 10**6])),
        overview=overview,
        no_upscale=draw(st.booleans()) and not (native and overview is None),
        reading_order=draw(st.sampled_from(["ltr", "rtl"])),
        labels=draw(st.booleans()),
        patch_multiple=draw(st.sampled_from([1, 14, 28])),
    )


def changed(policy: TilingPolicy, **fields: object) -> TilingPolicy:
    return TilingPolicy.model_validate({**policy.model_dump(), **fields})


def cells_of(plan: TilePlan) -> list[tuple[int, int, int, int]]:
    """The boxes without the overview."""
    return list(plan.boxes[-plan.grid[0] * plan.grid[1] :])


def spans(plan: TilePlan, axis: int) -> list[tuple[int, int]]:
    return sorted({(box[axis], box[axis + 2]) for box in cells_of(plan)})


# ------------------------------------------------------------ laws of plans


@given(page_sizes, policies())
def test_every_pixel_is_in_a_tile_and_no_tile_leaves_the_page(size: tuple[int, int], policy: TilingPolicy) -> None:
    plan = plan_tiles(size, policy)
    for left, top, right, bottom in plan.boxes:
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
    for axis, length in enumerate(size):
        parts = spans(plan, axis)
        assert parts[0][0] == 0
        assert max(end for _, end in parts) == length
        assert all(after[0] <= before[1] for before, after in pairwise(parts)), "no gap"
    product = [(x[0], y[0], x[1], y[1]) for x in spans(plan, 0) for y in spans(plan, 1)]
    assert set(cells_of(plan)) == set(product), "the tiles are a grid: covered axes are a covered page"


@given(page_sizes, policies())
def test_entries_of_a_plan(size: tuple[int, int], policy: TilingPolicy) -> None:
    plan = plan_tiles(size, policy)
    is_small = size[0] * size[1] < policy.min_area
    count = plan.grid[0] * plan.grid[1] + (policy.overview is not None and not is_small)
    assert plan.is_tiled
    assert len(plan.boxes) == len(plan.tile_sizes) == len(plan.labels) == len(plan.upscale) == count
    assert plan.size == size
    if is_small:
        assert (plan.grid, plan.boxes, plan.labels) == ((1, 1), ((0, 0, *size),), (None,))
    elif policy.overview is not None:
        assert (plan.boxes[0], plan.tile_sizes[0]) == ((0, 0, *size), policy.overview)
    if policy.tile_size:
        assert set(plan.tile_sizes[-plan.grid[0] * plan.grid[1] :]) == {policy.tile_size}
    else:
        for (left, top, right, bottom), (width, height) in zip(cells_of(plan), plan.tile_sizes[-len(cells_of(plan)) :]):
            assert width % policy.patch_multiple == height % policy.patch_multiple == 0
            assert 0 <= width - (right - left) < policy.patch_multiple
            assert 0 <= height - (bottom - top) < policy.patch_multiple


@given(page_sizes, policies())
def test_right_to_left_reverses_each_row_and_keeps_each_label(size: tuple[int, int], policy: TilingPolicy) -> None:
    ltr = plan_tiles(size, changed(policy, reading_order="ltr"))
    rtl = plan_tiles(size, changed(policy, reading_order="rtl"))
    columns, count = ltr.grid[0], len(cells_of(ltr))
    first = len(ltr.boxes) - count
    order = [*range(first), *(first + at - at % columns + columns - 1 - at % columns for at in range(count))]
    for field in ("boxes", "labels", "tile_sizes", "upscale"):
        assert getattr(rtl, field) == tuple(getattr(ltr, field)[at] for at in order)


@given(page_sizes, policies(), st.floats(0, 0.49))
def test_overlap_widens_cells_and_ends_at_the_page(size: tuple[int, int], policy: TilingPolicy, overlap: float) -> None:
    bare, wide = (plan_tiles(size, changed(policy, overlap=each)) for each in (0, overlap))
    assert (bare.grid, len(bare.boxes)) == (wide.grid, len(wide.boxes))
    for small, large in zip(cells_of(bare), cells_of(wide)):
        for axis in (0, 1):
            margin = round(overlap * size[axis] / bare.grid[axis])
            assert large[axis] == max(small[axis] - margin, 0)
            assert large[axis + 2] == min(small[axis + 2] + margin, size[axis])


@given(page_sizes, policies())
def test_cells_differ_by_a_pixel_at_most(size: tuple[int, int], policy: TilingPolicy) -> None:
    plan = plan_tiles(size, changed(policy, overlap=0))
    for axis in (0, 1):
        lengths = [end - start for start, end in spans(plan, axis)]
        assert max(lengths) - min(lengths) <= 1


@given(st.data(), policies())
def test_shapes_are_equal_where_grid_and_sizes_are(data: st.DataObject, policy: TilingPolicy) -> None:
    """Pages that differ by few pixels, so that native sizes meet; policies that differ, so that grids do."""
    near = st.tuples(st.integers(300, 303), st.integers(300, 303))
    one = plan_tiles(data.draw(near), policy)
    other = plan_tiles(data.draw(near), data.draw(st.just(policy) | policies()))
    assert (one.shape == other.shape) == ((one.grid, one.tile_sizes) == (other.grid, other.tile_sizes))


@given(page_sizes, policies())
def test_a_plan_is_a_pure_function(size: tuple[int, int], policy: TilingPolicy) -> None:
    again = TilingPolicy.model_validate_json(policy.model_dump_json())
    assert plan_tiles(size, policy) == plan_tiles(size, again)
    assert hash(plan_tiles(size, policy)) == hash(plan_tiles(size, again))


# ------------------------------------------------------------ examples of plans


def test_a_page_that_is_not_cut() -> None:
    plan = plan_tiles((850, 1100), TilingPolicy())
    assert plan == plan_tiles((850, 1100), TilingPolicy(patch_multiple=28))
    assert (plan.shape, plan.grid, plan.boxes) == ("page", (1, 1), ((0, 0, 850, 1100),))
    assert (plan.tile_sizes, plan.labels, plan.is_tiled) == (((850, 1100),), (None,), False)


def test_a_page_worked_out_by_hand() -> None:
    policy = TilingPolicy(grid=(2, 2), tile_size=(448, 336), overlap=0.1, overview=(336, 448), labels=True)
    plan = plan_tiles((101, 200), policy)
    assert plan.boxes == (
        (0, 0, 101, 200),
        (0, 0, 55, 110),
        (45, 0, 101, 110),
        (0, 90, 55, 200),
        (45, 90, 101, 200),
    )
    assert plan.labels == ("<global_img>", "<row1_col1>", "<row1_col2>", "<row2_col1>", "<row2_col2>")
    assert plan.tile_sizes == ((336, 448), *[(448, 336)] * 4)
    assert plan.shape == "2x2@448x336+336x448"


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((1000, 899), (3, 2)),
        ((1000, 900), (2, 3)),
        ((1000, 1699), (2, 3)),
        ((1000, 1700), (2, 4)),
        ((9000, 10), (3, 2)),
        ((10, 9000), (2, 4)),
    ],
)
def test_the_preset_by_shape(size: tuple[int, int], grid: tuple[int, int]) -> None:
    plan = plan_tiles(size, TilingPolicy(preset="ocr_pages"))
    assert plan.grid == grid
    assert plan.shape == f"{grid[0]}x{grid[1]}@512x512"


def test_overviews_by_shape() -> None:
    overview = (OverviewBucket(max_ratio=1, size=(448, 336)), OverviewBucket(size=(336, 448)))
    policy = TilingPolicy(preset="ocr_pages", overview=overview)
    assert plan_tiles((1000, 999), policy).tile_sizes[0] == (448, 336)
    assert plan_tiles((1000, 1000), policy).tile_sizes[0] == (336, 448)


def test_a_small_page_is_one_tile() -> None:
    policy = TilingPolicy(preset="ocr_pages", min_area=10_000, overview=(448, 448), labels=True)
    assert plan_tiles((100, 99), policy).shape == "1x1@512x512"
    assert plan_tiles((100, 100), policy).shape == "2x3@512x512+448x448"


def test_labels_of_one_tile() -> None:
    policy = TilingPolicy(grid=(1, 1), tile_size=(64, 64), labels=True)
    assert plan_tiles((9, 9), policy).labels == (None,)
    assert plan_tiles((9, 9), changed(policy, overview=(64, 64))).labels == ("<global_img>", "<row1_col1>")


def test_native_sizes_are_in_the_shape() -> None:
    policy = TilingPolicy(grid=(3, 1), native_resolution=True)
    assert plan_tiles((300, 50), policy).shape == "3x1@100x50"
    assert plan_tiles((302, 50), policy).shape == "3x1@100x50,101x50*2"
    assert plan_tiles((302, 50), policy.aligned(28)).shape == "3x1@112x56"


def test_a_page_narrower_than_its_columns() -> None:
    plan = plan_tiles((2, 3), TilingPolicy(grid=(4, 1), tile_size=(8, 8)))
    assert [(box[0], box[2]) for box in plan.boxes] == [(0, 1), (0, 1), (1, 2), (1, 2)]


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_a_page_without_pixels(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="1 x 1"):
        plan_tiles(size, TilingPolicy())


# ------------------------------------------------------------ cutting


def picture(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


@given(st.tuples(st.integers(1, 90), st.integers(1, 90)), policies())
@settings(max_examples=60, deadline=None)
def test_tiles_have_the_planned_sizes(size: tuple[int, int], policy: TilingPolicy) -> None:
    plan = plan_tiles(size, policy)
    tiles = cut_tiles(picture(*size), plan)
    assert tuple(tile.size for tile in tiles) == plan.tile_sizes
    assert {tile.mode for tile in tiles} == {"RGB"}


def test_a_page_that_is_not_cut_is_returned_itself() -> None:
    page = picture(30, 20)
    (tile,) = cut_tiles(page, plan_tiles((30, 20), TilingPolicy()))
    assert tile is page


def test_native_tiles_put_together_are_the_page() -> None:
    page, again = picture(61, 47), Image.new("RGB", (61, 47))
    plan = plan_tiles(page.size, TilingPolicy(grid=(3, 4), native_resolution=True, reading_order="rtl"))
    for tile, box in zip(cut_tiles(page, plan), plan.boxes, strict=True):
        again.paste(tile, box[:2])
    assert same(again, page)


def test_native_tiles_are_padded_at_the_right_and_the_bottom() -> None:
    page = picture(50, 30)
    policy = TilingPolicy(grid=(2, 1), native_resolution=True, pad_color=(1, 2, 3)).aligned(28)
    first, second = cut_tiles(page, plan_tiles(page.size, policy))
    assert first.size == second.size == (28, 56)
    assert same(second.crop((0, 0, 25, 30)), page.crop((25, 0, 50, 30)))
    assert same(second.crop((25, 0, 28, 56)), Image.new("RGB", (3, 56), (1, 2, 3)))
    assert same(second.crop((0, 30, 28, 56)), Image.new("RGB", (28, 26), (1, 2, 3)))


def test_a_crop_is_scaled_to_fit_and_padded() -> None:
    page = Image.new("RGB", (100, 100), (200, 0, 0))
    policy = TilingPolicy(grid=(2, 1), tile_size=(80, 80), pad_color=(0, 0, 9))
    for tile in cut_tiles(page, plan_tiles(page.size, policy)):
        assert same(tile.crop((0, 0, 40, 80)), Image.new("RGB", (40, 80), (200, 0, 0)))
        assert same(tile.crop((40, 0, 80, 80)), Image.new("RGB", (40, 80), (0, 0, 9)))


def test_no_upscale_keeps_small_crops_and_still_shrinks_large_ones() -> None:
    page = picture(40, 20)
    policy = TilingPolicy(grid=(2, 1), tile_size=(32, 32), overview=(20, 20), no_upscale=True)
    overview, left, right = cut_tiles(page, plan_tiles(page.size, policy))
    assert same(left.crop((0, 0, 20, 20)), page.crop((0, 0, 20, 20)))
    assert same(right.crop((0, 0, 20, 20)), page.crop((20, 0, 40, 20)))
    assert same(left.crop((0, 20, 32, 32)), Image.new("RGB", (32, 12), "white"))
    assert same(overview.crop((0, 0, 20, 10)), page.resize((20, 10), Image.Resampling.BICUBIC))
    assert same(overview.crop((0, 10, 20, 20)), Image.new("RGB", (20, 10), "white"))


def test_a_tile_shows_its_box() -> None:
    """Each cell of a page of flat colours becomes a tile of its colour, in reading order."""
    colors = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)]
    page = Image.new("RGB", (64, 64))
    for at, color in enumerate(colors):
        page.paste(color, (at % 2 * 32, at // 2 * 32, at % 2 * 32 + 32, at // 2 * 32 + 32))
    for order, expected in (("ltr", [0, 1, 2, 3]), ("rtl", [1, 0, 3, 2])):
        policy = TilingPolicy.model_validate({"grid": [2, 2], "tile_size": [16, 16], "reading_order": order})
        centers = [tile.getpixel((8, 8)) for tile in cut_tiles(page, plan_tiles(page.size, policy))]
        assert centers == [colors[at] for at in expected]


def test_the_page_is_not_changed() -> None:
    page = picture(30, 20)
    before = page.tobytes()
    for policy in (
        TilingPolicy(grid=(1, 1), tile_size=(40, 40), no_upscale=True),
        TilingPolicy(grid=(2, 2), native_resolution=True, overview=(9, 9), patch_multiple=8),
    ):
        cut_tiles(page, plan_tiles(page.size, policy))
    assert page.tobytes() == before


@pytest.mark.parametrize("policy", [TilingPolicy(), TilingPolicy(preset="ocr_pages")])
def test_an_image_that_has_changed_since_the_plan(policy: TilingPolicy) -> None:
    with pytest.raises(RowError, match=r"image_changed: planned for 30 x 21 pixels, the image now has 30 x 20"):
        cut_tiles(picture(30, 20), plan_tiles((30, 21), policy))


def test_only_rgb_is_cut() -> None:
    with pytest.raises(ValueError, match="'L'"):
        cut_tiles(Image.new("L", (9, 9)), plan_tiles((9, 9), TilingPolicy(preset="ocr_pages")))


@needs_pages
def test_real_pages() -> None:
    policy = TilingPolicy(preset="ocr_pages", overview=(448, 448), labels=True)
    shapes = set()
    for path in sorted(PAGES.glob("*.jpg"))[:4]:
        plan = plan_tiles(image_size(path), policy)
        tiles = cut_tiles(load_image(path), plan)
        assert [tile.size for tile in tiles] == list(plan.tile_sizes)
        shapes.add(plan.shape)
    assert shapes == {"3x2@512x512+448x448", "2x3@512x512+448x448"}


# ------------------------------------------------------------ sizes that a job sets


@given(size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)), most=st.integers(50_000, 10**6))
def test_a_whole_page_has_at_most_so_many_pixels(size: tuple[int, int], most: int) -> None:
    plan = plan_tiles(size, TilingPolicy(max_pixels=most))
    ((width, height),) = plan.tile_sizes
    assert (plan.shape, plan.boxes, plan.upscale) == ("page", ((0, 0, *size),), (False,))
    if size[0] * size[1] <= most:
        assert ((width, height), plan.is_tiled) == (size, False)
    else:
        assert width * height <= most
        assert all(abs(a - b) <= 1 for a, b in zip(plan.inner_sizes[0], (width, height)))
        if min(width, height) > 50:
            assert width * height > 0.95 * most, "and hardly fewer"
            assert abs(width / height / (size[0] / size[1]) - 1) < 0.03


@given(size=st.tuples(st.integers(1, 300), st.integers(1, 300)), least=st.integers(1, 10**5))
def test_a_whole_page_has_at_least_so_many_pixels(size: tuple[int, int], least: int) -> None:
    plan = plan_tiles(size, TilingPolicy(min_pixels=least))
    ((width, height),) = plan.tile_sizes
    if size[0] * size[1] >= least:
        assert (width, height) == size
    else:
        assert width * height >= least
        assert plan.upscale == (True,)


def test_the_pixels_of_scaled_pages() -> None:
    page = Image.linear_gradient("L").convert("RGB").resize((400, 300))
    for policy in (TilingPolicy(max_pixels=30_000), TilingPolicy(min_pixels=480_000)):
        plan = plan_tiles(page.size, policy)
        (tile,) = cut_tiles(page, plan)
        assert tile.size == plan.tile_sizes[0] == ((200, 150) if policy.max_pixels else (800, 600))
        expected = page.resize(tile.size, Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(tile), np.asarray(expected))


@given(
    size=st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)),
    most=st.integers(2_000, 2_000_000),
    multiple=st.sampled_from([1, 14, 28, 32]),
)
def test_native_tiles_have_at_most_so_many_pixels(size: tuple[int, int], most: int, multiple: int) -> None:
    policy = TilingPolicy(grid=(2, 3), native_resolution=True, max_tile_pixels=most).aligned(multiple)
    plan = plan_tiles(size, policy)
    free = plan_tiles(size, policy.model_copy(update={"max_tile_pixels": None}))
    for (width, height), (free_width, free_height) in zip(plan.tile_sizes, free.tile_sizes, strict=True):
        assert width % multiple == height % multiple == 0
        if free_width * free_height <= most:
            assert (width, height) == (free_width, free_height)
        elif min(width, height) > multiple:
            assert width * height <= most
    assert all(inner[0] <= tile[0] and inner[1] <= tile[1] for inner, tile in zip(plan.inner_sizes, plan.tile_sizes))


def test_each_shape_has_its_own_tiles() -> None:
    """Whole pages on a canvas by shape; receipts cut, with an overview and an overlap that other pages have not."""
    policy = TilingPolicy.model_validate({
        "buckets": [
            {"max_ratio": 1, "grid": [1, 1], "tile_size": [96, 64]},
            {"max_ratio": 2, "grid": [1, 1], "tile_size": [64, 96]},
            {"grid": [1, 3], "tile_size": 48, "overlap": 0.1, "overview": [24, 48], "min_area": 3000},
        ],
        "labels": True,
    })  # fmt: skip
    wide, tall, long, small = (plan_tiles(size, policy) for size in ((300, 200), (200, 300), (50, 300), (20, 100)))
    assert (wide.tile_sizes, wide.shape, wide.labels) == (((96, 64),), "1x1@96x64", (None,))
    assert (tall.tile_sizes, tall.boxes) == (((64, 96),), ((0, 0, 200, 300),))
    assert long.tile_sizes == ((24, 48), (48, 48), (48, 48), (48, 48))
    assert long.boxes == ((0, 0, 50, 300), (0, 0, 50, 110), (0, 90, 50, 210), (0, 190, 50, 300))
    assert long.labels == ("<global_img>", "<row1_col1>", "<row2_col1>", "<row3_col1>")
    assert (small.tile_sizes, small.grid) == (((48, 48),), (1, 1))
    tiles = cut_tiles(Image.new("RGB", (50, 300)), long)
    assert [tile.size for tile in tiles] == list(long.tile_sizes)


def test_a_shape_may_have_no_overview() -> None:
    policy = TilingPolicy.model_validate(
        {
            "buckets": [{"max_ratio": 1, "grid": [2, 1], "overview": False}, {"grid": [1, 2]}],
            "tile_size": 8,
            "overview": [4, 4],
        }
    )
    assert plan_tiles((30, 20), policy).tile_sizes == ((8, 8), (8, 8))
    assert plan_tiles((20, 30), policy).tile_sizes == ((4, 4), (8, 8), (8, 8))


def test_labels_as_the_models_own_tokens() -> None:
    policy = TilingPolicy.model_validate({"grid": [2, 1], "tile_size": 8, "overview": [8, 8], "labels": "tokens"})
    plan = plan_tiles((20, 10), policy)
    assert plan.label_texts == plan.labels == ("<global-img>", "<row_1_col_1>", "<row_1_col_2>")
    assert label_tokens(policy) == ["<global-img>", "<row_1_col_1>", "<row_1_col_2>"]
    as_text = TilingPolicy.model_validate({"grid": [2, 1], "tile_size": 8, "labels": True})
    assert plan_tiles((20, 10), as_text).label_texts == ("<row1_col1>\n", "<row1_col2>\n")
    assert label_tokens(as_text) == []
