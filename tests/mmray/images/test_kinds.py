"""Pixels of TIFF, PNG, BMP and JPEG 2000 in every kind, written by programs that are not Pillow and read by a second
reader: depth, sign, polarity, planes, byte order, transparency. What cannot be shown right must be refused by name."""

import io
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from mmray.errors import RowError
from mmray.images import image_size, load_image

ODDITIES = Path(__file__).resolve().parents[4] / "shared/data/oddities/images"
needs_oddities = pytest.mark.skipif(not ODDITIES.is_dir(), reason="the shared test data is not here")

GREYS = [(40,) * 3, (120,) * 3, (200,) * 3, (255,) * 3]
COLOURS = [(220, 30, 30), (30, 180, 30), (30, 30, 200), (255, 255, 255)]
QUANTIZED = 12
"""Difference that JPEG makes in the middle of a flat field."""


def shown(data: bytes | Path) -> np.ndarray:
    """int64 [height, width, 3], as training sees it; the header says the same size."""
    page = load_image(data)
    assert page.mode == "RGB"
    assert page.size == image_size(data)
    return np.asarray(page, dtype=np.int64)


def quadrants(path: Path) -> list[tuple[int, ...]]:
    """The middles of the four quadrants: top left, top right, bottom left, bottom right."""
    pixels = shown(path)
    rows, columns = pixels.shape[0] // 4, pixels.shape[1] // 4
    return [tuple(pixels[y, x].tolist()) for y in (rows, 3 * rows) for x in (columns, 3 * columns)]


@needs_oddities
@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("bits12.tif", GREYS), ("bits12wz.tif", GREYS), ("wz16_lzw_le.tif", GREYS), ("wz16_none_be.tif", GREYS),
        ("wz16_none_le.tif", GREYS), ("p16_le_None.tif", COLOURS), ("p8_le_None.tif", COLOURS),
        ("p12_rgb16_trns_white.png", COLOURS), ("p16_gray2_trns1.png", [(0,) * 3, (255,) * 3, (170,) * 3, (255,) * 3]),
    ],
)  # fmt: skip
def test_pictures_that_were_shown_wrong(name: str, right: list[tuple[int, ...]]) -> None:
    assert quadrants(ODDITIES / name) == right


@needs_oddities
def test_the_canvas_around_a_smaller_first_frame_is_white() -> None:
    pixels = shown(ODDITIES / "g02_first_frame_smaller.gif")
    assert {tuple(pixel) for pixel in pixels.reshape(-1, 3).tolist()} == {(255, 255, 255), (220, 30, 30)}
    assert pixels[0, 0].tolist() == [255] * 3


@needs_oddities
def test_an_orientation_of_a_signed_kind_turns() -> None:
    path = ODDITIES / "o06_sshort6.jpg"
    assert load_image(path).size == (64, 96)
    bottom_left, top_left, bottom_right, top_right = np.asarray(quadrants(path))
    assert np.abs(np.asarray([top_left, top_right, bottom_left, bottom_right]) - COLOURS).max() < QUANTIZED


@needs_oddities
def test_xmp_of_another_type_leaves_a_picture_sound() -> None:
    pixels = shown(ODDITIES / "xmp_t2.tif")
    assert (pixels == (30, 180, 30)).all()


@needs_oddities
@pytest.mark.parametrize("name", ["zeros_from_half.jpg", "trunc60.jpg"])
def test_lost_pixels_are_no_picture(name: str) -> None:
    with pytest.raises(RowError, match="image_corrupt"):
        load_image(ODDITIES / name)


@needs_oddities
def test_a_lacking_end_marker_is_no_loss() -> None:
    path = ODDITIES / "trunc_last_2.jpg"
    whole = np.asarray(Image.open(io.BytesIO(path.read_bytes() + b"\xff\xd9")).convert("RGB"), dtype=np.int64)
    assert np.array_equal(shown(path), whole)
    with pytest.raises(OSError, match="truncated"):
        Image.open(path).load()


# ------------------------------------------------------------ TIFF

ALPHAS = (None, "unassalpha", "assocalpha")


