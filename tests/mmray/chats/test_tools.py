"""Tools told by words: the turns of the role `tool`, calls with text behind them, Gemma 4's format in another model."""

import copy

import pytest

from mmray.errors import UserError
from mmray.families.generic import Generic
from mmray.loss.settings import RoleLoss
from mmray.rows.sample import RejectedRow
from tests.mmray.chats.oracle import (
    LOSSES,
    PUBLISHED,
    SHARED,
    conversations,
    expected_words,
    family_with,
    is_rightly_refused,
    own_templates,
    preparation_of,
    trained_text,
)

pytestmark = pytest.mark.skipif(not (SHARED / "templates").exists(), reason="the shared data is not here")

CALL = {"type": "function", "function": {"name": "LOOKUP", "arguments": {"page": "ARGUMENT"}}}
RESULT = {"role": "tool", "content": "RESULT", "name": "LOOKUP"}
ASKED = {"role": "user", "content": "QUESTION"}
WORDS = ("LOOKUP", "ARGUMENT", "RESULT", "QUESTION", "MIDDLE", "ANSWER")

PLAIN = [ASKED, {"role": "assistant", "content": "MIDDLE"}, RESULT, {"role": "assistant", "content": "ANSWER"}]
CALLED = [ASKED, {"role": "assistant", "tool_calls": [CALL]}, RESULT, {"role": "assistant", "content": "ANSWER"}]
WRITES_TOOLS = {
    "ax_qwen2_vl", "trl_qwen2_5_vl", "trl_qwen3_vl", "trl_qwen3_5_think", "trl_glm4moe", "trl_idefics3",
    "ax_llama3_2_vision", "internvl", "llava_onevision", "granite_docling", "smolvlm", "idefics3", "qwen2_vl",
}  # fmt: skip


def words_of(text: str) -> set[str]:
    return {word for word in WORDS if word in text}


@pytest.mark.parametrize("name", [*PUBLISHED, *own_templates()])
def test_the_turns_of_tools_train_alone(zoo_processor, name):
    member = PUBLISHED.get(name, name)
    family = family_with(zoo_processor(member), member, name if name in PUBLISHED else None)
    try:
        preparation = preparation_of(family, RoleLoss(roles=("tool",)))
    except UserError:  # its templates write tools into another role's turn, or not at all
        assert name not in WRITES_TOOLS
        return
    outcomes = [trained_text(preparation, {"messages": messages}) for messages in (PLAIN, CALLED)]
    for messages, outcome in zip((PLAIN, CALLED), outcomes):
        if isinstance(outcome, RejectedRow):
            assert is_rightly_refused(family, {"messages": messages})
        else:
            assert words_of(outcome) == {"RESULT"}
    assert name not in WRITES_TOOLS or not isinstance(outcomes[0], RejectedRow)


@pytest.mark.parametrize("is_token", [False, True])
@pytest.mark.parametrize("loss", ["sampled", RoleLoss()])
def test_a_call_of_gemma_4_trains_to_its_end_whatever_follows(zoo_processor, is_token, loss):
    processor = zoo_processor("gemma4")
    if is_token:
        processor = copy.deepcopy(processor)
        processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool_response>"]})
    preparation = preparation_of(family_with(processor, "gemma4", "ax_gemma4"), loss)
    called = '<|tool_call>call:LOOKUP{page:<|"|>ARGUMENT<|"|>}<tool_call|>'
    spoken = {"role": "assistant", "content": "MIDDLE", "tool_calls": [CALL]}
    answer = {"role": "assistant", "content": "ANSWER"}
    expected = [
        ([spoken], f"{called}MIDDLE<|tool_response>"),
        ([spoken, RESULT], f"{called}<|tool_response>MIDDLE<turn|>"),
        ([spoken, RESULT, answer], f"{called}<|tool_response>MIDDLE<turn|>ANSWER<turn|>"),
        ([CALLED[1], RESULT], f"{called}<|tool_response>"),
        ([CALLED[1], RESULT, answer], f"{called}<|tool_response>ANSWER<turn|>"),
        ([spoken, ASKED, answer], f"{called}MIDDLE<|tool_response>ANSWER<turn|>"),
    ]
    for messages, text in expected:
        assert trained_text(preparation, {"messages": [ASKED, *messages]}) == text


@pytest.mark.parametrize("mode", list(LOSSES))
def test_another_model_with_gemma_4_s_format(zoo_processor, mode):
    """As gemma4_unified, whose processor no family of mmray serves."""
    processor = copy.copy(zoo_processor("gemma4"))
    processor.chat_template = (SHARED / "templates/ax_gemma4.jinja").read_text(encoding="utf-8")
    family = Generic(processor)
    preparation, right = preparation_of(family, LOSSES[mode]), set()
    for row in conversations():
        outcome = trained_text(preparation, row)
        if row["trained_words"] is None or isinstance(outcome, RejectedRow):
            assert row["trained_words"] is None or is_rightly_refused(family, row), (row["id"], outcome)
            continue
        trained, untrained = expected_words(row, mode)
        assert {word for word in trained if word not in outcome} == set(), row["id"]
        assert {word for word in untrained if word in outcome} == set(), row["id"]
        right.add(row["id"])
    assert right >= {"plain", "parts"}


TOOLS = [{"type": "function", "function": {"name": "TOOLNAME", "description": "TOOLTEXT", "parameters": {}}}]


@pytest.mark.parametrize("eos", ["turn", "all", "last", "none"])
@pytest.mark.parametrize("name", list(PUBLISHED))
def test_tools_never_train_where_the_system_message_does(zoo_processor, name, eos):
    """Gemma 4 and Qwen write the row's tools between the system message and the end of its turn."""
    preparation = preparation_of(
        family_with(zoo_processor(PUBLISHED[name]), PUBLISHED[name], name), RoleLoss(train_on_eos=eos)
    )
    messages = [{"role": "system", "content": "SYSTEM"}, ASKED, {"role": "assistant", "content": "ANSWER"}]
    outcome = trained_text(preparation, {"messages": messages, "tools": TOOLS})
    if isinstance(outcome, RejectedRow):
        assert outcome.reason in ("not_written", "template")
        assert name not in ("ax_gemma4", "trl_qwen3_vl", "trl_qwen3_5_think", "trl_glm4moe")
    else:
        assert "ANSWER" in outcome
        assert not {word for word in ("SYSTEM", "QUESTION", "TOOLNAME", "TOOLTEXT") if word in outcome}


def test_only_thoughts_of_the_assistant_may_be_dropped(zoo_processor):
    """A tool's result is none, whatever it begins with; the template leaves out a result without a call."""
    family = family_with(zoo_processor("gemma4"), "gemma4", "ax_gemma4")
    preparation = preparation_of(family, "sampled", allow_dropped=["reasoning"])
    answer = {"role": "assistant", "content": "ANSWER"}
    for content in ("<think>RESULT", "<think>\nRESULT\n</think>"):
        messages = [ASKED, answer, {"role": "tool", "content": content}, answer]
        refused = preparation.rejected({"messages": messages})
        assert refused.reason == "not_written"
        assert "message 2 (tool): the chat template leaves out its content, " in refused.message
