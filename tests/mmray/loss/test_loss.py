"""The `loss` setting: what each mode takes its signal from, what it scans for, and what is refused."""

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from mmray.errors import UserError
from mmray.families import RoleMarkers, family_of
from mmray.families.qwen2_vl import Qwen2VL
from mmray.loss.rules import LossRule
from mmray.loss.settings import RoleLoss, allows_empty, loss_of_record, loss_record
from mmray.loss.sources import LossSource, label_maker, loss_source, stop_token_ids
from tests.mmray.preparing import with_marked_template


class Silent(Qwen2VL):
    """A family that knows no text around turns."""

    role_markers = ()


class Stopping(Qwen2VL):
    stop_tokens = ("<|im_start|>", "<|no such token|>")


@pytest.fixture
def family(processors):
    return family_of(processors["qwen2_vl"])


# ---- Where the signal comes from ----


@pytest.mark.parametrize("kind", ["pretrain", "chat", "tokenized"])
@pytest.mark.parametrize("loss", ["all", RoleLoss(train_on_inputs=True)])
def test_every_token_needs_no_signal(processors, kind, loss):
    assert loss_source(loss, kind, Silent(processors["qwen2_vl"])) is LossSource.EVERY_TOKEN


@pytest.mark.parametrize("loss", ["sampled", "all", RoleLoss(), RoleLoss(roles=(), allow_empty=True)])
def test_pre_training_is_not_asked(processors, loss):
    assert loss_source(loss, "pretrain", Silent(processors["qwen2_vl"])) is LossSource.EVERY_TOKEN


@pytest.mark.parametrize("loss", ["sampled", "all", RoleLoss()])
def test_pre_training_text_with_a_prompt_trains_its_answer(processors, loss):
    class Prompted(Qwen2VL):
        has_prompt = True

    assert loss_source(loss, "pretrain", Prompted(processors["qwen2_vl"])) is LossSource.ANSWER


@pytest.mark.parametrize("kind", ["chat", "tokenized"])
def test_roles_are_scanned_in_both_kinds(family, kind):
    assert loss_source(RoleLoss(), kind, family) is LossSource.ROLES


def test_sampled_asks_the_row_or_the_messages(processors):
    plain, marked = processors["qwen2_vl"], with_marked_template(processors["qwen2_vl"])
    assert loss_source("sampled", "tokenized", Qwen2VL(marked)) is LossSource.ROW
    for family in (Qwen2VL(marked), Silent(marked), Qwen2VL(plain), Silent(plain)):
        assert loss_source("sampled", "chat", family) is LossSource.MESSAGES


def test_tokenized_rows_have_no_messages_to_choose_from(family):
    for loss in (RoleLoss(turns="last"), RoleLoss(reasoning="none"), RoleLoss(train_empty_thoughts=False)):
        with pytest.raises(UserError, match="which tokenized rows do not have"):
            loss_source(loss, "tokenized", family)
        assert loss_source(loss, "chat", family) is LossSource.ROLES


def test_sources_have_the_rules_by_which_samples_are_labelled():
    rules = {source.value: source.rule for source in LossSource}
    assert rules == {
        "all": LossRule.ALL,
        "roles": LossRule.ROLES,
        "row": LossRule.GIVEN,
        "messages": LossRule.GIVEN,
        "answer": LossRule.GIVEN,
    }


# ---- What is scanned for ----


def test_sampled_scans_for_the_assistant_and_its_stops(processors):
    family = Stopping(processors["qwen2_vl"])
    maker = label_maker("sampled", family)
    assert {boundary.role for boundary in maker.boundaries} == {"system", "user", "assistant", "tool"}
    assert (maker.roles_to_train, maker.train_on_eos) == (("assistant",), "turn")
    assert maker.stop_token_ids == stop_token_ids(family) == (family.token_id("<|im_start|>"),)
    assert maker.media_token_ids == family.media_token_ids
    assert family.image_token_id in maker.media_token_ids


