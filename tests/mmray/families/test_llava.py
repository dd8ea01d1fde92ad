"""LLaVA, LLaVA-NeXT, LLaVA-OneVision and InternVL: exact lengths for any setting and size, and what is refused."""

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from mmray.errors import UserError
from mmray.families import Tile, family_of
from mmray.families.llava import frame_size
from mmray.images import TilingPolicy, cut_tiles, plan_tiles
from tests.mmray.families.small_models import small_model
from tests.mmray.noise import noise

many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

FAMILIES = ("llava", "llava_next", "llava_onevision", "internvl")
TILED = TilingPolicy(grid=(2, 2), tile_size=(50, 40))


def changed(processor: Any, images: Any, **settings: Any) -> Any:
    """A processor with another image processor and other settings of its own."""
    other = copy.copy(processor)
    other.image_processor = images
    for name, value in settings.items():
        assert hasattr(other, name)
        setattr(other, name, value)
    return other


def check(processor: Any, sizes: Sequence[tuple[int, int]]) -> None:
    """Tokens and features of a sample's pictures equal the processor's, or both refuse it."""
    family = family_of(processor)
    pages = [noise(size, seed) for seed, size in enumerate(sizes)]
    text = " and ".join([family.placeholder_unit] * len(pages))
    try:
        expected = family.process(text, pages)["input_ids"][0]
    except (ValueError, ZeroDivisionError):
        with pytest.raises(ValueError, match="smaller than a frame"):
            [family.span(size, len(sizes)) for size in sizes]
        return
    is_image = np.asarray(expected) == family.image_token_id
    if np.count_nonzero(np.diff(is_image, prepend=False, append=False)) < 2 * len(pages):  # a run for each picture
        with pytest.raises(ValueError, match="makes nothing"):
            [family.span(size, len(sizes)) for size in sizes]
        return
    ids = family.tokenizer(text)["input_ids"]
    places = np.flatnonzero(np.asarray(ids) == family.placeholder_id)
    spans = [family.span(size, len(sizes)) for size in sizes]
    for place, span in reversed(list(zip(places.tolist(), spans))):
        ids[place : place + 1] = span.token_ids.tolist()
    assert ids == list(expected)
    assert sum(span.visual_tokens for span in spans) == ids.count(family.image_token_id)
    for page, span in zip(pages, spans):
        frames = family.frames(page, len(pages))
        tile = Tile(0, page.size, tuple((frame.shape[1], frame.shape[0]) for frame in frames))
        assert family.feature_count(tile) == span.visual_tokens


sides = st.integers(17, 80)
boxes = st.builds(lambda height, width: {"height": height, "width": width}, sides, sides)
squares = st.builds(lambda side: {"height": side, "width": side}, sides)
shortest = st.builds(lambda side: {"shortest_edge": side}, sides)
pages = st.one_of(
    st.tuples(st.integers(1, 300), st.integers(1, 300)), st.sampled_from([(1, 1), (1, 700), (700, 1), (3, 3)])
)
strategies = st.sampled_from(["default", "full"])


@many
@given(
    size=st.one_of(boxes, shortest), crop=st.one_of(st.none(), boxes), patch=st.integers(4, 20),
    extra=st.integers(0, 1), strategy=strategies, page=pages, resize=st.sampled_from([True, True, False]),
    squared=st.booleans(),
)  # fmt: skip
@example(
    size={"shortest_edge": 20}, crop=None, patch=14, extra=0, strategy="default", page=(90, 60), resize=False,
    squared=True,
)  # fmt: skip
def test_llava(zoo_processor, size, crop, patch, extra, strategy, page, resize, squared):
    kind = LlavaImageProcessorPil if squared else CLIPImageProcessorPil
    images = kind(
        size=size, crop_size=crop or {"height": 1, "width": 1}, do_center_crop=crop is not None, do_resize=resize,
        do_pad=squared,
    )  # fmt: skip
    processor = changed(
        zoo_processor("llava"), images, patch_size=patch, num_additional_image_tokens=extra,
        vision_feature_select_strategy=strategy,
    )  # fmt: skip
    check(processor, [page])


@st.composite
def anyres(draw: Any) -> dict[str, Any]:
    """Settings of the processors that split a page: mostly resolutions that frames fill, some that they do not."""
    side = draw(sides)
    cells = st.integers(1, 4).map(lambda count: count * side)
    pinpoint = st.one_of(st.tuples(cells, cells), st.tuples(st.integers(10, 200), st.integers(10, 200)))
    pinpoints = draw(st.lists(pinpoint.map(list), min_size=1, max_size=5))
    crop = {"height": side, "width": side}
    size = draw(st.sampled_from([{"shortest_edge": side}, crop, {"shortest_edge": side + 7}]))
    return {"size": size, "crop_size": crop, "do_center_crop": True, "image_grid_pinpoints": pinpoints}


