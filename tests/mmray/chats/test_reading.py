"""What people's files make of chats: objects of nulls, JSON inside JSON, flags of parts beside their message's."""

import json

import pytest

from mmray.errors import UserError
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


# ---- Where images cannot stand ----


def called(arguments):
    return answer(None, tool_calls=[{"function": {"name": "look", "arguments": arguments}}])


@pytest.mark.parametrize(
    ("row", "where"),
    [
        (answer(reasoning_content="Look at <image> again"), "message 1: its thought"),
        (called({"page": {"names": ["<image>"]}}), "message 1: an argument of a tool call"),
        (called('{"<image>": 1}'), "message 1: an argument of a tool call"),
        (answer() | {"chat_template_kwargs": {"add_vision_id": "<image>"}}, "chat_template_kwargs"),
        ({"messages": [USER | {"name": "<image>"}, answer()["messages"][1]]}, "message 0"),
    ],
)
def test_a_placeholder_where_no_image_can_stand_is_refused(qwen, row, where):
    found = qwen(row)
    assert found.reason == "special_token_in_text"
    assert found.message.startswith(f"{where} holds the image placeholder '<image>'")
    assert "give the set another one (placeholder: '<|page|>')" in found.message
    other = qwen(row, placeholder="<|page|>")
    assert not isinstance(other, RejectedRow) or other.reason in ("not_written", "unknown_field")


def test_a_placeholder_in_the_system_column_is_an_image(processors):
    from PIL import Image

    picture = png(Image.new("RGB", PICTURES["page.png"], "red"))
    preparation = preparation_of(family_of(processors["qwen2_vl"]), "sampled")
    assert preparation.rejected(answer() | {"system": "As in <image>."}).reason == "placeholder_count"
    sample = preparation.sample(answer() | {"system": "As in <image>.", "images": [picture]})
    assert [image.data for image in sample.images] == [picture["bytes"]]


PICTURE_TEXTS = ["Picture 1: <img>red.png</img> Who?", "<IMG> a b.JPEG </IMG>", "<img>s3://bucket/page</img>"]


@pytest.mark.parametrize("text", PICTURE_TEXTS)
@pytest.mark.parametrize("as_parts", [False, True])
def test_a_picture_named_in_a_text_is_not_read_as_text(qwen, text, as_parts):
    content = [{"type": "text", "text": text}] if as_parts else text
    found = qwen({"messages": [{"role": "user", "content": content}, answer()["messages"][1]]})
    assert (found.reason, "<img>" in found.message.lower()) == ("placeholder_count", True)


@pytest.mark.parametrize("text", ["<img>A stamp.</img> Anna.", PICTURE_TEXTS[0]])
def test_what_an_assistant_writes_of_pictures_is_text(qwen, text):
    """Some OCR models describe pictures between these tags."""
    assert qwen(answer(text)) == f"{text}{END}"


def test_a_question_about_the_tag_is_text(qwen):
    assert qwen(chat("What does <img> do, and <img>a caption</img>?", "Anna.")) == f"Anna.{END}"


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_other_media_are_not_left_out(qwen, kind):
    spoken = chat(f"<{kind}> Who?", "Anna.")
    found = qwen(spoken | {f"{kind}s": ["a.mp4"]})
    assert (found.reason, f"{kind}s" in found.message) == ("wrong_type", True)
    assert qwen(spoken | {f"{kind}s": []}) == f"Anna.{END}"
    assert qwen(chat("Who?", "Anna.") | {kind: "source of the frame"}) == f"Anna.{END}"


# ---- Numbers ----


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_lacks_are_refused(qwen, number):
    for row in (
        called({"count": [number]}),
        called(json.dumps({"count": number})),
        answer() | {"tools": [{"type": "function", "function": {"name": "look", "default": number}}]},
    ):
        found = qwen(row)
        assert (found.reason, repr(number) in found.message) == ("wrong_type", True)