def test_roles_leave_stop_tokens_out(processors):
    maker = label_maker(RoleLoss(train_on_eos="last"), Stopping(processors["qwen2_vl"]))
    assert maker.stop_token_ids == ()
    assert maker.train_on_eos == "last"


@pytest.mark.parametrize("loss", ["all", RoleLoss(train_on_inputs=True, allow_empty=True)])
def test_every_token_scans_for_nothing(family, loss):
    maker = label_maker(loss, family)
    assert (maker.boundaries, maker.roles_to_train, maker.stop_token_ids) == ((), (), ())
    assert maker.media_token_ids == family.media_token_ids


def test_a_family_without_markers_can_be_sampled_by_other_signals(processors):
    assert label_maker("sampled", Silent(processors["qwen2_vl"])).boundaries == ()


def test_own_boundaries_replace_the_family_s(processor):
    family = family_of(processor)
    boundaries = [
        {"role": "asked", "start": "Question: ", "end": "?", "include_start": True, "include_end": False},
        {"role": "said", "start": "Answer: ", "end": "eos_token"},
        {"role": "rest", "start": "Remark: ", "end": None},
        {"role": "said", "start": "Reply: ", "until_next": True},
    ]
    loss = RoleLoss.model_validate({"boundaries": boundaries, "roles": ["said", "rest"]})
    maker = label_maker(loss, family)
    asked, said, rest, replied = maker.boundaries
    assert (asked.include_start, asked.include_end, said.include_start, said.include_end) == (True, False, False, True)
    assert said.end == (family.tokenizer.eos_token_id,)
    assert rest.end == replied.end == ()
    assert [boundary.until_next for boundary in maker.boundaries] == [False, False, False, True]
    decode = family.tokenizer.decode
    assert (decode(asked.start), decode(asked.end), decode(rest.start)) == ("Question: ", "?", "Remark: ")
    assert maker.roles_to_train == ("said", "rest")


def test_markers_are_encoded_without_the_tokens_around_a_text(processors):
    """A tokenizer that begins each text with a token would make markers that stand nowhere."""
    processor = copy.deepcopy(processors["idefics3"])
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token
    post = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A",
        "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_token_id], "tokens": [bos]}},
    }  # fmt: skip
    description = json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": post}
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(description))
    assert tokenizer("Answer:")["input_ids"][0] == tokenizer.bos_token_id
    loss = RoleLoss.model_validate({"boundaries": [{"role": "assistant", "start": "Answer:", "end": "Done."}]})
    (boundary,) = label_maker(loss, family_of(processor)).boundaries
    assert (tokenizer.decode(boundary.start), tokenizer.decode(boundary.end)) == ("Answer:", "Done.")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"roles": ("asistant",)}, r"loss.roles: \['asistant'\].*'assistant', 'system', 'tool', 'user'"),
        ({"roles": ("assistant", "critic")}, r"'critic'.*'assistant', 'system', 'tool', 'user'"),
        ({"boundaries": ({"role": "assistant", "start": ""},)}, "start '' of role 'assistant' encodes to no token"),
        ({"boundaries": ({"role": "user", "start": "U:"},)}, r"'assistant'.*\['user'\]"),
        ({"boundaries": ()}, r"the boundaries have \[\]; give loss.boundaries"),
    ],
)
def test_roles_and_markers_refused(processor, settings, message):
    with pytest.raises(UserError, match=message):
        label_maker(RoleLoss.model_validate(settings), family_of(processor))


def test_eos_token_that_the_tokenizer_lacks():
    loss = RoleLoss.model_validate({"boundaries": [{"role": "assistant", "start": "A:", "end": "eos_token"}]})
    family: Any = SimpleNamespace(tokenizer=SimpleNamespace(eos_token=None))
    with pytest.raises(UserError, match="the tokenizer has none"):
        label_maker(loss, family)


