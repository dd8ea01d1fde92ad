"""The first rows of each set: what their loss comes from is said once, and what cannot train stops before any actor."""

import base64
import copy
import json
import logging

import pytest
from PIL import Image

from mmray.errors import UserError
from mmray.families import RoleMarkers
from mmray.families.qwen2_vl import Qwen2VL
from mmray.loss.settings import RoleLoss
from mmray.loss.sources import LossSource
from mmray.packing.settings import PackingSettings
from mmray.rows.files import source_files
from mmray.rows.plan import plan_chunks
from mmray.rows.preflight import FIRST_ROWS, check_first_rows
from tests.mmray.preparing import Preparation, chat, png, with_marked_template, write_rows

ROOMY = PackingSettings(token_capacity=10_000, visual_capacity=10_000, window_rows=32)


@pytest.fixture
def check(tmp_path, processors, caplog):
    """A function: the sources that the check gives for sets of rows, (kind, rows) each, and what it logs."""

    def check(*sets, loss="sampled", processor=None, data=None, **settings):
        datasets = []
        for number, (kind, rows) in enumerate(sets):
            lines = [json.dumps(row) if isinstance(row, dict) else row for row in rows]
            (tmp_path / f"{number}.jsonl").write_text("".join(line + "\n" for line in lines))
            datasets.append({"files": str(tmp_path / f"{number}.jsonl"), "kind": kind} | settings)
        preparation = Preparation(
            processor or processors["qwen2_vl"], *datasets, packing=ROOMY, loss=loss, **(data or {})
        )
        chunks = plan_chunks(source_files(preparation.data.train), window_rows=32, chunk_rows=32)
        pieces = [piece for chunk in chunks for piece in chunk.pieces]
        with caplog.at_level(logging.INFO, logger="mmray"):
            found = check_first_rows(preparation.encoder, preparation.labels, pieces, split="train")
        return found, caplog.messages

    return check


def roles(*boundaries, **settings):
    return RoleLoss.model_validate({"boundaries": boundaries} | settings)


CHATS = [chat(f"Question {number}?", f"Answer {number}.") for number in range(5)]
READY = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]


# ---- What is said ----


def test_each_set_s_source_is_said_once_with_its_ids(check, processors):
    found, said = check(("pretrain", [{"text": "A page."}]), ("chat", CHATS), ("tokenized", READY))
    assert found == [LossSource.EVERY_TOKEN, LossSource.MESSAGES, LossSource.ROW]
    end = [Qwen2VL(processors["qwen2_vl"]).token_id("<|im_end|>")]
    assert said == [
        "data.train[0] (pretrain): loss on every token but media",
        f"data.train[1] (chat): loss on what the assistant says in each message, and what ends it: {end}",
        "data.train[2] (tokenized): loss on what each row's sampled_mask or labels say",
    ]


def test_the_template_s_marks_are_said(check, processors):
    found, said = check(("chat", CHATS), processor=with_marked_template(processors["qwen2_vl"]))
    assert found == [LossSource.MESSAGES]
    end = processors["qwen2_vl"].tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert said == [f"data.train[0] (chat): loss on what the assistant says in each message, and what ends it: [{end}]"]


def test_stop_tokens_are_said(check, processors):
    class Stopping(Qwen2VL):
        stop_tokens = ("<|im_start|>",)

    for processor in (processors["qwen2_vl"], with_marked_template(processors["qwen2_vl"])):
        family = Stopping(processor)
        _, said = check(("chat", CHATS), processor=family)
        assert str(family.token_id("<|im_start|>")) in said[-1].split("what ends it")[1]


def test_last_turns_without_an_end_are_said(check, processors):
    """As LLaVA 1.5 writes chats: a turn goes on to where the next one starts."""

    class Endless(Qwen2VL):
        role_markers = (
            RoleMarkers("user", "USER:", until_next=True),
            RoleMarkers("assistant", "ASSISTANT:", until_next=True),
        )

    def said_of(end, rows=CHATS):
        processor = copy.copy(processors["qwen2_vl"])
        processor.chat_template = (
            "{% for m in messages %}{{ m.role.upper() + ': ' + m.content }}"
            "{% if m.role == 'assistant' %}" + end + "{% endif %}{{ '\\n' }}{% endfor %}"
        )
        return check(("chat", rows), processor=Endless(processor))[1][-1]

    assert said_of("").endswith("; 5 of 5 last turns end without a stop token: nothing teaches the model to stop")
    assert "last turns" not in said_of("{{ eos_token }}")
    some = "{% if '3' not in m.content %}{{ eos_token }}{% endif %}"
    assert said_of(some, [*CHATS, chat("No answer")]).endswith("; 1 of 5 last turns end without a stop token")