@st.composite
def tiff_kinds(draw: st.DrawFn) -> tuple[bytes, dict[str, object]]:
    """A random TIFF by tifffile, and its kind."""
    photometric = draw(st.sampled_from(["miniswhite", "minisblack", "rgb", "separated"]))
    dtypes = {"rgb": "u1 u2", "separated": "u1 u2", "minisblack": "u1 u2 u4 i1 i2 i4 f4", "miniswhite": "u1 u2 u4 f4"}
    dtype = np.dtype(draw(st.sampled_from(dtypes[photometric].split())))
    alpha = draw(st.sampled_from(ALPHAS)) if photometric == "rgb" else None
    alpha = draw(st.sampled_from(ALPHAS)) if (photometric, dtype) == ("minisblack", np.uint8) else alpha
    channels = {"rgb": 3, "separated": 4}.get(photometric, 1) + (alpha is not None)
    height, width = draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    shape = (height, width, channels) if channels > 1 else (height, width)
    elements = {"min_value": 0.0, "max_value": 1.0} if dtype.kind == "f" else None
    values = draw(arrays.arrays(dtype, shape, elements=elements))
    if alpha == "assocalpha":  # no colour is brighter than its transparency lets it be
        values[..., :-1] = np.minimum(values[..., :-1], values[..., -1:])
    planar = channels > 2 and draw(st.booleans())
    compression = draw(st.sampled_from([None, "lzw", "zlib", "packbits"]))
    predictor = compression in ("lzw", "zlib") and dtype.kind != "f" and draw(st.booleans())
    byte_order = draw(st.sampled_from("<>"))
    file = io.BytesIO()
    tifffile.imwrite(
        file, np.moveaxis(values, -1, 0) if planar else values, photometric=photometric, compression=compression,
        planarconfig=None if channels == 1 else "separate" if planar else "contig", predictor=predictor,
        byteorder=byte_order, tile=draw(st.sampled_from([None, (16, 16)])), metadata=None,
        extrasamples=[alpha] if alpha else None, bigtiff=byte_order == "<" and draw(st.booleans()),
        rowsperstrip=draw(st.sampled_from([None, 3])),
    )  # fmt: skip
    return file.getvalue(), {"photometric": photometric, "alpha": alpha, "planar": planar, "channels": channels}


def by_tifffile(data: bytes, kind: dict[str, object]) -> np.ndarray:
    """What a TIFF shows, float64 [height, width, 3] of 0..255, by a second reader and the meaning of its tags."""
    values = tifffile.imread(io.BytesIO(data))
    values = np.moveaxis(values, 0, -1) if kind["planar"] and kind["channels"] != 1 else values
    values = values.reshape(*values.shape[:2], -1)
    if values.dtype in (np.uint8, np.uint16):
        share = values / np.iinfo(values.dtype).max
    else:
        share = ranged(values)
    if kind["photometric"] == "miniswhite":
        share = 1 - share
    if kind["photometric"] == "separated":
        return 255 * (1 - share[..., :3]) * (1 - share[..., 3:])
    alpha = share[..., -1:] if kind["alpha"] else np.ones((*share.shape[:2], 1))
    colours = share[..., :-1] if kind["alpha"] else share
    if kind["alpha"] == "assocalpha":
        return np.broadcast_to(255 * (colours + 1 - alpha), (*share.shape[:2], 3))
    return np.broadcast_to(255 * (colours * alpha + 1 - alpha), (*share.shape[:2], 3))


def ranged(values: np.ndarray) -> np.ndarray:
    """The rule of `load_image` for values without a range, 0..1."""
    low, high = float(values.min()), float(values.max())
    limits = [1.0, 255.0, 65535.0][values.dtype.kind != "f" :]
    if low >= 0 and high <= limits[-1]:
        return values / min(limit for limit in limits if high <= limit)
    if values.dtype == np.uint32 and high >= 2**31:
        return values / (2**32 - 1)
    return (values - low) / ((high - low) or 1)


