"""Random conversations under every published template: right by their words, or refused.

Roles in any order, calls, thoughts, texts that share words with others, are blank, begin and end with white space, or
hold what templates write themselves. Every text has one word of its own.
"""

import functools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmray.loss.settings import RoleLoss
from mmray.rows.sample import RejectedRow
from tests.mmray.chats.oracle import PUBLISHED, SHARED, family_with, preparation_of, trained_text

pytestmark = pytest.mark.skipif(not (SHARED / "templates").exists(), reason="the shared data is not here")

SHARED_TEXTS = (
    "", " ", "\n", "same words", "the same words again", "\n\nleading", "trailing\n ", "A: {\"b\": 'c'}", "né 字 😀",
    "<think>", "</think>", "<think>\nmaybe\n</think>\n\n", "<tool_response>", "/nothink", "user", "assistant", "text",
    "<|im_end|>", "<|im_start|>assistant\n", "[INST]", "[/INST]", "</s>", "ASSISTANT:", "USER: ", "Assistant:",
    "<end_of_turn>", "<|user|>", "<turn|>", "<|channel>thought\n", "<channel|>", "<end_of_utterance>", "{{ x }}",
)  # fmt: skip
WORDS = [f"{first}{second}WORD" for first in "BCDFGHKLMNP" for second in "AEIOU"]
pieces = st.sampled_from(SHARED_TEXTS)


@st.composite
def texts(draw, word):
    return (
        draw(pieces) + draw(st.sampled_from(["", " ", "\n"])) + word + draw(st.sampled_from(["", " "])) + draw(pieces)
    )


@st.composite
def chats(draw):
    """A row, the words that train and those that do not."""
    words = iter(WORDS)
    row, trained, untrained = {"messages": []}, [], []
    roles = draw(
        st.lists(st.sampled_from(["user", "assistant", "assistant", "tool", "system"]), min_size=1, max_size=6)
    )
    for role in draw(st.sampled_from([roles, ["user", *roles], ["system", "user", "assistant", "user", "assistant"]])):
        message = {"role": role, "content": draw(pieces)}
        own = []
        if draw(st.integers(0, 5)):
            own.append(next(words))
            message["content"] = draw(texts(own[-1]))
        if role == "assistant" and not draw(st.integers(0, 3)):
            own.append(next(words))
            message["reasoning_content"] = draw(texts(own[-1]))
        if role == "assistant" and not draw(st.integers(0, 3)):
            name, value = next(words), next(words)
            own += [name, value]
            arguments = {"page": draw(texts(value)), "count": draw(st.integers(0, 9)), "deep": {"yes": True}}
            message["tool_calls"] = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
        if draw(st.booleans()) and isinstance(message["content"], str):
            half = len(message["content"]) // 2
            halves = (message["content"][:half], message["content"][half:])
            message["content"] = [{"type": "text", "text": text} for text in halves]
            own = [word for word in own if word in halves[0] or word in halves[1] or word not in "".join(halves)]
        trains = role == "assistant"
        if trains and not draw(st.integers(0, 4)):
            trains = message["train"] = draw(st.booleans())
        (trained if trains else untrained).extend(own)
        row["messages"].append(message)
    return row, trained, untrained


@pytest.fixture(scope="session")
def family_of_template(zoo_processor):
    return functools.cache(lambda name: family_with(zoo_processor(PUBLISHED[name]), PUBLISHED[name], name))


@functools.cache
def preparation(family, eos):
    return preparation_of(family, "sampled" if eos is None else RoleLoss(train_on_eos=eos))


@settings(max_examples=150)
@given(chat=chats(), template=st.sampled_from(list(PUBLISHED)), eos=st.sampled_from([None, "turn", "all", "last"]))
@example(
    chat=(
        {
            "messages": [
                {"role": "user", "content": "same words BAWORD"},
                {"role": "assistant", "content": "same words"},
            ]
        },
        [],
        ["BAWORD"],
    ),
    template="ax_llava",
    eos=None,
)
def test_random_chats(family_of_template, chat, template, eos):
    row, trained, untrained = chat
    found = trained_text(preparation(family_of_template(template), eos), row)
    if isinstance(found, RejectedRow):
        assert found.reason in ("template", "not_written", "special_token_in_text", "nothing_trained"), found
        return
    joined = found.replace("\n", "")
    assert [word for word in trained if word not in joined] == []
    assert [word for word in untrained if word in joined] == []