def test_the_roles_are_said(check):
    boundaries = [{"role": "assistant", "start": "<|im_start|>assistant\n"}, {"role": "user", "start": "A", "end": "?"}]
    _, said = check(("chat", CHATS), ("tokenized", READY * 2), loss="all")
    assert said == [f"data.train[{number}] ({kind}): loss on every token but media" for number, kind in
                    enumerate(["chat", "tokenized"])]  # fmt: skip
    found, said = check(("chat", CHATS), loss=roles(*boundaries, train_on_eos="last"))
    assert found == [LossSource.ROLES]
    assert said[-1].startswith("data.train[0] (chat): loss on assistant turns, start [")
    assert said[-1].endswith("], end of the sample (train_on_eos: last)")
    _, said = check(("chat", CHATS), loss=RoleLoss(roles=("user", "assistant")))
    _, said = check(("chat", CHATS), loss=roles({"role": "assistant", "start": "<|im_start|>", "until_next": True}))
    assert "], end where the next turn starts (train_on_eos: turn)" in said[-1]
    _, said = check(("chat", CHATS), loss=RoleLoss(roles=("user", "assistant")))
    assert "user turns, start [" in said[-1]
    assert "; assistant turns, start [" in said[-1]
    _, said = check(("chat", CHATS), loss=RoleLoss(roles=(), allow_empty=True))
    assert said[-1].endswith("loss on no turns (train_on_eos: turn)")


# ---- What stops ----

ASSISTANT = {"role": "assistant", "start": "<|im_start|>assistant\n", "end": "<|im_end|>"}