def test_names_and_ids_may_be_numbers(zoo_processor, qwen):
    named = {"messages": [USER | {"name": 7}, answer(name=8)["messages"][1]]}
    assert qwen(named) == f"Anna.{END}"
    assert qwen({"messages": [USER | {"name": True}]}).reason == "wrong_type"
    if not (SHARED / "templates").exists():
        pytest.skip("the shared data is not here")
    call = {"id": 5, "function": {"name": "look", "arguments": {"page": "ARGUMENT"}}}
    result = {"role": "tool", "tool_call_id": 5, "content": "RESULT"}
    row = {"messages": [USER, answer(None, tool_calls=[call])["messages"][1], result, answer()["messages"][1]]}
    family = family_with(zoo_processor("gemma4"), "gemma4", "ax_gemma4")
    assert "ARGUMENT" in trained_text(preparation_of(family, "sampled"), row)


# ---- Tools and pictures ----


@pytest.mark.skipif(not (SHARED / "templates").exists(), reason="the shared data is not here")
@pytest.mark.parametrize(("template", "member"), [("trl_qwen3_vl", "qwen3_vl"), ("ax_gemma4", "gemma4")])
def test_functions_alone_are_tools(zoo_processor, template, member):
    """As in ShareGPT's column: the prompt is the one of OpenAI's form, which is written when the model is used."""
    parameters = {"type": "object", "properties": {"page": {"type": "string", "description": "Number."}}}
    function = {"name": "look", "description": "Looks.", "parameters": parameters}
    preparation = preparation_of(family_with(zoo_processor(member), member, template), "sampled")
    wrapped = preparation.sample(answer() | {"tools": [{"type": "function", "function": function}]})
    for tools in ([function], json.dumps([function]), [json.dumps(function)]):
        assert preparation.sample(answer() | {"tools": tools}).input_ids.tolist() == wrapped.input_ids.tolist()


def test_what_a_picture_says_besides_its_place_is_not_left_out(qwen):
    part = {"type": "image_url", "image_url": {"url": "red.png", "detail": "high", "box": [1, 2, 3, 4]}}
    found = qwen({"messages": [{"role": "user", "content": [part]}, answer()["messages"][1]]})
    assert (found.reason, "'box'" in found.message) == ("unknown_field", True)


# ---- Said twice, or in another column ----


@pytest.mark.parametrize("key", ["arguments", "page"])
def test_a_key_that_stands_twice_in_json_inside_json_is_refused(qwen, key):
    call = '{"name": "look", "arguments": {"page": "RED", "page": "BLUE"}}'
    if key == "arguments":
        call = '{"name": "look", "arguments": {}, "arguments": {"page": "BLUE"}}'
    found = qwen({"conversations": [{"from": "human", "value": "Who?"}, {"from": "function_call", "value": call}]})
    assert (found.reason, f"the key {key!r} stands twice" in found.message) == ("wrong_type", True)


@pytest.mark.skipif(not (SHARED / "templates").exists(), reason="the shared data is not here")
def test_functions_are_tools(zoo_processor):
    """As in OpenAI's older form, beside `function_call`."""
    function = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {"page": {}}}}
    preparation = preparation_of(family_with(zoo_processor("qwen3_vl"), "qwen3_vl", "trl_qwen3_vl"), "sampled")
    tools = preparation.sample(answer() | {"tools": [{"type": "function", "function": function}]})
    for row in ({"functions": [function]}, {"functions": json.dumps([function]), "tools": None}):
        assert preparation.sample(answer() | row).input_ids.tolist() == tools.input_ids.tolist()
    both = preparation.rejected(answer() | {"functions": [function], "tools": [function]})
    assert (both.reason, "both tools and functions" in both.message) == ("wrong_type", True)
    named = preparation_of(preparation.family, "sampled", columns={"tools": "functions"})
    assert named.sample(answer() | {"functions": [function]}).input_ids.tolist() == tools.input_ids.tolist()