@given(tiff_kinds())
@settings(max_examples=400, deadline=None)
def test_every_kind_of_tiff_is_as_a_second_reader_sees_it(case: tuple[bytes, dict[str, object]]) -> None:
    data, kind = case
    assert np.abs(shown(data) - np.rint(by_tifffile(data, kind))).max() <= 1


def test_colours_that_pillow_divides_by_their_transparency_are_within_one_level() -> None:
    """16 bits in separate planes: any colour under any transparency that lets it be so bright."""
    alpha = np.arange(0, 65536, 257, dtype=np.uint16)[:, None]
    colour = (alpha * np.linspace(0, 1, 256)).astype(np.uint16)
    values = np.stack(np.broadcast_arrays(colour, colour // 2, colour // 3, alpha))
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="rgb", planarconfig="separate", extrasamples=["assocalpha"])
    kind: dict[str, object] = {"photometric": "rgb", "alpha": "assocalpha", "planar": True, "channels": 4}
    assert np.abs(shown(file.getvalue()) - np.rint(by_tifffile(file.getvalue(), kind))).max() <= 1


def tiff_of_12_bits(values: np.ndarray, byte_order: str, compression: str | None, photometric: str) -> bytes:
    """uint16 [height, an even width], by a picture of bytes whose tags are changed: tifffile compresses none."""
    left, right = values[:, 0::2], values[:, 1::2]
    packed = np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], axis=-1).astype(np.uint8)
    packed = packed.reshape(len(values), -1)
    file = io.BytesIO()
    tifffile.imwrite(
        file, packed, byteorder=byte_order, compression=compression, photometric=photometric, metadata=None,
        rowsperstrip=len(packed),
    )  # fmt: skip
    file.seek(0)
    with tifffile.TiffFile(file, mode="r+b") as tiff:
        tiff.pages[0].tags[256].overwrite(values.shape[1])
        tiff.pages[0].tags[258].overwrite(12)
    return file.getvalue()


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_grey_of_12_bits(compression: str | None, photometric: str) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (6, 10)).astype(np.uint16)
    expected = 255 * (values / 4095 if photometric == "minisblack" else 1 - values / 4095)
    data = tiff_of_12_bits(values, "<", compression, photometric)
    assert np.abs(shown(data) - expected[..., None]).max() <= 0.51
    refused = tiff_of_12_bits(values, ">", compression, photometric)
    name = {"minisblack": "BlackIsZero", "miniswhite": "WhiteIsZero"}[photometric]
    with pytest.raises(RowError, match=f"image_unreadable.*12 bits unsigned, {name}"):
        image_size(refused)


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_colours_at_half_the_resolution_without_compression(byte_order: str) -> None:
    """YCbCr (TIFF 6.0, section 21): four values of brightness, then one of each colour."""
    grey = np.random.default_rng(0).integers(30, 220, (4, 4)).astype(np.uint8)
    blocks = [grey[y : y + 2, x : x + 2].tobytes() + b"\x80\x80" for y in (0, 2) for x in (0, 2)]
    file = io.BytesIO()
    tifffile.imwrite(
        file, np.frombuffer(b"".join(blocks), np.uint8).reshape(4, 6), byteorder=byte_order, metadata=None,
        photometric="minisblack", rowsperstrip=4, extratags=[(530, "H", 2, (2, 2), True)],
    )  # fmt: skip
    file.seek(0)
    with tifffile.TiffFile(file, mode="r+b") as tiff:
        for tag, value in {256: 4, 262: 6, 277: 3, 258: (8, 8, 8)}.items():
            tiff.pages[0].tags[tag].overwrite(value)
    assert np.abs(shown(file.getvalue()) - grey[..., None]).max() <= 1


