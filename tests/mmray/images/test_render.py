"""Tiles made fast against tiles made exactly: the same regions, nearly the same pixels, the same errors."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from mmray.errors import RowError
from mmray.images import TilePlan, TilingPolicy, cut_tiles, image_size, load_image, plan_tiles, render, render_tiles
from mmray.images.load import decoded
from mmray.synthetic.documents import make_document
from mmray.synthetic.pictures import draw_page
from tests.mmray.images.test_load import DAMAGED, HOW_STORED, encoded, stored
from tests.mmray.images.test_tiling import policies
from tests.mmray.noise import noise

PAGES = Path(__file__).resolve().parents[4] / "shared/data/pages"
needs_pages = pytest.mark.skipif(not PAGES.is_dir(), reason="the shared test data is not here")


def exactly(source: object, plan: TilePlan) -> list[Image.Image]:
    return cut_tiles(load_image(source), plan)  # type: ignore[arg-type]


def apart(some: list[Image.Image], others: list[Image.Image]) -> np.ndarray:
    """The absolute differences of all values of two lists of tiles."""
    assert [tile.size for tile in some] == [tile.size for tile in others]
    assert {tile.mode for tile in some + others} == {"RGB"}
    pairs = zip(some, others, strict=True)
    return np.concatenate([np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).ravel() for a, b in pairs])


def smooth(width: int, height: int, cell: int = 40) -> Image.Image:
    """Soft coloured clouds: a shift by a part of a pixel shows, JPEG and scaling leave them as they are."""
    return noise((width // cell + 1, height // cell + 1)).resize((width, height), Image.Resampling.BICUBIC)


def planned(size: tuple[int, int], **fields: object) -> TilePlan:
    return plan_tiles(size, TilingPolicy.model_validate(fields))


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """By how much each page was reduced as it was decoded."""
    seen = []

    def recorded(image: object, header: object, source: object, reduction: int) -> Image.Image:
        seen.append(reduction)
        return decoded(image, header, source, reduction)  # type: ignore[arg-type]

    monkeypatch.setattr(render, "decoded", recorded)
    return seen


# ------------------------------------------------------------ whole pages


@given(st.tuples(st.integers(1, 90), st.integers(1, 90)), policies())
@settings(max_examples=60, deadline=None)
def test_what_is_not_reduced_is_the_same_but_for_rounding(size: tuple[int, int], policy: TilingPolicy) -> None:
    page = noise(size).point(lambda value: 80 + value * 96 // 255)  # so that nothing overshoots 0 or 255
    data, plan = encoded(page), plan_tiles(size, policy)
    assert apart(render_tiles(data, plan), exactly(data, plan)).max() <= 3


def test_exact_pixels() -> None:
    data = encoded(noise((600, 400)), "JPEG")
    settings = {"grid": [1, 2], "tile_size": [50, 50], "overview": [64, 64]}
    exact, fast = (planned((600, 400), **settings, exact_pixels=exact) for exact in (True, False))
    assert apart(render_tiles(data, exact), exactly(data, exact)).max() == 0
    assert apart(render_tiles(data, fast), exactly(data, fast)).max() > 0


def test_a_page_that_is_not_cut_is_the_whole_page() -> None:
    data = encoded(noise((300, 200)), "JPEG")
    assert apart(render_tiles(data, planned((300, 200))), [load_image(data)]).max() == 0


def test_native_tiles_are_the_pages_own_pixels(reductions: list[int]) -> None:
    data = encoded(noise((61, 47)), "JPEG")
    plan = planned((61, 47), grid=[3, 4], native_resolution=True, patch_multiple=28, overview=[16, 16])
    (_, *native), (_, *expected) = render_tiles(data, plan), exactly(data, plan)
    assert apart(native, expected).max() == 0
    assert reductions == [1]


# ------------------------------------------------------------ reduced pages


@pytest.mark.parametrize(
    ("size", "fields", "reduction"),
    [
        ((1275, 1650), {"grid": [2, 3], "tile_size": [512, 512]}, 1),
        ((2550, 3300), {"grid": [2, 3], "tile_size": [512, 512]}, 2),
        ((2550, 3300), {"grid": [2, 3], "tile_size": [512, 512], "overview": [448, 448]}, 2),
        ((5100, 6600), {"grid": [2, 3], "tile_size": [512, 512]}, 4),
        ((1275, 1650), {"grid": [1, 1], "tile_size": [128, 160]}, 8),
        ((1275, 1650), {"grid": [2, 3], "native_resolution": True, "overview": [64, 64]}, 1),
        ((300, 200), {"grid": [1, 1], "tile_size": [400, 400]}, 1),
        ((119, 119), {"grid": [1, 1], "tile_size": [50, 50]}, 1),
        ((120, 120), {"grid": [1, 1], "tile_size": [50, 50]}, 2),
        ((500, 100), {"grid": [1, 1], "tile_size": [100, 100], "no_upscale": True}, 4),
    ],
)
def test_how_much_a_page_is_reduced(
    size: tuple[int, int], fields: dict[str, object], reduction: int, reductions: list[int]
) -> None:
    page = Image.new("RGB", size, (9, 99, 199))
    plan = planned(size, **fields)
    assert apart(render_tiles(encoded(page, "JPEG"), plan), exactly(encoded(page, "JPEG"), plan)).max() <= 2
    render_tiles(encoded(page, "PNG"), plan)
    assert reductions == [reduction, 1]


@pytest.mark.parametrize("factor", [2.5, 5, 9.7])
@pytest.mark.parametrize("orientation", HOW_STORED)
def test_tiles_show_just_their_regions_in_every_orientation(
    orientation: int, factor: float, reductions: list[int]
) -> None:
    """The sizes are no multiples of the reduction, so a turned page begins in the middle of a pixel."""
    size = (1003, 741)
    image, exif = stored(smooth(*size), orientation)
    data = encoded(image, "JPEG", exif=exif, quality=95, subsampling=0)
    tile_size = [round(size[0] / 2 / factor), round(size[1] / 3 / factor)]
    plan = planned(size, grid=[2, 3], tile_size=tile_size, overlap=0.07, overview=[9, 9])
    assert plan.is_tiled
    difference = apart(render_tiles(data, plan), exactly(data, plan)).mean()
    assert difference < 0.55, "a shift by half a pixel of the reduced page makes it more than 1"
    assert reductions[0] > 1


def test_a_wrong_origin_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above, seen to fail."""
    image, exif = stored(smooth(1003, 741), 3)
    data = encoded(image, "JPEG", exif=exif, quality=95, subsampling=0)
    plan = planned((1003, 741), grid=[2, 3], tile_size=[52, 25])
    monkeypatch.setattr(render, "_FLIPPED", {})
    assert apart(render_tiles(data, plan), exactly(data, plan)).mean() > 1


