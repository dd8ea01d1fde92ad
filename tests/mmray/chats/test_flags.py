"""What is taken out of a chat's loss, and put into it: flags of messages and parts, turns, thoughts, ends."""

import pytest

from mmray.errors import UserError
from mmray.families import family_of
from mmray.loss.rules import LossRule
from mmray.loss.settings import RoleLoss
from mmray.rows.sample import RejectedRow
from tests.mmray.chats.oracle import SHARED, family_with, preparation_of, trained_text
from tests.mmray.preparing import Preparation, chat

END = "<|im_end|>"


@pytest.fixture
def qwen(processors):
    """A function: what trains of a row by a loss, with a small Qwen2-VL."""
    family = family_of(processors["qwen2_vl"])
    return lambda row, loss="sampled", **dataset: trained_text(preparation_of(family, loss, **dataset), row)


@pytest.fixture
def published(zoo_processor):
    """A function: what trains of a row by a published template."""
    if not (SHARED / "templates").exists():
        pytest.skip("the shared data is not here")

    def train(template, member, row, loss="sampled", **dataset):
        return trained_text(preparation_of(family_with(zoo_processor(member), member, template), loss, **dataset), row)

    return train


def say(role, content, **fields):
    return {"role": role, "content": content, **fields}


def row(*messages, **fields):
    return {"messages": list(messages), **fields}


USER = say("user", "Who?")


@pytest.mark.parametrize("loss", ["sampled", RoleLoss()])
@pytest.mark.parametrize(
    "flag", [("train", False), ("weight", 0), ("weight", 0.0), ("loss", False), ("training", False)]
)
def test_a_message_that_says_so_does_not_train(qwen, flag, loss):
    found = qwen(row(USER, say("assistant", "Bad", **dict([flag])), USER, say("assistant", "Good")), loss)
    assert found == f"Good{END}"


def test_a_flag_that_is_true_trains_also_where_only_the_last_turn_does(qwen):
    first, middle, last = say("assistant", "One", train=True), say("assistant", "Two"), say("assistant", "Three")
    assert qwen(row(USER, first, USER, middle, USER, last), RoleLoss(turns="last")) == f"One{END}Three{END}"
    assert qwen(row(USER, first, USER, middle, USER, last), RoleLoss(roles=("user",))) == f"Who?{END}One{END}" + (
        f"Who?{END}" * 2
    )


@pytest.mark.parametrize("value", [0.5, 2, -1, "no", None])
def test_other_weights_are_refused(qwen, value):
    found = qwen(row(USER, say("assistant", "A", weight=value)))
    if value is None:  # an absent key
        assert found == f"A{END}"
    else:
        assert isinstance(found, RejectedRow)
        assert (found.reason, f"weight {value!r}" in found.message) == ("unsupported_flag", True)


def test_flags_that_disagree_are_refused(qwen):
    assert qwen(row(USER, say("assistant", "A", train=True, weight=0))).reason == "unsupported_flag"


def test_a_message_of_another_role_may_only_be_left_out(qwen):
    assert qwen(row(say("user", "Who?", train=True), say("assistant", "A"))).reason == "unsupported_flag"
    assert qwen(row(say("user", "Who?", train=False), say("assistant", "A"))) == f"A{END}"
    users = RoleLoss(roles=("user",))
    assert qwen(row(say("user", "Who?", train=False), say("user", "What?")), users) == f"What?{END}"


@pytest.mark.parametrize("loss", ["sampled", RoleLoss()])
def test_a_part_that_says_so_does_not_train(qwen, loss):
    parts = [{"type": "text", "text": "Secret. ", "train": False}, {"type": "text", "text": "Open."}]
    assert qwen(row(USER, say("assistant", parts)), loss) == f"Open.{END}"


def test_a_set_may_have_a_loss_of_its_own(processors):
    family = family_of(processors["qwen2_vl"])
    one = {"files": "rows.jsonl", "kind": "chat"}
    for own, expected in (("all", None), (RoleLoss(roles=("user",)), f"Who?{END}"), (None, f"A{END}")):
        preparation = Preparation(family, one | {"loss": own}, loss="sampled")
        found = trained_text(preparation, row(USER, say("assistant", "A")))
        assert found.endswith(f"A{END}\n") if expected is None else found == expected
    preparation = Preparation(family, one | {"loss": "sampled"}, loss=RoleLoss(roles=("user",)))
    assert trained_text(preparation, row(USER, say("assistant", "A"))) == f"A{END}"


def test_own_boundaries_that_train_another_role_are_refused_with_the_piece(qwen):
    boundary = {"role": "assistant", "start": "<|im_start|>", "until_next": True}
    found = qwen(row(USER, say("assistant", "A")), RoleLoss.model_validate({"boundaries": [boundary]}))
    assert (found.reason, "message 0 (user)" in found.message, "'Who?'" in found.message) == (
        "turns_differ",
        True,
        True,
    )
    boundary = {"role": "assistant", "start": "<|im_start|>assistant\nGo", "end": END}
    found = qwen(row(USER, say("assistant", "Go on")), RoleLoss.model_validate({"boundaries": [boundary]}))
    assert (found.reason, "leaves out" in found.message) == ("turns_differ", True)


def test_flags_under_own_boundaries(qwen):
    boundary = {"role": "assistant", "start": "<|im_start|>assistant\n", "end": END, "include_end": False}
    loss = RoleLoss.model_validate({"boundaries": [boundary]})
    assert qwen(row(USER, say("assistant", "Bad", train=False), USER, say("assistant", "Good")), loss) == "Good"


