"""What people's files make of chats: objects of nulls, JSON inside JSON, flags of parts beside their message's."""

import json

import pytest

from mmray.families import family_of
from mmray.loss.settings import RoleLoss
from mmray.rows.sample import RejectedRow
from tests.mmray.chats.oracle import SHARED, family_with, preparation_of, trained_text
from tests.mmray.preparing import PICTURES, chat, png

USER = {"role": "user", "content": "Who?"}
END = "<|im_end|>"


@pytest.fixture
def qwen(processors):
    """A function: what trains of a row by a loss, with a small Qwen2-VL."""
    family = family_of(processors["qwen2_vl"])
    return lambda row, loss="sampled", **dataset: trained_text(preparation_of(family, loss, **dataset), row)


def answer(content="Anna.", **fields):
    return {"messages": [USER, {"role": "assistant", "content": content, **fields}]}


@pytest.mark.parametrize(
    "fields",
    [
        {"function_call": {"name": None, "arguments": None}},
        {"tool_calls": [{"id": None, "function": {"name": None, "arguments": None}}]},
        {"sentiment": {"label": None, "scores": {"good": None}}},
        {"content": [{"type": "text", "text": "Anna.", "image_url": {"url": None, "detail": None}}]},
    ],
)
def test_objects_of_nulls_are_absent(qwen, fields):
    assert qwen(answer(**fields)) == f"Anna.{END}"


def test_an_empty_object_is_none_of_nulls(qwen):
    assert qwen(answer(sentiment={})).reason == "unknown_field"


def test_pictures_of_nulls_are_those_of_the_column(processors):
    from PIL import Image

    pictures = [png(Image.new("RGB", PICTURES["page.png"], colour)) for colour in ("red", "blue")]
    parts = [
        {"type": "image", "image": {"bytes": None, "path": None}},
        {"type": "image_url", "image_url": {"url": None}},
    ]
    row = {"messages": [{"role": "user", "content": parts}, answer()["messages"][1]], "images": pictures}
    sample = preparation_of(family_of(processors["qwen2_vl"]), "sampled").sample(row)
    assert [image.data for image in sample.images] == [picture["bytes"] for picture in pictures]


HALF = json.dumps("\ud83d")[1:-1]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": f'[{{"role": "user", "content": "{HALF}"}}]'},
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [{"name": "look", "arguments": f'{{"page": "{HALF}"}}'}]},
            ]
        },
        {"messages": [USER, {"role": "assistant", "tool_calls": f'[{{"name": "{HALF}"}}]'}]},
        {
            "conversations": [
                {"from": "function_call", "value": f'{{"name": "look", "arguments": {{"page": "{HALF}"}}}}'}
            ]
        },
        chat("Who?", "Anna.", tools=f'[{{"name": "{HALF}"}}]'),
        chat("Who?", "Anna.", chat_template_kwargs=f'{{"add_vision_id": "{HALF}"}}'),
    ],
)
def test_half_a_character_in_json_inside_json_spoils_one_row_alone(processors, row):
    rejected, good = preparation_of(family_of(processors["qwen2_vl"]), "sampled").encode(row, answer(), verify=False)
    assert (rejected.reason, isinstance(good, RejectedRow)) == ("not_utf8", False)
    assert "\\ud83d" in rejected.message


@pytest.mark.parametrize("loss", ["sampled", RoleLoss(), RoleLoss(train_on_eos="last")])
def test_a_part_may_train_where_its_message_does_not(qwen, loss):
    parts = [{"type": "text", "text": "Open.", "train": True}, {"type": "text", "text": "Secret."}]
    row = {"messages": [*answer(parts, train=False)["messages"], *answer()["messages"]]}
    assert qwen(row, loss).replace(END, "") == "Open.Anna."


def test_a_part_may_train_where_only_the_last_turn_does(qwen):
    parts = [{"type": "text", "text": "Open.", "weight": 1}, {"type": "text", "text": "Secret."}]
    row = {"messages": [*answer(parts)["messages"], *answer()["messages"]]}
    assert qwen(row, RoleLoss(turns="last")) == f"Open.Anna.{END}"


@pytest.mark.skipif(not (SHARED / "templates").exists(), reason="the shared data is not here")
def test_a_picture_outside_of_generation_blocks_is_no_difference(zoo_processor):
    from PIL import Image

    family = family_with(zoo_processor("llava"), "llava", "ax_llava")
    parts = [{"type": "text", "text": "Anna."}, {"type": "image"}]
    found = trained_text(
        preparation_of(family, "sampled"), answer(parts) | {"images": [png(Image.new("RGB", (60, 40)))]}
    )
    assert "Anna." in found
    assert "<image>" not in found