@pytest.mark.parametrize(
    ("mode", "image_format", "options"),
    [
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "JPEG", {"subsampling": 0}),
        ("RGB", "MPO", {}),
    ],
)
def test_every_kind_of_jpeg(mode: str, image_format: str, options: dict[str, object], reductions: list[int]) -> None:
    data = encoded(smooth(403, 517).convert(mode), image_format, **options)
    plan = planned((403, 517), grid=[1, 1], tile_size=[96, 96])
    assert apart(render_tiles(data, plan), exactly(data, plan)).mean() < 0.6
    assert reductions == [4]


def lossless_jpeg(values: np.ndarray) -> bytes:
    """Grey values as a lossless JPEG (ITU T.81, annex H): each pixel's difference from its left neighbour, the
    first ones' from above, as a code of five bits for its length and the bits themselves."""
    height, width = values.shape
    before = np.zeros(values.shape, int)
    before[:, 1:], before[1:, 0], before[0, 0] = values[:, :-1], values[:-1, 0], 128
    bits = ""
    for difference in (values.astype(int) - before).ravel().tolist():
        length = abs(difference).bit_length()
        bits += f"{length:05b}"
        if length:
            bits += f"{difference if difference > 0 else difference + 2**length - 1:0{length}b}"
    bits += "1" * (-len(bits) % 8)
    codes = bytes(17 * (i == 4) for i in range(16)) + bytes(range(17))
    return b"".join(
        [
            b"\xff\xd8\xff\xc4", struct.pack(">HB", 36, 0), codes,
            b"\xff\xc3", struct.pack(">HBHHB", 11, 8, height, width, 1), b"\x01\x11\x00",
            b"\xff\xda", struct.pack(">HB", 8, 1), b"\x01\x00\x01\x00\x00",
            int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00"), b"\xff\xd9",
        ]
    )  # fmt: skip


def test_a_lossless_jpeg_is_decoded_whole(reductions: list[int]) -> None:
    """It has no coefficients to leave out; a decoder asked for a part of it fails."""
    page = np.asarray(smooth(64, 48, cell=8).convert("L"))
    data, plan = lossless_jpeg(page), planned((64, 48), grid=[1, 1], tile_size=[16, 16])
    assert np.array_equal(np.asarray(load_image(data))[..., 0], page)
    assert apart(render_tiles(data, plan), exactly(data, plan)).max() <= 2
    assert reductions == [1]


def printed(size: tuple[int, int], font_size: int) -> Image.Image:
    """A sheet full of print."""
    page = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(font_size)
    words = [word for index in range(8) for word in make_document(0, index, "train").text.split()]
    for number, top in enumerate(range(font_size, size[1] - font_size, round(font_size * 1.4))):
        pen.text((font_size, top), " ".join(words[number * 7 % 50 :]), fill="black", font=font)
    return page


def contrast(tiles: list[Image.Image]) -> float:
    """How much neighbouring pixels differ: less where print is blurred."""
    values = [np.asarray(tile.convert("L"), float) for tile in tiles]
    return float(np.mean([np.abs(np.diff(v, axis=axis)).mean() for v in values for axis in (0, 1)]))