def test_rows_that_a_scan_finds_are_left_to_it(processors):
    preparation = preparation_of(family_of(processors["qwen2_vl"]), RoleLoss())
    assert preparation.sample(chat("Who?", "A", "What?", "B")).rule == LossRule.ROLES
    assert (
        preparation.sample(row(USER, say("assistant", "A", train=False), say("assistant", "B"))).rule == LossRule.GIVEN
    )


# ---- Thoughts ----

THINKS = row(
    USER, say("assistant", "One", reasoning_content="HMM"), USER, say("assistant", "Two", reasoning_content="AHA")
)


def test_thoughts_that_the_template_drops_are_let_pass_where_the_set_says_so(published):
    arguments = ("trl_qwen3_5_think", "qwen3_5", THINKS)
    assert published(*arguments).reason == "not_written"
    assert published(*arguments, allow_dropped=["reasoning"]) == f"One{END}AHA\n</think>\n\nTwo{END}"


@pytest.mark.parametrize(
    ("reasoning", "expected"), [("all", f"<think>\nAHA\n</think>\n\nTwo{END}"), ("none", f"Two{END}")]
)
def test_thoughts_train_or_not(published, reasoning, expected):
    thinks = row(USER, THINKS["messages"][3])
    found = published("trl_qwen3_5_think", "qwen3_5", thinks, RoleLoss(reasoning=reasoning))
    assert found == expected


def test_empty_thoughts_train_or_not(published):
    plain = chat("Who?", "One", "And?", "Two")
    loss = RoleLoss(train_empty_thoughts=False)
    assert published("trl_qwen3_5_think", "qwen3_5", plain, loss) == f"One{END}Two{END}"
    assert published("trl_glm4moe", "glm4v_moe", plain, loss) == "One<|user|>Two<|user|>"
    assert published("trl_glm4moe", "glm4v_moe", plain) == (
        "\n<think></think>\nOne<|user|>\n<think></think>\nTwo<|user|>"
    )


def test_thoughts_written_into_an_answer_are_thoughts(published):
    typed = row(USER, say("assistant", "<think>\nHMM\n</think>\n\nOne"))
    found = published("trl_qwen3_5_think", "qwen3_5", typed)
    assert found == f"HMM\n</think>\n\nOne{END}"
    assert published("trl_qwen3_5_think", "qwen3_5", typed, RoleLoss(reasoning="none")) == f"One{END}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("HMM</think>One", "One"),
        ("<think>HMM</think>One<think>AHA</think>Two", "OneTwo"),
        ("One <think>HMM</think>Two", "One Two"),
        ([{"type": "text", "text": "HMM"}, {"type": "text", "text": "</think>One"}], "One"),
        ("<think>HMM <tool_call> AHA</think>One", "One"),
        ("One </think> Two </think> Three", " Two </think> Three"),
    ],
)
def test_thoughts_are_told_from_answers_by_their_marks(published, content, expected):
    """A model whose prompt ends with `<think>` answers without it. Text between two thoughts is none."""
    typed = row(USER, say("assistant", content))
    assert published("trl_qwen3_vl", "qwen3_vl", typed, RoleLoss(reasoning="none")) == f"{expected}{END}"


def test_a_thought_without_its_first_mark_may_be_dropped(published):
    typed = row(USER, say("assistant", "HMM</think>One"), USER, say("assistant", "Two"))
    arguments = ("trl_qwen3_5_think", "qwen3_5", typed)
    assert "its thought, 'HMM'" in published(*arguments).message
    assert published(*arguments, allow_dropped=["reasoning"]) == f"One{END}\n</think>\n\nTwo{END}"


@pytest.mark.parametrize(("flag", "expected"), [(False, f"One{END}"), (True, "<think>HMM</think>")])
def test_the_marks_of_a_thought_go_with_its_part(published, flag, expected):
    parts = [{"type": "text", "text": "<think>HMM</think>", "train": flag}, {"type": "text", "text": "One"}]
    typed = row(USER, say("assistant", parts, **({"train": False} if flag else {})))
    assert published("trl_qwen3_vl", "qwen3_vl", typed) == expected


def test_a_part_s_flag_counts_for_a_thought_beside_the_message_s(published):
    parts = [{"type": "text", "text": "<think>HMM</think>", "train": False}, {"type": "text", "text": "One"}]
    typed = row(USER, say("assistant", parts, reasoning_content="AHA"))
    assert published("trl_qwen3_5_think", "qwen3_5", typed) == f"AHA\n</think>\n\nOne{END}"


# ---- Ends ----


def test_last_ends_are_of_turns_with_text(published):
    found = published(
        "ax_mistral_v7_tekken", "mistral3", chat("Who?", "One", "And?", ""), RoleLoss(train_on_eos="last")
    )
    assert found == "One</s>"


def test_variables_that_the_template_does_not_read_are_refused(qwen, processors):
    found = qwen(row(USER, say("assistant", "A"), chat_template_kwargs={"enable_thinking": True}))
    assert (found.reason, "reads no 'enable_thinking'" in found.message) == ("unknown_field", True)
    with pytest.raises(UserError, match="reads no 'enable_thinking'"):
        qwen(row(USER), chat_template_kwargs={"enable_thinking": True})


def test_blocks_that_say_something_else_refuse_the_set(processors):
    from tests.mmray.preparing import with_marked_template

    processor = with_marked_template(processors["qwen2_vl"])
    processor.chat_template = processor.chat_template.replace("'assistant'", "'user'")
    with pytest.raises(UserError, match=r"The blocks mark \['Who\?.*the model would write \['A"):
        preparation_of(family_of(processor), "sampled").encode(row(USER, say("assistant", "A")))