@many
@given(images=anyres(), patch=st.integers(4, 20), extra=st.integers(0, 1), strategy=strategies, page=pages)
@example(
    images={
        "size": {"shortest_edge": 17}, "crop_size": {"height": 17, "width": 17}, "do_center_crop": True,
        "image_grid_pinpoints": [[34, 34]],
    },
    patch=9, extra=0, strategy="default", page=(3, 1),
)  # fmt: skip
def test_llava_next(zoo_processor, images, patch, extra, strategy, page):
    processor = changed(
        zoo_processor("llava_next"), LlavaNextImageProcessorPil(**images), patch_size=patch,
        num_additional_image_tokens=extra, vision_feature_select_strategy=strategy,
    )  # fmt: skip
    check(processor, [page, (50, 40)])


@many
@given(
    images=anyres(), root=st.integers(1, 5), strategy=strategies, most=st.integers(1, 9),
    sample=st.lists(pages, min_size=1, max_size=3),
)  # fmt: skip
@example(
    images={"size": {"height": 56, "width": 56}, "image_grid_pinpoints": [[168, 168]]}, root=4, strategy="full",
    most=2, sample=[(200, 200)],
)  # fmt: skip
def test_llava_onevision(zoo_processor, images, root, strategy, most, sample):
    processor = changed(
        zoo_processor("llava_onevision"), LlavaOnevisionImageProcessorPil(**images), num_image_tokens=root**2,
        vision_feature_select_strategy=strategy, vision_aspect_ratio=f"anyres_max_{most}",
    )  # fmt: skip
    check(processor, sample)


@many
@given(size=boxes, least=st.integers(1, 4), more=st.integers(0, 8), length=st.integers(1, 9), page=pages)
def test_internvl(zoo_processor, size, least, more, length, page):
    images = GotOcr2ImageProcessorPil(size=size, min_patches=least, max_patches=least + more)
    check(changed(zoo_processor("internvl"), images, image_seq_length=length), [page, (40, 50)])


def test_onevision_s_own_count_is_wrong_for_several_pictures(zoo_processor):
    """The reason why mmray does not ask `_get_num_multimodal_tokens` there."""
    family = family_of(zoo_processor("llava_onevision"))
    (count,) = family.processor._get_num_multimodal_tokens(image_sizes=[(90, 150)]).num_image_tokens
    assert family.span((150, 90)).visual_tokens == count
    assert family.span((150, 90), num_tiles=2).visual_tokens == 17 < count


# ---- Pixels ----


def test_pictures_padded_to_squares(zoo_processor):
    """LLaVA's own image processor, with which it was trained: a page is squared with the mean colour, then scaled."""
    images = LlavaImageProcessorPil(
        size={"height": 56, "width": 56}, crop_size={"height": 56, "width": 56}, do_pad=True
    )
    family = family_of(changed(zoo_processor("llava"), images))
    page = noise((90, 40))
    (frame,) = family.frames(page)
    found = family.pixel_inputs([Tile(0, page.size, ((56, 56),))], [torch.from_numpy(frame)], torch.float32)
    expected = family.process(family.placeholder, [page], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found["pixel_values"], expected, rtol=0, atol=1e-5)
    assert np.unique(frame[0].reshape(-1, 3), axis=0).tolist() == [[122, 116, 104]]


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_frames_of_zeros_stand_behind_those_of_smaller_pages(zoo_processor, name):
    family = family_of(zoo_processor(name))
    tiles, frames = [], []
    for number, size in enumerate([(56, 160), (56, 56), (112, 112)]):
        own = family.frames(noise(size, number))
        tiles.append(Tile(number, size, ((56, 56),) * len(own)))
        frames += [torch.from_numpy(frame) for frame in own]
    pixels = family.pixel_inputs(tiles, frames, torch.float32)["pixel_values"]
    counts = [len(tile.frame_sizes) for tile in tiles]
    assert len(set(counts)) > 1
    assert pixels.shape == (3, max(counts), 3, 56, 56)
    for own, count in zip(pixels, counts):
        assert (own[:count].flatten(1).abs().amax(1) > 0).all()
        assert not own[count:].any()


def test_onevision_counts_the_pictures_of_each_sample(zoo_processor):
    family = family_of(zoo_processor("llava_onevision"))
    tiles, frames = [], []
    for sample, num_tiles in ((0, 2), (3, 1), (4, 3)):
        for number in range(num_tiles):
            own = family.frames(noise((60, 50), number), num_tiles)
            tiles.append(Tile(sample, (60, 50), ((56, 56),) * len(own)))
            frames += [torch.from_numpy(frame) for frame in own]
    found = family.pixel_inputs(tiles, frames, torch.float32)
    assert found["batch_num_images"].tolist() == [2, 1, 3]
    assert found["image_sizes"].tolist() == [[50, 60]] * 6
    assert [len(tile.frame_sizes) > 1 for tile in tiles] == [False, False, True, False, False, False]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tiled", [False, True])
def test_models_make_features_of_the_dummy_picture(zoo_processor, zoo_folder, name, tiled):
    family = family_of(zoo_processor(name), tiled=tiled)
    frames = family.dummy_frames
    tile = Tile(0, family.dummy_size, tuple((frame.shape[1], frame.shape[0]) for frame in frames))
    inputs = family.pixel_inputs([tile], [torch.from_numpy(frame) for frame in frames], torch.float32)
    with torch.no_grad():
        found = small_model(name, zoo_folder(name)).model.get_image_features(**inputs).pooler_output
    assert sum(len(each) for each in found) == family.feature_count(tile) > 0


