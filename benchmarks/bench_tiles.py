"""From a page's JPEG to its tiles, on one thread: `render_tiles` and the tile cache against the plain way.

The plain way is what one writes with Pillow: decode whole, `exif_transpose`, `crop`, bicubic `resize`, `paste` on a
canvas. The pages are those of ../shared/data, rendered at 100 dpi and one at 300, scaled to letter size at the
resolution named; where they are absent, synthetic pages. A sheet full of 9-point print, rendered at the resolution
itself, is the hardest case: every pixel is an edge.
"""

import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from benchmarks.common import Result, best_seconds
from mmray.images import TilePlan, TilingPolicy, cut_tiles, load_image, plan_tiles, render_tiles
from mmray.images.tile_cache import TileCache
from mmray.synthetic.documents import make_document
from mmray.synthetic.pictures import draw_page

PAGES = Path(__file__).resolve().parents[2] / "shared/data/pages"
SHARED_NAMES = ("p0003.jpg", "p0010.jpg", "p0023.jpg")
GOALS = {150: 1.5, 300: 3.0}
MAX_MEAN_DIFFERENCE = 2.0
"""Of 255, on average over all values of a page's tiles."""

Tiles = list[Image.Image]


def jpeg(page: Image.Image) -> bytes:
    file = io.BytesIO()
    page.save(file, "JPEG", quality=85)
    return file.getvalue()


def letter_size(dpi: int) -> tuple[int, int]:
    return round(8.5 * dpi), 11 * dpi


def pages(dpi: int) -> list[bytes]:
    """JPEGs of letter pages."""
    if PAGES.is_dir():
        found = [load_image(PAGES / name) for name in SHARED_NAMES]
    else:
        found = [draw_page(make_document(0, index, "train")) for index in (0, 1, 3)]
    return [jpeg(page.resize(letter_size(dpi), Image.Resampling.BICUBIC)) for page in found]


def print_page(dpi: int) -> bytes:
    """JPEG of a letter page of 9-point print from margin to margin."""
    width, height = letter_size(dpi)
    page = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(9 * dpi / 72)
    words = " ".join(make_document(0, index, "train").text for index in range(30)).split()
    for number, top in enumerate(range(dpi // 2, height - dpi // 2, round(11 * dpi / 72))):
        line = " ".join(words[number * 7 :] + words)
        pen.text((dpi // 2, top), line[: 100 if len(line) > 100 else None], fill="black", font=font)
    return jpeg(page)


def plain_tiles(data: bytes, plan: TilePlan) -> Tiles:
    page = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    tiles = []
    for box, size, tile_size in zip(plan.boxes, plan.inner_sizes, plan.tile_sizes, strict=True):
        tile = Image.new("RGB", tile_size, plan.pad_color)
        tile.paste(page.crop(box).resize(size, Image.Resampling.BICUBIC), (0, 0))
        tiles.append(tile)
    return tiles


def exact_tiles(data: bytes, plan: TilePlan) -> Tiles:
    return cut_tiles(load_image(data), plan)


def mean_difference(some: Tiles, others: Tiles) -> float:
    """Of 255."""
    pairs = zip(some, others, strict=True)
    return float(np.mean([np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).mean() for a, b in pairs]))


def run() -> list[Result]:
    results = []
    plain = TilingPolicy(grid=(2, 3), tile_size=(512, 512))
    with_overview = TilingPolicy(grid=(2, 3), tile_size=(512, 512), overview=(512, 512))
    for dpi in GOALS:
        results += at_resolution(dpi, "6 tiles", plan_tiles(letter_size(dpi), plain))
    results += at_resolution(150, "6 tiles and overview", plan_tiles(letter_size(150), with_overview))
    return [*results, *tile_cache(plan_tiles(letter_size(150), plain))]


def at_resolution(dpi: int, what: str, plan: TilePlan) -> list[Result]:
    data = pages(dpi)
    seconds = {
        way.__name__: sum(best_seconds(lambda: way(page, plan), repeats=3) for page in data) / len(data)  # noqa: B023
        for way in (plain_tiles, exact_tiles, render_tiles)
    }
    scans = [mean_difference(render_tiles(page, plan), plain_tiles(page, plan)) for page in data]
    small_print = print_page(dpi)
    hardest = mean_difference(render_tiles(small_print, plan), plain_tiles(small_print, plan))
    name = f"{what}, {dpi} dpi letter JPEG"
    return [
        Result(
            name=f"render_tiles against the plain way: {name}",
            ratio=seconds["plain_tiles"] / seconds["render_tiles"],
            explanation=f"{1e3 * seconds['render_tiles']:.1f} ms a page against {1e3 * seconds['plain_tiles']:.1f}; "
            f"{1e3 * seconds['exact_tiles']:.1f} with exact_pixels",
            goal=GOALS[dpi],
        ),
        Result(
            name=f"mean difference from the plain way, of 255: {name}",
            ratio=float(np.mean(scans)),
            explanation=f"at most {max(scans):.2f} on {len(scans)} pages, {hardest:.2f} on a sheet of 9-point print",
            goal=MAX_MEAN_DIFFERENCE,
            lower_is_better=True,
        ),
    ]


def tile_cache(plan: TilePlan) -> list[Result]:
    """A hit reads from memory: the files were just written. A disk adds its own time for the bytes named."""
    with tempfile.TemporaryDirectory() as folder:
        cache = TileCache(folder, 1 << 30)
        data = pages(150)
        paths = [Path(folder, f"{number}.jpg") for number in range(len(data))]
        for path, page in zip(paths, data, strict=True):
            path.write_bytes(page)
            if mean_difference(cache.render_tiles(path, plan), cache.render_tiles(path, plan)):
                raise AssertionError("the cache gives other tiles than were stored")
        hit = sum(best_seconds(lambda: cache.render_tiles(path, plan), repeats=3) for path in paths)  # noqa: B023
        cut = sum(best_seconds(lambda: render_tiles(path, plan), repeats=3) for path in paths)  # noqa: B023
        stored = sum(path.stat().st_size for path in cache.folder.glob("*/*.tiles")) / len(data) / 1e6
    raw = sum(3 * width * height for width, height in plan.tile_sizes) / 1e6
    return [
        Result(
            name="a hit of the tile cache against render_tiles: 6 tiles, 150 dpi letter JPEG",
            ratio=cut / hit,
            explanation=f"{1e3 * hit / len(data):.1f} ms a page, read from memory, against {1e3 * cut / len(data):.1f}",
            goal=2.0,
        ),
        Result(
            name="bytes of a page in the tile cache against its JPEG",
            ratio=stored / (sum(map(len, data)) / len(data) / 1e6),
            explanation=f"{stored:.1f} MB a page; {raw:.1f} unpacked",
        ),
    ]
