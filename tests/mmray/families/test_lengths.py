"""Lengths from sizes alone: the tokens of an image equal those that the real processor writes for it, always."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from mmray.families import family_of

fixtures_are_read_only = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
many = settings(fixtures_are_read_only, max_examples=120)
few = settings(fixtures_are_read_only, max_examples=6)

QWEN = ("qwen2_vl", "qwen2_5_vl")
TILED = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}


def written(processor, size, *, tiled=False):
    """The ids that the processor writes for a text around an image of this size."""
    family = family_of(processor, tiled=tiled)
    page = Image.new("RGB", size, "white")
    return processor(text=[around(family)], images=[page], **family.processor_kwargs)["input_ids"][0]


def around(family):
    return f"The page: {family.placeholder_unit} and\nits text"


def check(processor, size, *, tiled=False):
    """mmray's ids equal the processor's; returns the number of those that stand for the image."""
    expected = written(processor, size, tiled=tiled)
    family = family_of(processor, tiled=tiled)
    ids = np.asarray(processor.tokenizer(around(family))["input_ids"])
    (place,) = np.flatnonzero(ids == family.placeholder_id)
    span = family.span(size)
    assert np.concatenate([ids[:place], span.token_ids, ids[place + 1 :]]).tolist() == expected
    assert span.token_ids.dtype == np.int32
    assert span.visual_tokens == expected.count(family.image_token_id)
    return len(span.token_ids)


def check_also_refusal(processor, size):
    """Some pages a pixel wide come out of the processor's arithmetic with no width at all; it refuses them."""
    try:
        written(processor, size)
    except ValueError:
        assert 1 in size
        with pytest.raises(ValueError, match="makes nothing of a page"):
            family_of(processor).span(size)
    else:
        check(processor, size)


def theirs(processor, size):
    """What transformers itself counts for inference servers."""
    width, height = size
    (count,) = processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens
    return count


# ---- Settings and sizes ----


