"""Pixels: uint8 frames and the arithmetic after them give what the real processor gives for the same pictures."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from mmray.families import Tile, family_of
from mmray.families.base import normalised
from mmray.images import TilingPolicy, cut_tiles, plan_tiles
from tests.mmray.families.small_models import small_model
from tests.mmray.noise import noise

SIZES = [(150, 90), (64, 64), (31, 200), (300, 140), (1, 40), (47, 53)]
"""Wide, square, narrow, larger than the processors' limits, a pixel wide, no multiple of anything."""


def check_pixels(processor, pictures, *, tiled=False):
    family = family_of(processor, tiled=tiled)
    text = " and ".join([family.placeholder_unit] * len(pictures))
    expected = processor(text=[text], images=pictures, return_tensors="pt", **family.processor_kwargs)
    tiles, frames = as_tiles(family, pictures)
    assert {(frame.dtype, frame.shape[2]) for frame in frames} == {(torch.uint8, 3)}
    found = family.pixel_inputs(tiles, frames, torch.float32)
    assert set(found) == set(expected) & {"pixel_values", "image_grid_thw", "pixel_attention_mask"}
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5 if name == "pixel_values" else 0)
    features = sum(map(family.feature_count, tiles))
    assert features == (expected["input_ids"] == family.image_token_id).sum()
    assert features == sum(family.span(picture.size).visual_tokens for picture in pictures)
    assert family.pixel_inputs(tiles, frames, torch.bfloat16)["pixel_values"].dtype == torch.bfloat16


def as_tiles(family, pictures):
    """The tiles of some pictures, and their frames as tensors."""
    tiles, frames = [], []
    for picture in pictures:
        own = family.frames(picture, len(pictures))
        tiles.append(Tile(0, picture.size, tuple((frame.shape[1], frame.shape[0]) for frame in own)))
        frames += [torch.from_numpy(frame.copy()) for frame in own]
    return tiles, frames


def with_settings(processor, **changes):
    changed = copy.copy(processor)
    changed.image_processor = copy.deepcopy(processor.image_processor)
    for name, value in changes.items():
        assert hasattr(changed.image_processor, name)
        setattr(changed.image_processor, name, value)
    return changed


# ---- Whole pages ----


def test_pages_of_all_sizes_in_order(processor):
    check_pixels(processor, [noise(size, seed) for seed, size in enumerate(SIZES)])


@pytest.mark.parametrize("size", SIZES)
def test_one_page(processor, size):
    check_pixels(processor, [noise(size)])


@pytest.mark.parametrize(
    "changes",
    [
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False},
        {"do_normalize": False},
        {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.2, 0.4, 0.8]},
        {"resample": 3},
    ],
)
def test_other_settings(processor, changes):
    if changes == {"do_rescale": False}:  # bytes as they are: make the arithmetic after them comparable
        changes = {**changes, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 70.0, 80.0]}
    check_pixels(with_settings(processor, **changes), [noise((150, 90)), noise((31, 200), 1)])


def test_frames_without_splitting(processors):
    for model_type in ("idefics3", "smolvlm"):
        processor = with_settings(processors[model_type], do_image_splitting=False)
        check_pixels(processor, [noise((150, 90)), noise((31, 200), 1)])


@pytest.mark.parametrize("name", ["p0000.jpg", "p0013.jpg"])
def test_real_pages(shared_processor, shared_data, name):
    with Image.open(shared_data / "pages" / name) as page:
        check_pixels(shared_processor, [page.convert("RGB").reduce(2)])


# ---- Tiles ----