class FewWords:
    """A tokenizer of words, with one token for all that it does not know."""

    words: dict[str, int] = {"<unk>": 0, "A:": 1, "</s>": 2}  # noqa: RUF012
    unk_token, unk_token_id, eos_token = "<unk>", 0, "</s>"

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [self.words.get(word, 0) for word in text.split()]}


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        ("Assistant :", "</s>", "the start 'Assistant :' of role 'assistant' cannot be encoded: .*'<unk>'"),
        ("A:", "<end>", "the end '<end>' of role 'assistant' cannot be encoded"),
        ("A: A:", " ", "the end ' ' of role 'assistant' encodes to no token"),
    ],
)
def test_markers_that_cannot_be_encoded(start, end, message):
    family: Any = SimpleNamespace(tokenizer=FewWords(), media_token_ids=(), stop_tokens=())
    loss = RoleLoss.model_validate({"boundaries": [{"role": "assistant", "start": start, "end": end}]})
    with pytest.raises(UserError, match=message):
        label_maker(loss, family)
    family.role_markers = (RoleMarkers("assistant", start, end),)  # the family's own as well
    with pytest.raises(UserError, match=message):
        label_maker("sampled", family)


def test_the_unknown_token_itself_may_be_a_marker():
    family: Any = SimpleNamespace(tokenizer=FewWords(), media_token_ids=())
    loss = RoleLoss.model_validate({"boundaries": [{"role": "assistant", "start": "A: <unk>", "end": "eos_token"}]})
    (boundary,) = label_maker(loss, family).boundaries
    assert (boundary.start, boundary.end) == ((1, 0), (2,))


# ---- The setting itself ----


@pytest.mark.parametrize("train_on_eos", ["turn", "all", "last", "none"])
def test_an_empty_list_of_roles_is_refused_unless_allowed(family, train_on_eos):
    with pytest.raises(ValidationError, match=r"roles: \[\] trains nothing; name a role, or set allow_empty: true"):
        RoleLoss(roles=(), train_on_eos=train_on_eos)
    allowed = RoleLoss(roles=(), allow_empty=True, train_on_eos=train_on_eos)
    assert label_maker(allowed, family).roles_to_train == ()
    assert allows_empty(allowed)
    assert not any(map(allows_empty, ("sampled", "all", RoleLoss())))


@pytest.mark.parametrize(
    "other",
    [
        {"roles": ["user"]},
        {"roles": []},
        {"train_on_eos": "last"},
        {"boundaries": [{"role": "assistant", "start": "A:"}]},
        {"boundaries": []},
    ],
)
def test_every_token_and_some_turns_exclude_each_other(other):
    (name,) = other
    with pytest.raises(ValidationError, match=f"train_on_inputs: true trains every token, and leaves {name} without"):
        RoleLoss.model_validate({"train_on_inputs": True} | other)
    assert RoleLoss.model_validate({"train_on_inputs": False, "allow_empty": True} | other)
    assert RoleLoss(train_on_inputs=True, roles=("assistant",), train_on_eos="turn").train_on_inputs  # as they are


def test_an_empty_end_is_refused():
    with pytest.raises(ValidationError, match="at least 1 character"):
        RoleLoss.model_validate({"boundaries": [{"role": "assistant", "start": "A:", "end": ""}]})


def test_a_turn_ends_in_one_way():
    with pytest.raises(ValidationError, match=r"until_next and end exclude each other; keep one \(end is 'B'\)"):
        RoleLoss.model_validate({"boundaries": [{"role": "assistant", "start": "A", "end": "B", "until_next": True}]})


@pytest.mark.parametrize(
    "loss",
    [
        "sampled",
        "all",
        RoleLoss(),
        RoleLoss.model_validate({"roles": ["a"], "boundaries": [{"role": "a", "start": "b"}]}),
    ],
)
def test_a_record_gives_the_setting_back(loss):
    assert loss_of_record(json.loads(json.dumps(loss_record(loss)))) == loss
