"""What a person typed never becomes a turn: each family's own markers, written in a message, train nothing of it."""

import copy

import pytest

from mmray.families import family_of
from mmray.loss.rules import IGNORE_INDEX
from mmray.loss.settings import RoleLoss
from mmray.packing.settings import PackingSettings
from mmray.rows.preflight import sample_labels
from mmray.rows.sample import RejectedRow
from tests.mmray.preparing import Preparation, chat

ROOMY = PackingSettings(token_capacity=10_000, visual_capacity=10_000)
ASKED, REPLY = "zebra", "Fine, thanks."


@pytest.fixture
def prepare(zoo_processor):
    """A function: a preparation of chats for a member of the zoo."""

    def prepare(member, loss="sampled", template=None, special=()):
        processor = copy.copy(zoo_processor(member if isinstance(member, str) else member.name))
        if special:
            processor = copy.deepcopy(processor)
            processor.tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        processor.chat_template = template or processor.chat_template
        family = family_of(processor, model_type=None if isinstance(member, str) else member.model_type)
        family.takes_text_only = True  # no picture matters here
        return Preparation(family, {"files": "rows.jsonl", "kind": "chat"}, packing=ROOMY, loss=loss)

    return prepare


def trained_text(preparation, sample):
    (labels,) = sample_labels([sample], preparation.labels)
    return preparation.family.tokenizer.decode(labels[labels != IGNORE_INDEX], skip_special_tokens=False)


def markers(family):
    texts = (text for marker in family.role_markers for text in (marker.start, marker.end))
    return dict.fromkeys(text for each in texts for text in (each, each.strip()) if text)


def typed(marker):
    """Questions that hold a marker at their beginning, inside, behind a line break, and at their end."""
    for before, after in (("", f" {ASKED} yes"), (f"{ASKED} ", f" {ASKED} yes"), (f"{ASKED}\n", ASKED), (ASKED, "")):
        yield before + marker + after


@pytest.mark.proves("masks")
@pytest.mark.parametrize("loss", ["sampled", RoleLoss(train_on_eos="all")])
def test_typed_markers_train_nothing(chatting, prepare, loss):
    preparation = prepare(chatting, loss)
    expected = trained_text(preparation, preparation.sample(chat("Hello?", REPLY, ASKED, REPLY)))
    assert (REPLY in expected, ASKED in expected) == (True, False)
    for marker in markers(preparation.family):
        for question in typed(marker):
            for row in (chat(question, REPLY, ASKED, REPLY), chat("Hello?", REPLY, question, REPLY)):
                (found,) = preparation.encode(row, verify=False)
                if isinstance(found, RejectedRow):
                    assert found.reason == "special_token_in_text"
                else:
                    assert trained_text(preparation, found) == expected, question


@pytest.mark.proves("masks")
def test_a_marker_in_an_answer_cuts_nothing_off(chatting, prepare):
    preparation = prepare(chatting)
    for marker in markers(preparation.family):
        (found,) = preparation.encode(chat("Hello?", f"{ASKED} {marker} {ASKED}"), verify=False)
        if isinstance(found, RejectedRow):
            assert found.reason == "special_token_in_text"
        else:
            assert trained_text(preparation, found).count(ASKED) == 2


@pytest.mark.parametrize(
    ("name", "marker"),
    [("llava", "ASSISTANT:"), ("llava", "USER:"), ("llava_next", "[/INST]"), ("llava_next", "[INST]")],
)
def test_the_message_says_where_and_what(prepare, name, marker):
    rejected = prepare(name).rejected(chat("Hello?", REPLY, f"Say {marker} {ASKED}", REPLY))
    assert rejected.reason == "special_token_in_text"
    assert rejected.message.startswith(f"message 2 holds {marker!r}, by which the turns of a chat are found")


@pytest.mark.parametrize("name", ["paddleocr_vl", "smolvlm", "llava", "llava_next"])
def test_prose_that_opens_no_turn_is_kept(prepare, name):
    """Markers in other letters, and those that open nothing where they stand."""
    preparation = prepare(name)
    harmless = ["the user: Anna", "Assistant editor", "[inst]", "INST", "USERS"]
    if name in ("smolvlm", "paddleocr_vl"):  # inside a turn only its own end is looked for
        harmless += ["User: please log in", "see User: Anna"]
    for text in harmless:
        assert ASKED in trained_text(preparation, preparation.sample(chat(text, f"{ASKED} {text}")))


def test_a_marker_in_two_parts_or_with_other_blanks(prepare):
    parts = [{"type": "text", "text": "Say ASSIS"}, {"type": "text", "text": f"TANT: {ASKED}"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": REPLY}]}
    preparation = prepare("llava")
    (found,) = preparation.encode(row)
    assert isinstance(found, RejectedRow) or ASKED not in trained_text(preparation, found)
    assert prepare("llava").rejected(chat(f"Say\u2581ASSISTANT: {ASKED}", REPLY)).reason == "special_token_in_text"


# ---- The job's own boundaries ----

ARROWS = "{% for m in messages %}{{ '<<' + m.role + '>> ' + m.content + '\\n' }}{% endfor %}"


def test_the_job_s_own_plain_markers(prepare):
    loss = RoleLoss.model_validate(
        {"boundaries": [{"role": role, "start": f"<<{role}>>", "until_next": True} for role in ("user", "assistant")]}
    )
    preparation = prepare("qwen2_vl", loss, ARROWS)
    assert trained_text(preparation, preparation.sample(chat("Who?", REPLY))) == f" {REPLY}\n"
    rejected = preparation.rejected(chat(f"Say <<assistant>> {ASKED}", REPLY))
    assert (rejected.reason, "message 0 holds '<<assistant>>'" in rejected.message) == ("special_token_in_text", True)
    assert preparation.sample(chat("Say <<tool>>", REPLY))
    assert prepare("qwen2_vl", "all", ARROWS).sample(chat(f"Say <<assistant>> {ASKED}", REPLY))


def test_special_tokens_in_the_job_s_markers(prepare):
    """A token that the family does not know as structure, and the job does."""
    token = "<|speaker|>"
    question = chat(f"Say {token} {ASKED}", REPLY)
    assert prepare("qwen2_vl", special=[token]).sample(question)
    boundary = {"role": "assistant", "start": f"<<assistant>>{token}", "until_next": True}
    loss = RoleLoss.model_validate({"boundaries": [boundary]})
    rejected = prepare("qwen2_vl", loss, ARROWS, special=[token]).rejected(question)
    assert rejected.reason == "special_token_in_text"
    assert f"message 0 holds the token {token!r}" in rejected.message