POLICIES = {
    "preset": TilingPolicy(preset="ocr_pages"),
    "preset with overview": TilingPolicy(preset="ocr_pages", overview=(448, 448), labels=True),
    "sizes that do not fit": TilingPolicy(grid=(2, 2), tile_size=(100, 61), overview=(10, 10)),
    "less than the least": TilingPolicy(grid=(2, 1), tile_size=(28, 28)),
    "more than the most": TilingPolicy(grid=(1, 1), tile_size=(1000, 1200)),
    "small pages": TilingPolicy(grid=(2, 2), tile_size=(90, 90), min_area=10**6),
    "native": TilingPolicy(grid=(2, 3), native_resolution=True),
    "native with overview": TilingPolicy(grid=(2, 3), native_resolution=True, overview=(50, 50)),
}


def resolved_tiles(processor, policy, size=(301, 411)):
    family = family_of(processor, tiled=True)
    return cut_tiles(noise(size), plan_tiles(size, family.resolve_tiling(policy)))


@pytest.mark.parametrize("name", POLICIES)
def test_tiles_are_not_resampled(processor, model_type, name):
    policy = POLICIES[name]
    if policy.native_resolution and model_type in ("idefics3", "smolvlm"):
        with pytest.raises(ValueError, match="native_resolution"):
            resolved_tiles(processor, policy)
        return
    tiles = resolved_tiles(processor, policy)
    assert len(tiles) == len(plan_tiles((301, 411), policy).boxes)
    for tile in tiles:
        (frame,) = family_of(processor, tiled=True).frames(tile)
        assert np.array_equal(frame, np.asarray(tile))
    check_pixels(processor, tiles, tiled=True)


@pytest.mark.parametrize("side", [63, 17])
def test_tiles_of_odd_sides_are_not_resampled(processors, side):
    for model_type in ("idefics3", "smolvlm"):
        processor = with_settings(processors[model_type], max_image_size={"longest_edge": side})
        check_pixels(processor, resolved_tiles(processor, POLICIES["preset"]), tiled=True)
        for tile in resolved_tiles(processor, POLICIES["preset"]):
            (frame,) = family_of(processor, tiled=True).frames(tile)
            assert np.array_equal(frame, np.asarray(tile))


def test_tiles_of_real_processors(shared_processor):
    check_pixels(shared_processor, resolved_tiles(shared_processor, POLICIES["preset"])[:3], tiled=True)


def test_pages_that_are_not_tiled_keep_their_policy(processor):
    assert family_of(processor).resolve_tiling(TilingPolicy()) == TilingPolicy()
    assert family_of(processor).processor_kwargs == {}


# ---- What the models take ----


@pytest.mark.parametrize("tiled", [False, True])
def test_models_make_features_of_the_dummy_frame(processor, processor_folders, model_type, tiled):
    family = family_of(processor, tiled=tiled)
    frames = family.dummy_frames
    assert {frame.dtype for frame in frames} == {np.dtype("uint8")}
    tile = Tile(0, family.dummy_size, tuple((frame.shape[1], frame.shape[0]) for frame in frames))
    inputs = family.pixel_inputs([tile], [torch.from_numpy(frame) for frame in frames], torch.float32)
    with torch.no_grad():
        features = small_model(model_type, processor_folders[model_type]).model.get_image_features(**inputs)
    assert sum(len(each) for each in features.pooler_output) == family.feature_count(tile) > 0


def test_models_make_features_of_every_page(processor, processor_folders, model_type):
    """Idefics3 drops a frame whose values are all zero: no byte becomes a zero, a page of one colour is kept."""
    family = family_of(processor)
    pages = [Image.new("RGB", (70, 70), (grey, grey, grey)) for grey in (0, 127, 128, 255)]
    tiles, frames = as_tiles(family, pages)
    inputs = family.pixel_inputs(tiles, frames, torch.float32)
    with torch.no_grad():
        features = small_model(model_type, processor_folders[model_type]).model.get_image_features(**inputs)
    assert sum(len(each) for each in features.pooler_output) == sum(map(family.feature_count, tiles))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_byte_becomes_zero(processor, dtype):
    every_byte = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1).expand(-1, 3, 1, 1)
    assert (normalised(every_byte, processor.image_processor, dtype) != 0).all()
