"""Conversations of many turns: right by their words, and found with few renderings of their beginnings."""

import pytest

from mmray.rows.templates import ChatTemplate
from tests.mmray.chats.oracle import PUBLISHED, SHARED, family_with, preparation_of, trained_text

pytestmark = pytest.mark.skipif(not (SHARED / "templates").exists(), reason="the shared data is not here")

TURNS = 40
WRITES_CALLS = ("trl_qwen3_vl", "trl_qwen3_5_think", "trl_glm4moe", "ax_gemma4", "ax_llama3_2_vision")


def turn(number, calls):
    asked = {"role": "user", "content": f"QUESTION{number:02d}."}
    answer = {"role": "assistant", "content": f"ANSWER{number:02d}."}
    if not calls:
        return [asked, answer]
    call_id = f"call_{number:09d}"
    call = {
        "id": call_id,
        "type": "function",
        "function": {"name": "look", "arguments": {"page": f"PAGE{number:02d}."}},
    }
    result = {"role": "tool", "tool_call_id": call_id, "content": f"RESULT{number:02d}."}
    return [asked, {"role": "assistant", "tool_calls": [call]}, result, answer]


@pytest.mark.parametrize(("name", "calls"), [*((n, False) for n in PUBLISHED), *((n, True) for n in WRITES_CALLS)])
def test_many_turns(zoo_processor, monkeypatch, name, calls):
    """The time for a conversation grows with its length, not with the square of it."""
    rendered = []
    beginning = ChatTemplate.beginning

    def counted(self, chat, masked, count, key):
        rendered.append(count)
        return beginning(self, chat, masked, count, key)

    monkeypatch.setattr(ChatTemplate, "beginning", counted)
    preparation = preparation_of(family_with(zoo_processor(PUBLISHED[name]), PUBLISHED[name], name), "sampled")
    messages = [message for number in range(TURNS) for message in turn(number, calls)]
    found = trained_text(preparation, {"messages": messages})
    numbers = [f"{number:02d}." for number in range(TURNS)]
    expected = [word + number for number in numbers for word in (("PAGE", "ANSWER") if calls else ("ANSWER",))]
    assert [word for word in expected if word not in found] == []
    assert [word for number in numbers for word in ("QUESTION", "RESULT") if word + number in found] == []
    assert len(rendered) < 20