# ---- Tiles ----


def test_a_page_of_one_tile_is_a_lone_picture_to_onevision(zoo_processor):
    """It is seen twice, and not resampled."""
    family = family_of(zoo_processor("llava_onevision"), tiled=True)
    policy = family.resolve_tiling(TilingPolicy(grid=(1, 1), tile_size=(50, 40)))
    (tile,) = cut_tiles(noise((90, 70)), plan_tiles((90, 70), policy))
    frames = family.frames(tile)
    assert len(frames) == 2
    for frame in frames:
        assert np.array_equal(frame, np.asarray(tile))
    assert family.span(tile.size).visual_tokens == 16 + 16 + 4


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("llava", CLIPImageProcessorPil(crop_size={"height": 28, "width": 61}, size={"shortest_edge": 40})),
        ("llava", LlavaImageProcessorPil(size={"height": 28, "width": 61}, do_center_crop=False, do_pad=True)),
        ("internvl", GotOcr2ImageProcessorPil(size={"height": 30, "width": 44}, min_patches=4)),
    ],
)
def test_the_processor_takes_tiles_as_they_are(zoo_processor, name, images):
    family = family_of(changed(zoo_processor(name), images), tiled=True)
    tiles = cut_tiles(noise((90, 70)), plan_tiles((90, 70), family.resolve_tiling(TILED)))
    output = family.process(" ".join([family.placeholder_unit] * 4), tiles, return_tensors="pt")
    frames = [frame for tile in tiles for frame in family.frames(tile, len(tiles))]
    assert all(np.array_equal(frame, np.asarray(tile)) for frame, tile in zip(frames, tiles, strict=True))
    shapes = [Tile(0, tile.size, (tile.size,)) for tile in tiles]
    found = family.pixel_inputs(shapes, [torch.from_numpy(frame.copy()) for frame in frames], torch.float32)
    torch.testing.assert_close(found["pixel_values"], output["pixel_values"], rtol=0, atol=1e-5)
    assert sum(family.span(tile.size, 4).visual_tokens for tile in tiles) == sum(map(family.feature_count, shapes))
    assert (output["input_ids"] == family.image_token_id).sum() == sum(map(family.feature_count, shapes))


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "internvl"])
def test_tiles_get_the_frame_s_size(zoo_processor, name):
    policy = family_of(zoo_processor(name), tiled=True).resolve_tiling(TILED)
    assert policy.tile_size == (56, 56)
    native = TilingPolicy(grid=(2, 2), native_resolution=True)
    with pytest.raises(ValueError, match="native_resolution"):
        family_of(zoo_processor(name), tiled=True).resolve_tiling(native)


def test_llava_next_takes_no_tiles(zoo_processor):
    family = family_of(zoo_processor("llava_next"), tiled=True)
    with pytest.raises(UserError, match="images: LLaVA-NeXT splits every picture itself"):
        family.resolved_tiling(TILED)
    assert family.resolve_tiling(TilingPolicy()) == TilingPolicy()


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 56, "width": 56}, "image_grid_pinpoints": [[56, 112], [112, 112]]},
        {"size": {"height": 56, "width": 42}, "image_grid_pinpoints": [[56, 42]]},
    ],
)
def test_onevision_refuses_tiles_that_it_would_scale(zoo_processor, settings):
    images = LlavaOnevisionImageProcessorPil(**settings)
    family = family_of(changed(zoo_processor("llava_onevision"), images), tiled=True)
    with pytest.raises(ValueError, match="would scale tiles"):
        family.resolve_tiling(TILED)


# ---- What is refused ----


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("llava", "patch_size"),
        ("llava", "vision_feature_select_strategy"),
        ("llava_next", "patch_size"),
        ("llava_onevision", "num_image_tokens"),
    ],
)
def test_processors_from_before_they_knew_the_vision_tower(zoo_processor, name, missing):
    processor = zoo_processor(name)
    with pytest.raises(UserError, match=f"has no {missing}; take a newer revision"):
        family_of(changed(processor, processor.image_processor, **{missing: None}))


@pytest.mark.parametrize("size", [{"shortest_edge": 20, "longest_edge": 40}, {"longest_edge": 40}])
def test_frames_of_no_fixed_size(size):
    images = SimpleNamespace(do_center_crop=False, size=CLIPImageProcessorPil(size=size).size)
    with pytest.raises(UserError, match="the vision tower takes one size"):
        frame_size(images)


def test_media_tokens_are_never_trained(zoo_processor):
    expected = {
        "llava": ["<image>"],
        "llava_next": ["<image>"],
        "llava_onevision": ["<image>", "<video>"],
        "internvl": ["<IMG_CONTEXT>", "<img>", "</img>", "<video>"],
    }
    for name, tokens in expected.items():
        family = family_of(zoo_processor(name))
        assert family.tokenizer.convert_ids_to_tokens(list(family.media_token_ids)) == tokens
        assert set(tokens) <= set(family.structure_tokens)
