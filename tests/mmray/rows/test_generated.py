"""What a chat template marks as generated: the same tokens as transformers finds, in the ids that are packed."""

import copy

import numpy as np
import pytest
from PIL import Image

from mmray.families.qwen2_vl import Qwen2VL
from mmray.loss.rules import LossRule
from mmray.loss.settings import RoleLoss
from mmray.loss.sources import LossSource, ending_token_ids, marks_generated
from mmray.packing.settings import PackingSettings
from mmray.rows.read import RawRow
from tests.mmray.preparing import Preparation, chat, with_marked_template

ROOMY = PackingSettings(token_capacity=10_000, visual_capacity=10_000)
LABELLED = {"grid": (2, 2), "tile_size": (56, 56), "overview": (56, 56), "labels": True, "min_area": 5000}
MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "idefics3")  # the forms that with_marked_template writes


def preparation_of(processor, pictures, **settings):
    dataset = {"files": ("rows.jsonl",), "kind": "chat", "image_root": str(pictures)}
    return Preparation(processor, dataset, packing=ROOMY, **settings)


def decoded(preparation, sample):
    """The text that the sample gives to train, without media."""
    given = sample.given_mask & ~np.isin(sample.input_ids, preparation.family.media_token_ids)
    return preparation.family.tokenizer.decode(sample.input_ids[given])


def by_transformers(processor, row, pictures):
    """Ids and mask as `apply_chat_template` gives them, with the row's pictures."""
    images = iter([Image.open(pictures / name).convert("RGB") for name in row["images"]])
    messages = copy.deepcopy(row["messages"])
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image":
                part["image"] = next(images)
    found = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return found["input_ids"][0], found["assistant_masks"][0]


def turn(role, *parts):
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


ROWS = [
    chat("Who?", "Anna."),
    chat("Où est-ce ?", " Là-bas 字 \n\tok ", "e\u0301 — 😀?", "😀 e\u0301 yes"),
    chat("\n", "\n", " ", " "),
    {"messages": [turn("assistant", "I begin."), turn("user", "Go on."), turn("assistant", "Done.")], "images": []},
    {"messages": [turn("user", None, "Read ", None), turn("assistant", "One.")], "images": ["page.png", "small.png"]},
    {
        "messages": [
            turn("system", "Brief."),
            turn("user", "Look ", None, " here", None),
            turn("assistant", "First ", None, " then."),
            turn("user", "And ", None),
            turn("assistant", None, "last"),
        ],
        "images": ["page.png", "small.png", "wide.png", "strip.png", "small.png"],
    },
]


@pytest.mark.parametrize("end_inside", [True, False])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("row", ROWS)
def test_tokens_are_those_that_transformers_marks(processors, pictures, row, model_type, end_inside):
    processor = with_marked_template(processors[model_type], end_inside=end_inside)
    preparation = preparation_of(processor, pictures)
    sample = preparation.sample(row)
    ids, mask = by_transformers(processor, row, pictures)
    assert sample.rule == LossRule.GIVEN
    assert sample.input_ids.tolist() == list(ids)
    ends = ending_token_ids(preparation.family)
    with_ends = [kept or (before and token in ends) for kept, before, token in zip(mask, [0, *mask], ids)]
    assert sample.given_mask.tolist() == list(map(bool, with_ends))
    assert (with_ends == list(mask)) == end_inside
    assert any(mask)


def test_a_shared_processor_s_tokens_are_those_that_transformers_marks(shared_processor, pictures):
    processor = with_marked_template(shared_processor)
    preparation = preparation_of(processor, pictures)
    assert preparation.encoder.sources == [LossSource.MESSAGES]
    for row in (*ROWS[:4], ROWS[5]):
        sample = preparation.sample(row)
        ids, mask = by_transformers(processor, row, pictures)
        assert sample.input_ids.tolist() == list(ids)
        assert sample.given_mask.astype(int).tolist() == list(mask)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("tiling", [None, LABELLED])
def test_images_that_grow_into_tiles_move_what_is_marked(processors, pictures, model_type, tiling):
    processor = with_marked_template(processors[model_type])
    preparation = preparation_of(processor, pictures, tiling=tiling)
    row = chat("<image>What?", "The first.", "<image> <image>?", "Both.", images=["page.png", "wide.png", "small.png"])
    end = processor.tokenizer.eos_token
    assert decoded(preparation, preparation.sample(row)) == f"The first.{end}Both.{end}"