@pytest.mark.parametrize("scale", [1, 257])
def test_palettes_of_8_and_of_16_bits(scale: int) -> None:
    random = np.random.default_rng(0)
    palette, values = random.integers(0, 256, (3, 256)), random.integers(0, 256, (5, 7)).astype(np.uint8)
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="palette", colormap=(palette * scale).astype(np.uint16), metadata=None)
    assert np.array_equal(shown(file.getvalue()), palette.T[values])


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (np.zeros((3, 4, 2), np.uint16), "16 bits unsigned, BlackIsZero, 2 channels"),
        (np.zeros((3, 4), np.uint64), "64 bits unsigned, BlackIsZero"),
        (np.zeros((3, 4), np.float16), "16 bits floating-point, BlackIsZero"),
        (np.zeros((3, 4, 3), np.float32), "32 bits floating-point, RGB, 3 channels"),
    ],
)
def test_what_cannot_be_shown_right_is_refused_by_its_kind(values: np.ndarray, named: str) -> None:
    file = io.BytesIO()
    photometric = "rgb" if values.shape[2:] == (3,) else "minisblack"
    options = {"planarconfig": "contig", "extrasamples": ["unassalpha"]} if values.shape[2:] == (2,) else {}
    tifffile.imwrite(file, values, photometric=photometric, metadata=None, **options)
    with pytest.raises(RowError, match=f"image_unreadable.*a TIFF of {named} cannot be shown right"):
        image_size(file.getvalue())


def test_a_large_tiff_of_the_other_byte_order_is_refused_by_its_kind() -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((3, 4), np.uint8), bigtiff=True, byteorder=">", photometric="minisblack")
    with pytest.raises(RowError, match=r"image_unreadable.*BigTIFF"):
        image_size(file.getvalue())


def test_planes_of_grey_and_transparency_are_refused() -> None:
    file = io.BytesIO()
    tifffile.imwrite(
        file, np.zeros((2, 3, 4), np.uint8), photometric="minisblack", planarconfig="separate", metadata=None,
        extrasamples=["unassalpha"], compression="lzw",
    )  # fmt: skip
    with pytest.raises(RowError, match=r"8 bits unsigned, BlackIsZero, 2 channels in separate planes"):
        image_size(file.getvalue())


def hand_made_tiff(
    values: np.ndarray, tags: dict[int, tuple[int, list[int]]], strips: list[bytes] | None = None
) -> bytes:
    """A TIFF by this test alone, with one strip unless there are `strips`.

    values: uint8 [height, width] or [height, width, channels]; tags: (type, values) of more tags, which replace the
    usual ones; an empty list leaves one out.
    """
    height, width, channels = (*values.shape, 1)[:3]
    strips = strips or [values.tobytes()]
    places = np.cumsum([8, *map(len, strips)]).tolist()
    entries = {
        256: (4, [width]), 257: (4, [height]), 258: (3, [8] * channels), 259: (3, [1]),
        262: (3, [1 if channels < 3 else 2]),
        273: (4, places[:-1]), 277: (3, [channels]), 278: (4, [height]), 279: (4, [*map(len, strips)]),
    } | tags  # fmt: skip
    entries = {tag: entry for tag, entry in entries.items() if entry[1]}
    directory, far = b"", b""
    for tag in sorted(entries):
        kind, numbers = entries[tag]
        data = struct.pack(f"<{len(numbers)}{ {1: 'B', 3: 'H', 4: 'I'}[kind] }", *numbers)
        if len(data) > 4:
            data, far = struct.pack("<I", places[-1] + 6 + 12 * len(entries) + len(far)), far + data
        directory += struct.pack("<HHI", tag, kind, len(numbers)) + data.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<I", places[-1])
    return head + b"".join(strips) + struct.pack("<H", len(entries)) + directory + bytes(4) + far