@pytest.mark.parametrize("images", [None, [], ""])
def test_a_column_of_one_image_is_read_where_images_hold_none(processors, images):
    from PIL import Image

    picture = png(Image.new("RGB", PICTURES["page.png"], "red"))
    row = chat("<image>Who?", "Anna.", image=picture) | {"images": images}
    sample = preparation_of(family_of(processors["qwen2_vl"]), "sampled").sample(row)
    assert [image.data for image in sample.images] == [picture["bytes"]]


def test_two_columns_of_images_that_differ_are_refused(processors):
    from PIL import Image

    red, blue = (png(Image.new("RGB", PICTURES["page.png"], colour)) for colour in ("red", "blue"))
    preparation = preparation_of(family_of(processors["qwen2_vl"]), "sampled")
    row = chat("<image>Who?", "Anna.") | {"images": [red]}
    assert preparation.sample(row | {"image": red}).images == preparation.sample(row).images
    assert preparation.rejected(row | {"image": blue}).reason == "image_conflict"
    named = preparation_of(preparation.family, "sampled", columns={"images": "images"})
    assert named.sample(row | {"image": blue}).images == preparation.sample(row).images


def test_a_text_that_says_true_or_false_is_no_variable(qwen):
    for value in ("false", "True"):
        found = qwen(answer() | {"chat_template_kwargs": {"add_vision_id": value}})
        assert (found.reason, f"{value!r}" in found.message) == ("wrong_type", True)
        with pytest.raises(UserError, match="write it unquoted"):
            qwen(answer(), chat_template_kwargs={"add_vision_id": value})


# ---- What a template leaves out of tools ----

PARAMETERS = {"type": "object", "properties": {"PARAMETER": {"type": "string", "description": "A page."}}}


@pytest.mark.skipif(not (SHARED / "templates").exists(), reason="the shared data is not here")
def test_parameters_that_the_template_leaves_out_are_told(zoo_processor):
    """Gemma 4 writes `parameters`, and knows no `input_schema` (Anthropic's form), which other templates write."""
    preparations = {
        name: preparation_of(family_with(zoo_processor(member), member, name), "sampled")
        for name, member in (("ax_gemma4", "gemma4"), ("trl_qwen3_vl", "qwen3_vl"))
    }
    for key in ("parameters", "input_schema"):
        row = answer() | {"tools": [{"name": "LOOK", "description": "DESCRIBED", key: PARAMETERS}]}
        for name, preparation in preparations.items():
            (found,) = preparation.encode(row, verify=False)
            if (name, key) == ("ax_gemma4", "input_schema"):
                assert found.reason == "not_written"
                assert "leaves out 'PARAMETER' of the row's tools" in found.message
                continue
            text = preparation.family.tokenizer.decode(found.input_ids)
            assert {word for word in ("LOOK", "DESCRIBED", "PARAMETER") if word not in text} == set()


@pytest.mark.skipif(not (SHARED / "templates").exists(), reason="the shared data is not here")
def test_objects_of_nulls_in_tools_and_arguments_are_absent(zoo_processor):
    """As some writers of Parquet fill the parameters of other rows' tools."""
    preparation = preparation_of(family_with(zoo_processor("qwen3_vl"), "qwen3_vl", "trl_qwen3_vl"), "sampled")
    nothing = {"type": None, "items": {"type": None}}

    def row(arguments, properties):
        function = {"name": "look", "parameters": {"type": "object", "properties": properties}}
        return called(arguments) | {"tools": [{"type": "function", "function": function}]}

    clean = preparation.sample(row({"page": 3}, {"page": {"type": "integer"}}))
    filled = preparation.sample(
        row({"page": 3, "box": {"x": None, "y": None}}, {"page": {"type": "integer"}, "box": nothing})
    )
    assert filled.input_ids.tolist() == clean.input_ids.tolist()