def refused(check, *sets, **options):
    with pytest.raises(UserError) as caught:
        check(*sets, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_start_that_is_never_found(check):
    message = refused(check, ("chat", CHATS), loss=roles(ASSISTANT | {"start": "<assistant>:"}))
    assert message.startswith("data.train[0] (chat): no turn of role 'assistant' begins in the first 5 good rows")
    assert "'<assistant>:' [" in message
    assert (
        "0.jsonl:1' begins '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n<|im_start|>user" in message
    )


def test_a_role_that_has_no_turn(check):
    tool = {"role": "tool", "start": "<|im_start|>tool\n", "end": "<|im_end|>"}
    message = refused(check, ("chat", CHATS), loss=roles(ASSISTANT, tool, roles=["assistant", "tool"]))
    assert "no turn of role 'tool' begins" in message
    assert check(("chat", CHATS), loss=roles(ASSISTANT, tool))  # it is not to be trained
    with_tool = {"messages": [*CHATS[0]["messages"], {"role": "tool", "content": "42"}]}
    assert check(("chat", [*CHATS, with_tool]), loss=roles(ASSISTANT, tool, roles=["assistant", "tool"]))


def test_any_boundary_of_a_role_is_enough_for_the_family_s_own(check, processors):
    class More(Qwen2VL):
        role_markers = (
            RoleMarkers("assistant", "<assistant>:", "<never>"),
            *Qwen2VL(processors["qwen2_vl"]).role_markers,
        )

    for loss in ("sampled", RoleLoss()):
        assert check(("chat", CHATS), loss=loss, processor=More(processors["qwen2_vl"]))


@pytest.mark.parametrize("other", [{"start": "<assistant>:"}, {"start": "<assistant>:", "end": "<never>"}])
def test_each_boundary_that_the_job_wrote_must_open_a_turn(check, other):
    message = refused(check, ("chat", CHATS), loss=roles(ASSISTANT | other, ASSISTANT))
    assert "its start '<assistant>:' [" in message


def test_a_start_that_stands_inside_other_turns_alone(check):
    """Its tokens are there, and open nothing."""
    inner = ASSISTANT | {"start": "assistant\n"}
    message = refused(check, ("chat", CHATS), loss=roles(ASSISTANT, inner))
    assert "the start 'assistant\\n' [" in message
    assert "opens no turn in the first 5 good rows" in message
    assert check(("chat", CHATS), loss=roles(inner))


def test_other_roles_boundaries_count_where_their_ends_train(check):
    user = {"role": "user", "start": "<user>:", "end": "<|im_end|>"}
    assert check(("chat", CHATS), loss=roles(ASSISTANT, user))
    message = refused(check, ("chat", CHATS), loss=roles(ASSISTANT, user, train_on_eos="all"))
    assert "no turn of role 'user' begins" in message
    good = user | {"start": "<|im_start|>user\n"}
    assert check(("chat", CHATS), loss=roles(ASSISTANT, good, train_on_eos="all"))


@pytest.mark.parametrize("include_end", [True, False])
def test_an_end_must_close_a_turn_of_its_own(check, include_end):
    """It stands in the rows, before the assistant's turn alone."""
    ending = ASSISTANT | {"end": "user\n", "include_end": include_end}
    message = refused(check, ("chat", CHATS), loss=roles(ending))
    assert "no turn of role 'assistant' ends in the first 5 good rows: its end 'user\\n' [" in message
    twice = [chat("What?", "This.", "And?", "That.")]
    assert check(("chat", twice), loss=roles(ending))


def test_an_end_that_is_never_found(check):
    message = refused(check, ("chat", CHATS), loss=roles(ASSISTANT | {"end": "</assistant>"}))
    assert "no turn of role 'assistant' ends in the first 5 good rows: its end '</assistant>' [" in message
    assert "end: null" in message
    assert check(("chat", CHATS), loss=roles(ASSISTANT | {"end": None}))


def test_each_set_is_looked_at(check):
    others = [{"input_ids": [5, 6, 7]}]
    assert check(("chat", CHATS), loss=roles(ASSISTANT))
    message = refused(check, ("chat", CHATS), ("tokenized", others), loss=roles(ASSISTANT))
    assert message.startswith("data.train[1] (tokenized): no turn of role 'assistant' begins in the only good row")
    assert refused(check, ("tokenized", others), ("chat", CHATS), loss=roles(ASSISTANT)).startswith("data.train[0]")


@pytest.mark.parametrize("loss", ["sampled", RoleLoss()])
def test_a_set_of_which_nothing_trains(check, loss):
    """The assistant says nothing, and its end is not to be trained."""
    asked = [chat(f"Question {number}?") for number in range(3)]
    untrained = "no token of the first 3 good rows is trained on"
    nothing = untrained if loss == "sampled" else "no turn of role 'assistant' begins"
    assert nothing in refused(check, ("chat", asked), loss=loss)
    silent = [chat("Question?", "") for _ in range(3)]
    if loss != "sampled":
        loss = RoleLoss(train_on_eos="none")
        assert "no token of the first 3 good rows is trained on" in refused(check, ("chat", silent), loss=loss)
        assert check(("chat", silent), loss=RoleLoss(train_on_eos="none", allow_empty=True))
    else:
        assert check(("chat", silent), loss=loss)  # the end of the turn trains


def test_a_template_that_marks_nothing_in_these_rows(check, processors):
    marked = with_marked_template(processors["qwen2_vl"])
    asked = [chat(f"Question {number}?") for number in range(3)]
    assert "no token of the first 3 good rows is trained on" in refused(check, ("chat", asked), processor=marked)
    assert check(("chat", [*asked, CHATS[0]]), processor=marked)


def test_rows_whose_labels_train_nothing(check):
    rows = [{"input_ids": [5, 6], "labels": [-100, -100]}, {"input_ids": [5, 6], "sampled_mask": [1, 0]}]
    message = refused(check, ("tokenized", rows))
    assert "no token of the first 2 good rows is trained on; see `loss`" in message
    assert check(("tokenized", [*rows, {"input_ids": [5, 6], "sampled_mask": [0, 1]}]))


def test_an_empty_list_of_roles_is_not_looked_for(check):
    assert check(("chat", CHATS), loss=RoleLoss(roles=(), allow_empty=True))


def test_the_beginning_of_a_row_shows_each_run_of_image_tokens_once(check, tmp_path):
    Image.new("L", (170, 220)).save(tmp_path / "page.png")
    row = chat("<image>Read.", "Text.", images=["page.png"])
    message = refused(check, ("chat", [row]), loss=roles(ASSISTANT | {"start": "<assistant>:"}))
    assert "<|vision_start|><|image_pad|><|vision_end|>Read.<|im_end|>" in message


# ---- Which rows ----


def test_bad_rows_are_passed_over(check):
    bad = ["no JSON", {"messages": 7}, chat("<|im_start|>", "x")]
    assert check(("chat", [*bad, CHATS[0]]))
    assert "the only good row" in refused(
        check, ("chat", [*bad, CHATS[0]]), loss=roles(ASSISTANT | {"start": "<assistant>:"})
    )
    found, _ = check(("chat", bad), loss=roles(ASSISTANT | {"start": "<assistant>:"}))
    assert found == [LossSource.ROLES]  # all bad: not judged


def test_a_strict_job_stops_at_a_bad_row(check):
    assert "bad_json" in refused(check, ("chat", ["no JSON", CHATS[0]]), data={"on_bad_row": "error"})


def test_only_the_first_rows_are_read(check):
    unlike = [chat("Question?") for _ in range(FIRST_ROWS)]
    assert "begins in the first 64 good rows" in refused(check, ("chat", [*unlike, CHATS[0]]), loss=RoleLoss())
    assert check(("chat", [*unlike[1:], CHATS[0]]), loss=RoleLoss())
    assert check(("chat", [*unlike[1:], CHATS[0], "no JSON"]), data={"on_bad_row": "error"})


def test_a_set_may_have_several_files(check, tmp_path):
    files = [write_rows(tmp_path / f"part-{number}.jsonl", [chat("Question?")]) for number in range(3)]
    files.append(write_rows(tmp_path / "part-9.jsonl", [CHATS[0]]))
    assert check(("chat", []), loss=RoleLoss(), files=files)


def test_without_boundaries_the_messages_say_what_trains(check, processors):
    class Silent(Qwen2VL):
        role_markers = ()

    silent = Silent(processors["qwen2_vl"])
    assert check(("chat", CHATS), processor=silent)[0] == [LossSource.MESSAGES]  # the messages say it
    assert check(("pretrain", [{"text": "A page."}]), ("tokenized", READY), processor=silent)


# ---- Columns ----

NOTES = [{"text": f"Page {number}."} for number in range(3)]


def test_a_column_that_no_row_has_is_refused(check):
    with pytest.raises(UserError, match=r"data\.train\[0\].*columns has 'images: imgs', and no row has that column"):
        check(("pretrain", NOTES), columns={"images": "imgs"})
    check(
        ("pretrain", [*NOTES, {"text": "Page.", "imgs": []}]), columns={"images": "imgs"}
    )  # one that has it is enough


@pytest.mark.parametrize("column", ["imgs", "Image", "picture"])
def test_pictures_in_a_column_that_is_not_named_are_refused(check, column):
    rows = [row | {column: "page.png"} for row in NOTES]
    with pytest.raises(UserError, match=f"no row has an image, and rows have the column '{column}'; name it"):
        check(("pretrain", rows))
    check(("pretrain", [row | {column: None} for row in NOTES]))  # an empty column is no column


def test_a_set_with_pictures_may_have_other_columns_like_them(check):
    picture = base64.b64encode(png(Image.new("RGB", (60, 40)))["bytes"]).decode()
    check(("pretrain", [{"text": "<image>Page.", "images": [{"bytes": picture}], "picture": "thumb.png"}]))


def test_columns_are_judged_once_more_on_all_rows(tmp_path, processors):
    rows = [{"text": f"Page {number}."} for number in range(FIRST_ROWS)] + [{"text": "Last.", "imgs": ["page.png"]}]
    write_rows(tmp_path / "rows.jsonl", rows)
    dataset = {"files": str(tmp_path / "rows.jsonl"), "kind": "pretrain"}
    preparation = Preparation(processors["qwen2_vl"], dataset, packing=ROOMY)
    with pytest.raises(UserError, match="no row has an image, and rows have the column 'imgs'"):
        preparation.write(tmp_path / "prepared")