@st.composite
def sizes(draw, *, longest=700, max_ratio=None):
    """(width, height): ordinary ones, sides of a pixel, and as long and narrow as is allowed."""
    long = draw(st.integers(1, longest))
    shortest = 1 if max_ratio is None else -(-long // max_ratio)
    short = draw(st.one_of(st.just(shortest), st.integers(shortest, long)))
    return draw(st.sampled_from([(long, short), (short, long)]))


@dataclass(frozen=True)
class QwenSettings:
    patch: int = 14
    merge: int = 2
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 96 * 28 * 28

    def applied(self, processor: Any) -> Any:
        images = Qwen2VLImageProcessorPil(
            patch_size=self.patch, merge_size=self.merge, min_pixels=self.min_pixels, max_pixels=self.max_pixels
        )
        return with_images(processor, images)


@dataclass(frozen=True)
class TiledSettings:
    side: int = 64
    longest_edge: int = 128
    seq_len: int = 4
    splitting: bool = True
    resize: bool = True

    def applied(self, processor: Any, model_type: str) -> Any:
        images = TILED[model_type](
            max_image_size={"longest_edge": self.side}, size={"longest_edge": self.longest_edge},
            do_image_splitting=self.splitting, do_resize=self.resize,
        )  # fmt: skip
        changed = with_images(processor, images)
        changed.image_seq_len = self.seq_len
        return changed


def with_images(processor: Any, images: Any) -> Any:
    changed = copy.copy(processor)
    changed.image_processor = images
    return changed


qwen_settings = st.builds(
    QwenSettings,
    patch=st.integers(4, 16),
    merge=st.integers(1, 3),
    min_pixels=st.integers(1, 40_000),
    max_pixels=st.integers(5_000, 200_000),
)
tiled_settings = st.builds(
    TiledSettings,
    side=st.integers(17, 80),
    longest_edge=st.integers(10, 250),
    seq_len=st.integers(1, 9),
    splitting=st.sampled_from([True, True, False]),
    resize=st.sampled_from([True, True, False]),
)


# ---- Small processors ----


@pytest.mark.parametrize("model_type", QWEN)
@many
@given(setting=qwen_settings, size=sizes(max_ratio=200))
@example(setting=QwenSettings(), size=(1, 1))
@example(setting=QwenSettings(), size=(200, 1))
@example(setting=QwenSettings(), size=(3, 600))
@example(setting=QwenSettings(max_pixels=5_000), size=(1400, 7))
def test_qwen(processors, model_type, setting, size):
    processor = setting.applied(processors[model_type])
    assert check(processor, size) == theirs(processor, size)


@pytest.mark.parametrize("size", [(201, 1), (2, 403)])
def test_qwen_takes_no_narrower_page(processors, size):
    with pytest.raises(ValueError, match="aspect ratio"):
        family_of(processors["qwen2_vl"]).span(size)
    with pytest.raises(ValueError, match="aspect ratio"):
        written(processors["qwen2_vl"], size)


@pytest.mark.parametrize("model_type", TILED)
@many
@given(setting=tiled_settings, size=sizes())
@example(setting=TiledSettings(), size=(1, 1))
@example(setting=TiledSettings(), size=(1, 5000))
@example(setting=TiledSettings(), size=(64, 64))
@example(setting=TiledSettings(longest_edge=129), size=(300, 299))
@example(setting=TiledSettings(side=20, longest_edge=250), size=(300, 290))
@example(setting=TiledSettings(side=21, splitting=False), size=(22, 20))
@example(setting=TiledSettings(side=17, longest_edge=187), size=(1, 187))
def test_idefics3(processors, model_type, setting, size):
    check_also_refusal(setting.applied(processors[model_type], model_type), size)


@fixtures_are_read_only
@given(size=sizes(), splitting=st.booleans())
def test_idefics3_s_own_count(processors, size, splitting):
    """Where the longest edge is a multiple of the frame's side, as published, its own count is right too."""
    processor = TiledSettings(splitting=splitting).applied(processors["idefics3"], "idefics3")
    assert check(processor, size) == theirs(processor, size)


@pytest.mark.parametrize(
    ("setting", "size"),
    [
        (TiledSettings(longest_edge=100), (300, 180)),
        (TiledSettings(side=50, longest_edge=120), (48, 120)),
        (TiledSettings(resize=False), (200, 100)),
    ],
)
def test_idefics3_s_own_count_is_wrong_for_other_settings(processors, setting, size):
    """The reason why mmray does not ask `_get_num_multimodal_tokens` here."""
    processor = setting.applied(processors["idefics3"], "idefics3")
    assert check(processor, size) != theirs(processor, size)


@pytest.mark.parametrize("side", [64, 63, 17])
@pytest.mark.parametrize("model_type", TILED)
def test_idefics3_tiles(processors, model_type, side):
    processor = replace(TiledSettings(), side=side).applied(processors[model_type], model_type)
    assert check(processor, (side, side), tiled=True) == processor.image_seq_len + 3


@pytest.mark.parametrize("model_type", QWEN)
@many
@given(setting=qwen_settings, columns=st.integers(1, 12), rows=st.integers(1, 12))
def test_qwen_tiles_of_any_number_of_pixels(processors, model_type, setting, columns, rows):
    """A tile's size is the job's choice: the processor's limits on pixels do not change it."""
    processor = setting.applied(processors[model_type])
    multiple = setting.patch * setting.merge
    assert check(processor, (columns * multiple, rows * multiple), tiled=True) == columns * rows


# ---- Real processors ----


@few
@given(size=sizes(longest=900, max_ratio=150))
def test_real_processors(shared_processor, size):
    assert check(shared_processor, size) == theirs(shared_processor, size)


@pytest.mark.parametrize("size", [(1, 1), (1, 150), (512, 512), (1024, 1536), (513, 4096)])
def test_real_processors_on_pages(shared_processor, size):
    assert check(shared_processor, size) == theirs(shared_processor, size)