def test_rows_of_one_call_may_be_marked_or_not(processors, pictures):
    """A chat whose template marks and a pre-training row are tokenised apart, and come back in their order."""
    chats = {"files": ("x",), "kind": "chat", "image_root": str(pictures)}
    processor = with_marked_template(processors["qwen2_vl"])
    both = Preparation(processor, chats, chats | {"kind": "pretrain"}, packing=ROOMY)
    assert both.encoder.sources == [LossSource.MESSAGES, LossSource.EVERY_TOKEN]
    rows = [
        RawRow("x:1", 1, {"text": "Some text"}),
        RawRow("x:2", 0, chat("Hi", "Yes")),
        RawRow("x:3", 1, {"text": "B"}),
    ]
    first, second, third = both.encoder.encode(rows, verify=range(3))
    assert decoded(both, second) == "Yes<|im_end|>"
    assert (len(first.given_mask), len(third.given_mask)) == (0, 0)
    assert both.family.tokenizer.decode(first.input_ids).startswith("Some text")


# ---- Stop tokens, and when the template is asked ----


class StopsWithHeader(Qwen2VL):
    stop_tokens = ("<|im_start|>", "<|not in the vocabulary|>")


class NoMarkers(Qwen2VL):
    role_markers = ()


@pytest.mark.parametrize(
    ("family", "end_inside", "expected"),
    [
        (NoMarkers, False, "One<|im_end|>Two<|im_end|>"),
        (NoMarkers, True, "One<|im_end|>Two<|im_end|>"),
        (Qwen2VL, False, "One<|im_end|>Two<|im_end|>"),
        (Qwen2VL, True, "One<|im_end|>Two<|im_end|>"),
        (StopsWithHeader, True, "One<|im_end|>Two<|im_end|>"),
    ],
)
def test_a_stop_token_after_what_is_marked_trains_too(processors, pictures, family, end_inside, expected):
    processor = with_marked_template(processors["qwen2_vl"], end_inside=end_inside)
    preparation = preparation_of(family(processor), pictures)
    assert decoded(preparation, preparation.sample(chat("A", "One", "B", "Two"))) == expected


@pytest.mark.parametrize("loss", ["all", RoleLoss()])
def test_other_modes_do_not_ask_the_template(processors, pictures, loss):
    preparation = preparation_of(with_marked_template(processors["qwen2_vl"]), pictures, loss=loss)
    sample = preparation.sample(chat("A", "One"))
    assert sample.rule == (LossRule.ALL if loss == "all" else LossRule.ROLES)
    assert not len(sample.given_mask)


def test_a_chat_with_no_marked_turn_trains_nothing(processors, pictures):
    preparation = preparation_of(with_marked_template(processors["qwen2_vl"]), pictures)
    sample = preparation.sample(chat("Hello?"))
    assert sample.given_mask.tolist() == [False] * len(sample.input_ids)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% generation %}x{% endgeneration %}", True),
        ("{%- generation -%}x{%- endgeneration -%}", True),
        ("{%+generation+%}x{% endgeneration %}", True),
        ("{# {% generation %} #}x", False),
        ("{% if generation %}x{% endif %}", False),
        ("{{ generation }} {% set generation = 1 %}", False),
        ("{% raw %}{% generation %}{% endraw %}", False),
        ("{% generation %}{{ ) }}", False),
        ({"default": "{% generation %}x{% endgeneration %}", "tool_use": "x"}, True),
        ({"default": "x", "tool_use": "{% generation %}x{% endgeneration %}"}, False),
        (None, False),
    ],
)
def test_templates_that_mark(processors, template, expected):
    processor = copy.copy(processors["qwen2_vl"])
    processor.chat_template = template
    assert marks_generated(processor) is expected


def test_a_template_that_fails_rejects_the_row(processors, pictures):
    processor = with_marked_template(processors["qwen2_vl"])
    processor.chat_template += "{{ raise_exception('no such turn') }}"
    rejected = preparation_of(processor, pictures).rejected(chat("A", "B"))
    assert (rejected.reason, "no such turn" in rejected.message) == ("template", True)