def test_what_a_tiff_leaves_out_is_as_libtiff_assumes_it() -> None:
    grey, rgb = (np.random.default_rng(0).integers(0, 256, shape, np.uint8) for shape in ((5, 7), (5, 7, 3)))
    assert np.array_equal(shown(hand_made_tiff(grey, {262: (3, [])})), np.repeat(grey[..., None], 3, axis=2))
    assert np.array_equal(shown(hand_made_tiff(rgb, {262: (3, [])})), rgb)
    assert np.array_equal(shown(hand_made_tiff(grey, {284: (3, [2])})), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("extra", [0, 2])
def test_a_fourth_plane(extra: int) -> None:
    """0: it means nothing, 2: transparency."""
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8)
    planes = [values[..., channel].tobytes() for channel in range(4)]
    data = hand_made_tiff(values, {284: (3, [2]), 338: (3, [extra])}, planes)
    alpha = values[..., 3:] / 255 if extra else 1
    assert np.abs(shown(data) - (values[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1


def test_the_range_of_brightness_that_the_tags_name() -> None:
    """YCbCr of television, 16 to 235 (ReferenceBlackWhite, TIFF 6.0, section 20)."""
    grey = np.linspace(0, 255, 35).reshape(5, 7)
    values = (
        np.stack([16 + grey * 219 / 255, np.full((5, 7), 128), np.full((5, 7), 128)], axis=-1).round().astype(np.uint8)
    )
    tags = {262: (3, [6]), 530: (3, [1, 1]), 532: (3, [16, 235, 128, 240, 128, 240])}
    assert np.abs(shown(hand_made_tiff(values, tags)) - grey[..., None]).max() <= 1.5


def test_a_tiff_whose_orientation_is_a_byte_is_turned() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    assert np.array_equal(shown(hand_made_tiff(rgb, {274: (1, [6])})), np.rot90(rgb, -1))


def test_a_tiff_with_fewer_strips_than_rows_is_refused() -> None:
    grey = np.full((6, 4), 200, np.uint8)
    data = hand_made_tiff(grey, {278: (4, [2])}, [grey[:2].tobytes(), grey[:2].tobytes()])
    with pytest.raises(RowError, match=r"image_unreadable.*holds 2 of its 3 parts"):
        image_size(data)


@pytest.mark.parametrize(
    ("compression", "name"),
    [
        (50001, "webp"),
        (34712, "JPEG 2000"),
        (34887, "LERC"),
        (50002, "JPEG XL"),
        (34933, "PNG"),
        (12345, "method 12345"),
    ],
)
def test_a_compression_that_is_not_decoded_is_refused_by_name(compression: int, name: str) -> None:
    data = hand_made_tiff(np.zeros((3, 4), np.uint8), {259: (3, [compression])})
    with pytest.raises(RowError, match=f"image_unreadable.*a TIFF compressed by {name} cannot be read"):
        image_size(data)


# ------------------------------------------------------------ PNG


def png(values: np.ndarray, bits: int, colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by this test alone. values: [height, width, channels] of `bits` bits; chunks: between header and pixels."""
    height, width, _ = values.shape
    rows = values.reshape(height, -1)
    if bits == 16:
        packed = rows.astype(">u2").view(np.uint8)
    elif bits == 8:
        packed = rows.astype(np.uint8)
    else:
        each = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        packed = np.packbits(each.reshape(height, -1).astype(np.uint8), axis=1)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


@st.composite
def png_kinds(draw: st.DrawFn) -> tuple[bytes, np.ndarray]:
    """A random PNG of every colour type but palettes, and what it shows, float64 [height, width, 3]."""
    colour_type, channels = draw(st.sampled_from([(0, 1), (2, 3), (4, 2), (6, 4)]))
    bits = draw(st.sampled_from([1, 2, 4, 8, 16] if colour_type == 0 else [8, 16]))
    height, width = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    values = draw(arrays.arrays(np.uint16, (height, width, channels), elements=st.integers(0, 2**bits - 1)))
    share = values / (2**bits - 1)
    if colour_type in (0, 2) and draw(st.booleans()):
        key = values[draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))]
        alpha = ~(values == key).all(axis=2, keepdims=True)
        data = png(values, bits, colour_type, (b"tRNS", key.astype(">u2").tobytes()))
    else:
        alpha = share[..., -1:] if channels in (2, 4) else np.ones((height, width, 1))
        data = png(values, bits, colour_type)
    colours = share[..., : 3 if channels >= 3 else 1]
    return data, np.broadcast_to(255 * (colours * alpha + 1 - alpha), (height, width, 3))


@given(png_kinds())
@settings(max_examples=200, deadline=None)
def test_every_kind_of_png_is_as_its_chunks_say(case: tuple[bytes, np.ndarray]) -> None:
    data, expected = case
    assert np.abs(shown(data) - np.rint(expected)).max() <= 1


@given(arrays.arrays(st.sampled_from([np.uint8, np.uint16]), st.tuples(*[st.integers(1, 12)] * 2, st.integers(1, 4))))
@settings(max_examples=60, deadline=None)
def test_png_by_another_writer_and_reader(values: np.ndarray) -> None:
    data = imagecodecs.png_encode(values)
    share = imagecodecs.png_decode(data).reshape(values.shape) / np.iinfo(values.dtype).max
    channels = values.shape[2]
    alpha = share[..., -1:] if channels in (2, 4) else 1
    colours = share[..., : 3 if channels >= 3 else 1]
    assert np.abs(shown(data) - np.rint(255 * (colours * alpha + 1 - alpha))).max() <= 1


def text_chunk(name: bytes, size: int) -> tuple[bytes, bytes]:
    return {b"zTXt": (name, b"comment\0\0" + zlib.compress(b"a" * size)), b"tEXt": (name, b"c\0" + b"a" * size)}[name]


@pytest.mark.parametrize("name", [b"zTXt", b"tEXt"])
def test_text_behind_the_pixels_breaks_nothing(name: bytes) -> None:
    values = np.arange(12).reshape(2, 2, 3)
    plain = png(values, 8, 2)
    chunk, data = text_chunk(name, 3 << 20)
    behind = struct.pack(">I", len(data)) + chunk + data + struct.pack(">I", zlib.crc32(chunk + data))
    assert np.array_equal(shown(plain[:-12] + behind + plain[-12:]), values)


@given(
    st.sampled_from([(0, 1), (2, 3), (3, 1), (4, 2), (6, 4)]), st.sampled_from([1, 2, 4, 8, 16]), st.booleans(),
    st.tuples(st.integers(1, 20), st.integers(1, 20)), st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_a_png_whose_data_ends_early_is_broken(kind, bits, interlaced, size, lost) -> None:
    """A whole one, black ones too, is not. lost: the rows or passes' rows whose data is missing."""
    (colour_type, channels), (height, width) = kind, size
    bits = 8 if (colour_type, bits) == (3, 16) or (colour_type not in (0, 3) and bits < 8) else bits
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = [
        b"\0" * (1 + (len(range(x, width, dx)) * channels * bits + 7) // 8)
        for x, y, dx, dy in (passes if interlaced else [(0, 0, 1, 1)])
        for _ in range(y, height, dy)
        if range(x, width, dx)
    ]
    lost = min(lost, len(rows) - 1)
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, interlaced)
    parts = [(b"IHDR", header), (b"PLTE", bytes(6)), (b"IDAT", zlib.compress(b"".join(rows[: len(rows) - lost])))]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in [*(part for part in parts if part[0] != b"PLTE" or colour_type == 3), (b"IEND", b"")]
    )
    assert image_size(data) == (width, height)
    if lost:
        with pytest.raises(RowError, match="image_corrupt"):
            load_image(data)
    else:
        assert (shown(data) == (0 if channels in (1, 3) else 255)).all()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (png(np.zeros((2, 2, 1), np.uint8), 2, 3), "a PNG without its palette"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\4CgBI", "CgBI"),
    ],
)
def test_a_png_that_cannot_be_shown_is_refused_by_its_kind(data: bytes, words: str) -> None:
    with pytest.raises(RowError, match=f"image_unreadable.*{words}"):
        image_size(data)


# ------------------------------------------------------------ BMP


def bmp_with_masks(values: np.ndarray) -> bytes:
    """A BMP of 32 bits with a transparency mask (BITMAPV4HEADER). values: uint8 [height, width, 4] of red … alpha."""
    height, width, _ = values.shape
    pixels = values[::-1, :, [2, 1, 0, 3]].tobytes()
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks
    header = header.ljust(108, b"\0")
    offset = 14 + len(header)
    return b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset) + header + pixels


@given(arrays.arrays(np.uint8, st.tuples(*[st.integers(1, 9)] * 2, st.just(4))), st.booleans())
@settings(max_examples=60, deadline=None)
def test_bmp_with_transparency_and_with_a_filler(values: np.ndarray, is_filler: bool) -> None:
    if is_filler:
        values[..., 3] = 0
    alpha = np.ones((1, 1, 1)) if not values[..., 3].any() else values[..., 3:] / 255
    expected = values[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(shown(bmp_with_masks(values)) - expected).max() <= 1


# ------------------------------------------------------------ others


def test_the_canvas_of_a_webp_around_a_smaller_frame_is_white() -> None:
    """Of an animation that names no transparency, and a background, which browsers do not draw."""
    red = io.BytesIO()
    Image.new("RGB", (6, 4), (220, 30, 30)).save(red, "WEBP", lossless=True)
    frame = (
        b"".join(struct.pack("<I", value)[:3] for value in (2 // 2, 4 // 2, 5, 3, 100)) + b"\0" + red.getvalue()[12:]
    )
    chunks = [(b"VP8X", b"\2\0\0\0\x0b\0\0\x09\0\0"), (b"ANIM", b"\x10\x20\x30\xff\0\0"), (b"ANMF", frame)]
    body = b"WEBP" + b"".join(name + struct.pack("<I", len(data)) + data for name, data in chunks)
    expected = np.full((10, 12, 3), 255)
    expected[4:8, 2:8] = 220, 30, 30
    assert np.array_equal(shown(b"RIFF" + struct.pack("<I", len(body)) + body), expected)


@pytest.mark.parametrize("name", ["Pf", "PF"])
def test_pfm(name: str) -> None:
    values = np.linspace(0, 1, 35).reshape(5, 7)
    data = (
        f"{name}\n7 5\n-1.0\n".encode()
        + np.repeat(values[::-1, :, None], 3 if name == "PF" else 1, 2).astype("<f4").tobytes()
    )
    if name == "PF":
        with pytest.raises(RowError, match="image_unreadable"):
            image_size(data)
    else:
        assert np.abs(shown(data) - 255 * values[..., None]).max() <= 1


@pytest.mark.parametrize("form", ["AVIF", "JPEG2000", "HEIF"])
@pytest.mark.parametrize("kept", [0, 64])
def test_zeros_in_the_place_of_compressed_pixels(form: str, kept: int) -> None:
    """Up to the end, or with the end of the file. Zeros behind the picture are no loss."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8))
    file = io.BytesIO()
    if form == "HEIF":
        pytest.importorskip("pillow_heif").from_pillow(noise).save(file, quality=95)
    else:
        noise.save(file, form, quality=95) if form == "AVIF" else noise.save(file, form)
    data = file.getvalue()
    middle, end = len(data) // 2, len(data) - kept
    with pytest.raises(RowError, match="image_corrupt"):
        load_image(data[:middle] + bytes(end - middle) + data[end:])
    assert np.array_equal(shown(data + bytes(9000)), shown(data))


# ------------------------------------------------------------ JPEG 2000


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("container", ["jp2", "j2k"])
def test_jpeg_2000_of_grey_and_of_colours(bits: int, container: str) -> None:
    values = np.random.default_rng(0).integers(0, 2**bits, (16, 16, 3)).astype(np.uint8 if bits == 8 else np.uint16)
    values[0, 0] = 2**bits - 1
    options = {"bitspersample": bits, "level": 0, "codecformat": container}
    grey = imagecodecs.jpeg2k_encode(np.ascontiguousarray(values[..., 0]), **options)
    assert np.abs(shown(grey) - values[..., :1] / (2**bits - 1) * 255).max() <= 1.01
    colours = imagecodecs.jpeg2k_encode(values, **options)
    if bits == 8:
        assert np.array_equal(shown(colours), imagecodecs.jpeg2k_decode(colours))
    else:
        with pytest.raises(RowError, match=f"image_unreadable.*JPEG 2000 of {bits} bits, 3 channels"):
            image_size(colours)