@pytest.mark.parametrize(("dpi", "limit"), [(150, 0.6), (300, 2.0)])
def test_print_stays_sharp(dpi: int, limit: float, reductions: list[int]) -> None:
    size = (round(8.5 * dpi), 11 * dpi)
    data = encoded(printed(size, dpi // 6), "JPEG", quality=85)
    plan = planned(size, grid=[2, 3], tile_size=[512, 512], overview=[448, 448])
    fast, exact = render_tiles(data, plan), exactly(data, plan)
    assert apart(fast, exact).mean() < limit
    assert contrast(fast) == pytest.approx(contrast(exact), rel=0.05)
    assert reductions == [dpi // 150]


@pytest.mark.parametrize("index", [0, 1, 3])
def test_synthetic_pages_at_300_dpi(index: int, reductions: list[int]) -> None:
    page = draw_page(make_document(0, index, "train"))
    page = page.resize((2550, round(2550 * page.height / page.width)), Image.Resampling.BICUBIC)
    plan = planned(page.size, preset="ocr_pages")
    data = encoded(page, "JPEG", quality=85)
    assert apart(render_tiles(data, plan), exactly(data, plan)).mean() < 0.5
    assert reductions == [2]


@needs_pages
def test_real_pages_at_100_and_400_dpi(reductions: list[int]) -> None:
    for path in sorted(PAGES.glob("*.jpg"))[:3]:
        page = load_image(path)
        plan = planned(page.size, preset="ocr_pages", overview=[448, 448])
        assert apart(render_tiles(path, plan), exactly(path, plan)).mean() < 0.2
        page = page.resize((4 * page.width, 4 * page.height), Image.Resampling.BICUBIC)
        plan, data = planned(page.size, preset="ocr_pages", overview=[448, 448]), encoded(page, "JPEG", quality=85)
        assert apart(render_tiles(data, plan), exactly(data, plan)).mean() < 0.7
    assert sorted(reductions) == [1, 1, 1, 2, 2, 2]


# ------------------------------------------------------------ errors


TILES = {"grid": [1, 1], "tile_size": [16, 16]}


@pytest.mark.parametrize("fields", [{}, TILES, {**TILES, "exact_pixels": True}])
def test_an_image_of_another_size_than_planned(fields: dict[str, object]) -> None:
    with pytest.raises(RowError, match=r"image_changed: planned for 64 x 49 pixels, the image now has 64 x 48"):
        render_tiles(encoded(noise((64, 48)), "JPEG"), planned((64, 49), **fields))


@pytest.mark.parametrize("fields", [{}, TILES, {**TILES, "exact_pixels": True}])
def test_errors_of_the_file(fields: dict[str, object], tmp_path: Path) -> None:
    data, plan = encoded(noise((64, 48)), "JPEG"), planned((64, 48), **fields)
    for source, reason in (
        (tmp_path / "none.jpg", "image_missing"),
        ("http://host/a.jpg", "image_scheme"),
        (b"nothing", "image_unreadable"),
        (data[: len(data) * 2 // 3], "image_corrupt"),
    ):
        with pytest.raises(RowError) as caught:
            render_tiles(source, plan)
        assert caught.value.reason == reason
    with pytest.raises(RowError, match="image_too_large"):
        render_tiles(data, plan, max_pixels=64 * 48 - 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF of JPEG"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damage_gives_tiles_or_a_row_error(name: str, data: st.DataObject) -> None:
    whole = DAMAGED[name]
    changes = dict(data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=6)))
    broken = bytes(changes.get(at, byte) for at, byte in enumerate(whole))
    plan = planned(load_image(whole).size, grid=[1, 2], tile_size=[3, 3])
    try:
        tiles = render_tiles(io.BytesIO(broken), plan, max_pixels=10**6)
    except RowError:
        return
    assert [tile.size for tile in tiles] == [(3, 3), (3, 3)]


def signed_orientation(orientation: int) -> bytes:
    """A JPEG whose EXIF says its orientation as SSHORT."""
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + struct.pack("<HHIhh", 274, 8, 1, orientation, 0) + bytes(4)
    file = io.BytesIO()
    page = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    page.save(file, "JPEG", exif=exif, quality=95)
    return file.getvalue()


@pytest.mark.parametrize("policy", [TilingPolicy(), TilingPolicy(grid=(2, 2), tile_size=(32, 32))])
def test_a_picture_that_was_measured_as_it_is_stored_goes_on_so(policy: TilingPolicy) -> None:
    """Prepared before signed orientations counted; a picture that has changed is still told."""
    data = signed_orientation(6)
    assert image_size(data) == (64, 96)
    earlier = plan_tiles((96, 64), policy)
    stored = Image.open(io.BytesIO(data)).convert("RGB")
    for tile, expected in zip(render_tiles(data, earlier), cut_tiles(stored, earlier), strict=True):
        assert np.abs(np.asarray(tile, np.int16) - np.asarray(expected, np.int16)).max() <= 2
    with pytest.raises(RowError, match="image_changed"):
        render_tiles(data, plan_tiles((97, 64), policy))
    plain = io.BytesIO()
    stored.save(plain, "JPEG")
    with pytest.raises(RowError, match="image_changed"):
        render_tiles(plain.getvalue(), plan_tiles((64, 96), policy))
