"""The families with M-RoPE beyond what every family shows: rules of sizes, and turns without markers of their own."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig

from mmray.families import PackedRow, family_of
from mmray.loss.labels import segment_ids
from mmray.loss.rules import IGNORE_INDEX, LossRule
from mmray.loss.settings import RoleLoss
from mmray.loss.sources import label_maker
from tests.mmray.noise import noise

PROCESSORS = pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "glm4v", "glm46v", "paddleocr_vl"])


def with_settings(processor, **changes):
    changed = copy.copy(processor)
    images = processor.image_processor
    changed.image_processor = type(images)(**images.to_dict() | changes)
    return changed


# ---- Sizes ----

sides = st.integers(1, 400)


@PROCESSORS
@settings(deadline=None, max_examples=40)
@given(width=sides, height=sides)
@example(1, 1)
@example(1, 200)
@example(1, 201)
@example(900, 4)
@example(27, 29)
def test_pages_of_any_size(zoo_processor, name, width, height):
    family = family_of(zoo_processor(name))
    page = Image.new("RGB", (width, height))
    try:
        expected = family.process(family.placeholder, [page])["input_ids"][0].count(family.image_token_id)
    except ValueError:
        with pytest.raises(ValueError, match="aspect ratio"):
            family.span((width, height))
    else:
        assert family.span((width, height)).visual_tokens == expected


@PROCESSORS
def test_a_processor_that_does_not_resize_takes_whole_squares_alone(zoo_processor, name):
    family = family_of(with_settings(zoo_processor(name), do_resize=False))
    side = family.tile_multiple
    page = noise((3 * side, 2 * side))
    (frame,) = family.frames(page)
    assert np.array_equal(frame, np.asarray(page))
    assert family.span(page.size).visual_tokens == 6
    assert family.process(family.placeholder, [page])["input_ids"][0].count(family.image_token_id) == 6
    for size in ((3 * side, 2 * side - 1), (3 * side + 1, 2 * side), (side // 2, side)):
        with pytest.raises(ValueError, match=f"multiples of {side} pixels"):
            family.span(size)


# ---- The model ----


@pytest.mark.parametrize("kind", ["default", "yarn", "dynamic", "longrope"])
def test_frequencies_set_by_the_longest_sample_do_not_pack(zoo_processor, kind):
    rope = {"rope_type": kind, "rope_theta": 1e6, "mrope_section": [2, 3, 3], "factor": 2.0}
    config = AutoConfig.for_model("qwen2_vl")
    config.get_text_config().rope_parameters = rope
    problem = family_of(zoo_processor("qwen2_vl")).packing_problem(config, sample_tokens=10, row_tokens=100)
    assert (problem is None) == (kind in ("default", "yarn"))
    assert problem is None or f"rope_type {kind}" in problem


def test_only_flash_attention_is_told_where_samples_begin(zoo_processor):
    family = family_of(zoo_processor("glm4v"))
    lengths = torch.tensor([3, 5, 1])
    row = PackedRow(torch.zeros(9, dtype=torch.int64), lengths, segment_ids(lengths), ())
    config = AutoConfig.for_model("glm4v")
    for attention in ("sdpa", "eager"):
        config._attn_implementation = attention
        assert family.attention_inputs(row, torch.float32, config) == {}
    config._attn_implementation = "flash_attention_2"
    found = family.attention_inputs(row, torch.float32, config)
    assert found["cu_seq_lens_q"].tolist() == found["cu_seq_lens_k"].tolist() == [0, 3, 8, 9]
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert found["max_length_q"] == found["max_length_k"] == 5


# ---- Turns ----


def trained_text(family, text, loss="sampled"):
    ids = np.asarray(family.tokenizer(text, add_special_tokens=False)["input_ids"])
    rules = np.asarray([LossRule.ROLES])
    labels = label_maker(loss, family).of_arrays(ids, np.asarray([len(ids)]), rules, np.zeros(len(ids), bool), [])
    return family.tokenizer.decode(labels[labels != IGNORE_INDEX], skip_special_tokens=False)


CALL = (
    "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHow warm?<|assistant|>\nlook()"
    "<|observation|>\n12<|assistant|>\n12 degrees.<|assistant|>Really.<|user|>\nThanks"
)


@pytest.mark.parametrize("name", ["glm4v", "glm46v"])
def test_glm_s_turns_end_where_any_turn_begins(zoo_processor, name):
    family = family_of(zoo_processor(name), model_type=name)
    assert trained_text(family, CALL) == "look()<|observation|>12 degrees.Really.<|user|>"
    for train_on_eos in ("turn", "all", "last", "none"):
        assert trained_text(family, CALL, RoleLoss(train_on_eos=train_on_eos)) == "look()12 degrees.Really."
    assert trained_text(family, CALL, RoleLoss(roles=("tool",))) == "12"
    assert trained_text(family, CALL, RoleLoss(roles=("system", "user"))) == "Be brief.How warm?Thanks"


@pytest.mark.parametrize(("space", "answer"), [(" ", " Anna Berg."), ("\n", "Anna Berg.")])
def test_paddleocr_s_turns_are_told_by_words_at_the_beginning_of_a_line(zoo_processor, space, answer):
    """Templates write a space, which the tokenizer joins with the answer's first word, or a line break."""
    family = family_of(zoo_processor("paddleocr_vl"))
    image = family.placeholder_unit
    text = (
        f"<|begin_of_sentence|>Be brief. User: none.\nUser: {image}What does 'Assistant: yes' mean?\n"
        f"Assistant:{space}Anna Berg.</s>User: And Assistant: no?\nAssistant:{space}Anna. User: Anna.</s>"
    )
    own = " Anna. User: Anna." if space == " " else "Anna. User: Anna."
    assert trained_text(family, text) == f"{answer}</s>{own}</s>"
    assert trained_text(family, text, RoleLoss(train_on_eos="none")) == f"{answer}{own}"
    assert trained_text(family, text, RoleLoss(train_on_eos="last")) == f"{answer}{own}</s>"
    asked = trained_text(family, text, RoleLoss(roles=("user",)))
    assert "What does 'Assistant: yes' mean?" in asked
    assert "And Assistant: no?" in asked
    assert "Berg" not in asked
    assert "Be brief" in trained_text(family, text, RoleLoss(roles=("system",)))


def test_glm_s_and_paddleocr_s_image_tokens_never_train(zoo_processor):
    for name in ("glm4v", "paddleocr_vl"):
        family = family_of(zoo_processor(name))
        unit = set(family.tokenizer(family.placeholder_unit, add_special_tokens=False)["input_ids"])
        assert unit <= set(family.media_token_ids)
        assert len(unit) == 3
