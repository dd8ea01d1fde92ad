"""LFM2-VL: pictures of any size, and what its convolutions need between samples."""

import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmray.images import TilingPolicy
from tests.mmray.families.pictures import changed_family, check_picture, many, nothing_of_it, sizes
from tests.mmray.families.test_packed_equals_unpacked import error, logits_of, make_case  # noqa: F401

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="lfm2_vl needs torchvision")


def is_overfull(family, output):
    """More patches than the mask has places: the model raises."""
    overfull = output["pixel_values"].shape[1] != output["pixel_attention_mask"].shape[1]
    return overfull or nothing_of_it(family, output)


@many
@given(
    splits=st.booleans(), thumbnail=st.booleans(), most=st.integers(2, 8), tile=st.sampled_from([32, 48]),
    fewest_tokens=st.integers(1, 8), most_tokens=st.integers(8, 20), tolerance=st.floats(1, 3), size=sizes,
)  # fmt: skip
def test_any_picture(
    zoo_processor, splits, thumbnail, most, tile, fewest_tokens, most_tokens, tolerance, size
):  # fmt: skip
    family = changed_family(
        "lfm2_vl", zoo_processor("lfm2_vl"), do_image_splitting=splits, use_thumbnail=thumbnail, max_tiles=most,
        tile_size=tile, min_image_tokens=fewest_tokens, max_image_tokens=most_tokens, max_pixels_tolerance=tolerance,
    )  # fmt: skip
    check_picture("lfm2_vl", family, size, is_overfull)


def largest_error(case, inputs, step=0):
    """step: tokens by which each sample begins earlier than the one before it shifts it to."""
    packed = logits_of(case.model, inputs)
    errors = []
    for number, (alone, where) in enumerate(case.samples([0])):
        own = slice(where.start - number * step, where.stop - number * step)
        errors.append(error(packed[own], logits_of(case.model, alone)))
    return max(errors)


def test_convolutions_see_zeros_between_samples(make_case):  # noqa: F811
    case = make_case("lfm2_vl")
    inputs = case.inputs(case.micro_batch(0))
    masks = inputs["attention_mask"]
    assert largest_error(case, inputs) < 1e-5
    open_masks = masks | {"conv": torch.ones_like(masks["conv"])}
    assert largest_error(case, inputs | {"attention_mask": open_masks}) > 1e-3


def test_without_a_gap_convolutions_look_into_the_sample_before(make_case, monkeypatch):  # noqa: F811
    case = make_case("lfm2_vl")
    gap = case.family.sample_gap
    monkeypatch.setattr(type(case.family), "sample_gap", 0)
    inputs = case.inputs(case.micro_batch(0))
    assert largest_error(case, inputs) > 1e-3
    monkeypatch.setattr(type(case.family), "sample_gap", gap)
    assert largest_error(case, case.inputs(case.micro_batch(0))) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [({"conv_L_cache": 4}, "look back over 3 tokens"), ({"conv_bias": True}, "conv_bias"), ({}, None)],
)
def test_what_packs(make_case, monkeypatch, change, message):  # noqa: F811
    case = make_case("lfm2_vl")
    for name, value in change.items():
        monkeypatch.setattr(case.model.config.text_config, name, value)
    problem = case.family.packing_problem(case.model.config, sample_tokens=100, row_tokens=100)
    assert (problem is None) == (message is None)
    assert message is None or message in problem


def test_tiles_it_would_resample_are_refused(zoo_processor):
    family = changed_family("lfm2_vl", zoo_processor("lfm2_vl"), tiled=True)
    family.resolve_tiling(TilingPolicy(grid=(2, 2), tile_size=(64, 64)))
    with pytest.raises(ValueError, match="80 x 64 pixels would be made smaller"):
        family.resolve_tiling(TilingPolicy(grid=(2, 2), tile_size=(80, 64)))
    with pytest.raises(ValueError, match="would be resized"):
        family.span((80, 64))
    assert family.span((64, 16)).visual_tokens == 4
