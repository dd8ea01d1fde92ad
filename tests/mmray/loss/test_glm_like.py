"""A family as GLM: what ends the assistant's turn opens the next one, and the template marks the content alone."""

import copy

import pytest

from mmray.families import RoleMarkers
from mmray.families.qwen2_vl import Qwen2VL
from mmray.loss.rules import IGNORE_INDEX, LossRule
from mmray.loss.settings import RoleLoss
from mmray.loss.sources import LossSource
from mmray.packing.settings import PackingSettings
from mmray.rows.preflight import sample_labels
from tests.mmray.preparing import Preparation, chat

ROOMY = PackingSettings(token_capacity=10_000, visual_capacity=10_000)
TURNS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + ('observation' if message['role'] == 'tool' else message['role']) + '|>\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] -}}
{%- endif -%}
{%- endfor -%}
"""


class GlmLike(Qwen2VL):
    stop_tokens = ("<|user|>", "<|observation|>")
    role_markers = (
        RoleMarkers("system", "<|system|>\n", until_next=True),
        RoleMarkers("user", "<|user|>\n", until_next=True),
        RoleMarkers("assistant", "<|assistant|>\n", until_next=True),
        RoleMarkers("tool", "<|observation|>\n", until_next=True),
    )


@pytest.fixture(scope="module")
def glm(processors):
    """A function: a family of this form; `marked`: its template marks what is generated."""
    processor = copy.deepcopy(processors["qwen2_vl"])
    processor.tokenizer.add_special_tokens({"additional_special_tokens": list(TURNS)})

    def make(marked):
        mine = copy.copy(processor)
        mine.chat_template = TEMPLATE
        if not marked:
            mine.chat_template = TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
        return GlmLike(mine)

    return make


def trained_text(family, row, loss="sampled", rule=None):
    preparation = Preparation(family, {"files": "rows.jsonl", "kind": "chat"}, packing=ROOMY, loss=loss)
    sample = preparation.sample(row)
    assert sample.rule == (preparation.encoder.sources[0].rule if rule is None else rule)
    (labels,) = sample_labels([sample], preparation.labels)
    return preparation.encoder.sources[0], family.tokenizer.decode(labels[labels != IGNORE_INDEX])


TWO_TURNS = chat("What?", "This.", "And?", "That.")
CLOSED = chat("What?", "This.", "And?")


@pytest.mark.parametrize(("row", "text"), [(TWO_TURNS, "This.<|user|>That.<|user|>"), (CLOSED, "This.<|user|>")])
def test_sampled_trains_the_user_s_token_that_ends_the_turn(glm, row, text):
    assert trained_text(glm(marked=True), row) == (LossSource.MESSAGES, text)
    assert trained_text(glm(marked=False), row) == (LossSource.MESSAGES, text)


@pytest.mark.parametrize(
    ("train_on_eos", "text"),
    [
        ("turn", "This.<|user|>That.<|user|>"), ("all", "This.<|user|>That.<|user|>"), ("last", "This.That.<|user|>"),
        ("none", "This.That."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("marked", [True, False])
def test_roles_train_it_too(glm, marked, train_on_eos, text):
    """No scan finds it, so the rows say it themselves; without ends the scan is enough."""
    rule = LossRule.ROLES if train_on_eos == "none" else LossRule.GIVEN
    found = trained_text(glm(marked), TWO_TURNS, RoleLoss(train_on_eos=train_on_eos), rule)
    assert found == (LossSource.ROLES, text)


TOOL = {
    "messages": [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "look()"},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "Twelve."},
        {"role": "user", "content": "Thanks"},
    ]
}


@pytest.mark.parametrize("marked", [True, False])
def test_a_call_of_a_tool_ends_with_the_token_of_its_answer(glm, marked):
    assert trained_text(glm(marked), TOOL)[1] == "look()<|observation|>Twelve.<|user|>"
    assert trained_text(glm(marked), TOOL, RoleLoss(), LossRule.GIVEN)[1] == "look()<|observation|>Twelve.<|user|>"


@pytest.mark.parametrize("marked", [True, False])
def test_other_turns_do_not_end_it(glm, marked):
    """A system message after the assistant's is no token that the model stops with."""
    messages = [*TWO_TURNS["messages"], {"role": "system", "content": "Stop."}]
    assert trained_text(glm(marked), {"messages": messages})[1] == "This.<|user|>That."


@pytest.mark.parametrize("marked", [True, False])
def test_a_chat_of_one_turn_teaches_to_stop(glm, marked):
    """Nothing follows the answer in the template's text: the stop token is added, and only there."""
    family = glm(marked)
    stop = family.token_id("<|user|>")
    preparation = Preparation(family, {"files": "rows.jsonl", "kind": "chat"}, packing=ROOMY)  # `sample` verifies
    ids = preparation.sample(chat("What?", "This.")).input_ids.tolist()
    assert (ids[-1], ids.count(stop)) == (stop, 2)
    assert trained_text(family, chat("What?", "This."))[1] == "This.<|user|>"
    assert preparation.sample(chat("What?")).input_ids.tolist().count(stop) == 1
    for loss in ("all", RoleLoss(train_on_eos="none")):
        other = Preparation(family, {"files": "rows.jsonl", "kind": "chat"}, packing=ROOMY, loss=loss)
        assert other.sample(chat("What?", "This.")).input_ids.tolist() == ids[:-1]


@pytest.mark.parametrize("end", ["<|user|>", "<|observation|>\n", "<|im_end|>"])
@pytest.mark.parametrize("marked", [True, False])
def test_a_template_that_ends_the_turn_needs_no_stop_token(glm, marked, end):
    """<|im_end|> is what the tokenizer says that texts end with."""
    family = glm(marked)
    plain = Preparation(family, {"files": "rows.jsonl", "kind": "chat"}, packing=ROOMY).sample(chat("What?", "This."))
    family.processor.chat_template += "{{- '" + end.replace("\n", "\\n") + "' -}}"
    preparation = Preparation(family, {"files": "rows.jsonl", "kind": "chat"}, packing=ROOMY)
    ids = preparation.sample(chat("What?", "This.")).input_ids.tolist()
    written = family.tokenizer(end)["input_ids"]
    assert ids == plain.input_ids.tolist()[:-1] + written


def test_samples_of_a_bin_do_not_end_each_other_s_turns(glm):
    """The second sample begins with the token that would end the first one's last turn."""
    for marked in (True, False):
        family = glm(marked)
        preparation = Preparation(family, {"files": "rows.jsonl", "kind": "chat"}, packing=ROOMY)
        samples = [preparation.sample(TWO_TURNS), preparation.sample(CLOSED)]
        assert {sample.rule for sample in samples} == {LossRule.GIVEN}
        together = sample_labels(samples, preparation.labels)
        alone = [sample_labels([sample], preparation.labels)[0] for sample in samples]
        assert [labels.tolist() for labels in together] == [labels.tolist() for labels in alone]
