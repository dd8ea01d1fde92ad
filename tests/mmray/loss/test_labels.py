"""Labels of packed rows: what each rule trains, what never trains, and the trained text of real rows in every mode."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmray.images import TilingPolicy
from mmray.loss import roles as roles_module
from mmray.loss.labels import LabelMaker, segment_ids
from mmray.loss.rules import IGNORE_INDEX, LossRule
from mmray.loss.scan import scan_tensors
from mmray.loss.settings import Loss, RoleLoss
from mmray.loss.sources import LossSource, label_maker
from mmray.masks import RoleBoundary
from mmray.packing.pack import PADDING_SEGMENT
from mmray.packing.settings import PackingSettings
from mmray.rows.preflight import sample_labels
from mmray.rows.sample import Sample
from tests.mmray.loss.test_scan import WaitsForDevice
from tests.mmray.preparing import Preparation, with_marked_template

ROOMY = PackingSettings(token_capacity=1_000_000, visual_capacity=1_000_000)
TILING = TilingPolicy(preset="ocr_pages", overview=(512, 512), labels=True)

# 1 opens, 2 user, 3 assistant, 9 closes; 50 and 51 are media; from 10 to 49, text.
MAKER = LabelMaker(
    boundaries=(RoleBoundary("user", (1, 2), (9,)), RoleBoundary("assistant", (1, 3), (9,))),
    roles_to_train=("assistant",),
    train_on_eos="turn",
    media_token_ids=(50, 51),
)
ALL, ROLES, GIVEN = LossRule.ALL, LossRule.ROLES, LossRule.GIVEN


def arguments(samples, *, blocks=(), padding=(), dtype=torch.int64):
    """What `LabelMaker.labels` takes for samples packed into one row, each (rule, ids, given or None).

    padding: numbers of the samples that are none.
    """
    ids = [token for _, tokens, _ in samples for token in tokens]
    flags_given = [flag for _, tokens, flags in samples for flag in (flags or [0] * len(tokens))]
    lengths = torch.tensor([len(tokens) for _, tokens, _ in samples])
    return (
        torch.tensor(ids, dtype=dtype),
        segment_ids(lengths, torch.tensor([number in padding for number in range(len(samples))])),
        torch.tensor([int(rule) for rule, _, _ in samples]),
        torch.tensor(flags_given, dtype=torch.bool),
        torch.tensor(blocks, dtype=torch.int32).reshape(-1, 2),
    )


def trained(samples, *, maker=MAKER, **options):
    """The trained positions of samples packed into one row."""
    ids = [token for _, tokens, _ in samples for token in tokens]
    labels = maker.labels(*arguments(samples, **options))
    assert labels.dtype == torch.int64
    positions = (labels != IGNORE_INDEX).nonzero().flatten().tolist()
    assert labels[positions].tolist() == [ids[position] for position in positions]
    return positions


# ---- What is never trained ----


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_every_token_but_the_first_of_each_sample(dtype):
    assert trained([(ALL, [10, 11, 12], None), (ALL, [13, 14], None)], dtype=dtype) == [1, 2, 4]


def test_media_tokens():
    assert trained([(ALL, [10, 50, 50, 51, 11, 50, 12], None)]) == [4, 6]
    assert trained([(ROLES, [1, 3, 10, 50, 11, 9], None)]) == [2, 4, 5]
    assert trained([(GIVEN, [10, 50, 11], [1, 1, 1])]) == [2]


def test_everything_inside_a_media_block():
    """Line breaks between rows of frames and labels before tiles are text to the tokenizer and no text to learn."""
    ids = [10, 50, 20, 21, 50, 20, 11, 12]
    assert trained([(ALL, ids, None)]) == [2, 3, 5, 6, 7]
    assert trained([(ALL, ids, None)], blocks=[(1, 5)]) == [6, 7]
    assert trained([(ALL, ids, None)], blocks=[(1, 2), (3, 2)]) == [5, 6, 7]  # neighbours
    assert trained([(ALL, ids, None)], blocks=[(4, 4)]) == [2, 3]  # at the end
    assert trained([(ALL, ids, None)], blocks=[(0, 8)]) == []


def test_blocks_count_from_the_row_s_beginning():
    assert trained([(ALL, [10, 11, 12], None), (ALL, [13, 14, 15, 16], None)], blocks=[(5, 1)]) == [1, 2, 4, 6]


@pytest.mark.parametrize("rule", [ALL, ROLES, GIVEN])
def test_padding(rule):
    """Gaps between samples, and what stands at the end of a row."""
    gap = (rule, [3, 10, 9], [1, 1, 1])
    assert trained([(ALL, [10, 11], None), gap], padding=[1]) == [1]
    assert trained([(ALL, [10, 11], None), gap, (ALL, [12, 13, 14], None), gap], padding=[1, 3]) == [1, 6, 7]
    assert trained([gap], padding=[0]) == []
    assert trained([(ROLES, [1], None), gap, (ROLES, [1, 3, 10], None), gap], padding=[1, 3]) == [6]


def test_the_first_token_of_a_given_sample():
    assert trained([(GIVEN, [10, 11], [1, 1]), (GIVEN, [12, 13], [1, 0])]) == [1]


# ---- Rules ----

CHAT = [1, 2, 10, 9, 1, 3, 11, 12, 9]


def test_each_sample_by_its_own_rule():
    samples = [
        (ROLES, CHAT, None),
        (ALL, CHAT, None),
        (GIVEN, CHAT, [0, 0, 1, 0, 0, 0, 1, 0, 0]),
        (ROLES, CHAT, [1] * 9),
    ]
    expected = [6, 7, 8, *range(10, 18), 20, 24, 33, 34, 35]
    assert trained(samples) == expected


def test_turns_stop_at_the_sample_s_end():
    unclosed = [1, 3, 10, 11]
    assert trained([(ROLES, unclosed, None), (ROLES, [12, 13, 9, 14], None)]) == [2, 3]
    assert trained([(ROLES, unclosed, None), (ALL, [12, 13], None)]) == [2, 3, 5]
    assert trained([(ROLES, [1], None), (ROLES, [3, 10, 9], None)]) == []


def test_segments():
    assert segment_ids(torch.tensor([2, 1, 3])).tolist() == [0, 0, 1, 2, 2, 2]
    padding = torch.tensor([False, True, False])
    found = segment_ids(torch.tensor([2, 3, 1], dtype=torch.int32), padding)
    assert found.tolist() == [0, 0] + [PADDING_SEGMENT] * 3 + [2]


def test_arrays_of_samples_give_the_labels_of_tensors():
    samples = [(ROLES, CHAT, None), (GIVEN, [10, 11, 12], [1, 0, 1]), (ALL, [10, 50, 11], None)]
    ids, _, rules, flags, blocks = arguments(samples, blocks=[(13, 1)])
    lengths = np.asarray([len(tokens) for _, tokens, _ in samples], dtype=np.int32)
    labels = MAKER.of_arrays(
        ids.numpy().astype(np.int32), lengths, rules.numpy().astype(np.int8), flags.numpy(), blocks
    )
    assert (labels != IGNORE_INDEX).nonzero()[0].tolist() == trained(samples, blocks=[(13, 1)])


def test_no_samples_have_no_labels():
    none = np.zeros(0, dtype=np.int32)
    assert MAKER.of_arrays(none, none, none, none, []).shape == (0,)


# ---- Stop tokens of the next turn ----

# 6 opens the assistant, 7 the user, 8 a tool's answer: the one that follows ends the assistant's turn.
GLM = LabelMaker(
    boundaries=(
        RoleBoundary("user", (7,), (6,), include_end=False),
        RoleBoundary("assistant", (6,), (7,), include_end=False),
        RoleBoundary("tool", (8,), (6,), include_end=False),
    ),
    roles_to_train=("assistant",),
    train_on_eos="turn",
    media_token_ids=(50,),
    stop_token_ids=(7, 8),
)
GLM_CHAT = [7, 10, 6, 11, 12, 7, 13, 6, 14]


def test_a_stop_token_trains_after_a_trained_turn():
    assert trained([(ROLES, GLM_CHAT, None)], maker=GLM) == [3, 4, 5, 8]
    assert trained([(ROLES, [*GLM_CHAT, 7], None)], maker=GLM) == [3, 4, 5, 8, 9]
    assert trained([(ROLES, [7, 7, 6, 11, 7, 7, 8], None)], maker=GLM) == [3, 4]  # only the one that follows


def test_without_stop_tokens_the_next_turn_is_left_out():
    assert trained([(ROLES, GLM_CHAT, None)], maker=replace(GLM, stop_token_ids=())) == [3, 4, 8]


def test_other_tokens_after_a_turn_do_not_train():
    closed = replace(MAKER, stop_token_ids=(1,))
    assert trained([(ROLES, [*CHAT, 20, 1, 2, 10], None)], maker=closed) == [6, 7, 8]
    assert trained([(ROLES, [*CHAT, 1, 2, 10], None)], maker=closed) == [6, 7, 8, 9]


def test_stop_tokens_stay_inside_their_sample():
    open_turn, next_sample = [7, 10, 6, 11], [7, 12, 6, 13]
    assert trained([(ROLES, open_turn, None), (ROLES, next_sample, None)], maker=GLM) == [3, 7]
    assert trained([(ROLES, open_turn, None), (ALL, next_sample, None)], maker=GLM) == [3, 5, 6, 7]
    assert trained([(ROLES, open_turn, None), (ALL, [7], None)], padding=[1], maker=GLM) == [3]


def test_stop_tokens_belong_to_the_rule_of_roles():
    """Where a token was found when preparing, so was its stop token; where all train, nothing is added."""
    assert trained([(GIVEN, GLM_CHAT, [0, 0, 0, 1, 1, 0, 0, 0, 1])], maker=GLM) == [3, 4, 8]
    assert trained([(ALL, GLM_CHAT, None)], maker=GLM) == list(range(1, 9))


def test_a_media_token_is_no_stop():
    assert trained([(ROLES, [7, 10, 6, 11, 7, 13], None)], maker=replace(GLM, media_token_ids=(7,))) == [3]


@given(st.lists(st.lists(st.integers(5, 11), min_size=1, max_size=12), min_size=1, max_size=5))
def test_stop_tokens_add_just_those_that_follow(rows):
    samples = [(ROLES, tokens, None) for tokens in rows]
    without = trained(samples, maker=replace(GLM, stop_token_ids=()))
    starts = np.cumsum([0] + [len(tokens) for tokens in rows]).tolist()
    ids = [token for tokens in rows for token in tokens]
    after = {at + 1 for at in without if at + 1 < len(ids) and at + 1 not in starts and ids[at + 1] in (7, 8)}
    assert trained(samples, maker=GLM) == sorted({*without, *after})


# ---- Devices ----


def everything():
    samples = [(ROLES, GLM_CHAT, None), (GIVEN, [10, 11, 12], [0, 1, 1]), (ALL, [10, 50, 11], None), (ALL, [5], None)]
    return arguments(samples, blocks=[(13, 1)], padding=[3])


def test_labels_wait_for_nothing():
    """After the first call on a device, which takes the tables of media and stop tokens there."""
    expected = GLM.labels(*everything())
    arguments_ = everything()
    with mock.patch.object(roles_module, "scan_compiled", scan_tensors), WaitsForDevice():
        found = GLM.labels(*arguments_)
    assert found.tolist() == expected.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_without_waiting():
    many = replace(GLM, media_token_ids=tuple(range(50, 200)))
    on_gpu = [argument.cuda() for argument in everything()]
    many.labels(*on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        labels = many.labels(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert labels.cpu().tolist() == many.labels(*everything()).tolist()


# ---- Rows of every family ----


def decoded(preparation: Preparation, samples: list[Sample], maker: LabelMaker | None = None) -> list[str]:
    """The trained text of each sample, from labels of all samples packed into one row."""
    decode = preparation.family.tokenizer.decode
    return [decode(part[part != IGNORE_INDEX]) for part in sample_labels(samples, maker or preparation.labels)]


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def test_turns_of_every_family(processor, model_type):
    preparation = Preparation(processor, {"files": "rows.jsonl", "kind": "chat"})
    row = chat(
        ("system", "Be brief."), ("user", "Total?"), ("assistant", "12.50"), ("user", "Sure?"), ("assistant", "Yes")
    )
    end = {"qwen": "<|im_end|>", "idef": "<|end_of_text|>", "smol": "<end_of_utterance>"}[model_type[:4]]
    space = " " if model_type == "smolvlm" else ""  # its header ends with the colon
    assert decoded(preparation, [preparation.sample(row)]) == [f"{space}12.50{end}{space}Yes{end}"]
    preparation = Preparation(processor, {"files": "rows.jsonl", "kind": "chat"}, loss=RoleLoss(roles=("user",)))
    assert decoded(preparation, [preparation.sample(row)]) == [f"{space}Total?{end}{space}Sure?{end}"]


@pytest.mark.parametrize("loss", ["all", RoleLoss(train_on_inputs=True)])
def test_every_token(processor, loss):
    row = chat(("user", "Total?"), ("assistant", "12.50"))
    preparation = Preparation(processor, {"files": "rows.jsonl", "kind": "chat"}, loss=loss)
    sample = preparation.sample(row)
    whole = preparation.family.tokenizer.decode(sample.input_ids[1:])
    assert decoded(preparation, [sample]) == [whole]


@pytest.mark.parametrize("text", ["\nfoo", "\n\nfoo\n", " \n foo", "  foo", "\tfoo", "\r\nfoo", "\n"])
def test_turns_that_begin_with_white_space(shared_processor, text):
    """Qwen's tokenizer makes one token of the header's line break and of those after it; the turn is found."""
    preparation = Preparation(shared_processor, {"files": "rows.jsonl", "kind": "chat"})
    samples = [preparation.sample(chat(("user", text + "?"), ("assistant", text)))]
    end = shared_processor.tokenizer.eos_token
    (found,) = decoded(preparation, samples)
    assert found in (text + end, "\n" + text + end)  # with the header's line break, where it is in the same token


@pytest.mark.parametrize("loss", ["sampled", RoleLoss(), "all"])
def test_tokenized_rows(processor, loss):
    """Boundaries are scanned in ready-made ids too; labels are read for `sampled` alone."""
    chats = Preparation(processor, {"files": "rows.jsonl", "kind": "chat"}, loss=RoleLoss())
    sample = chats.sample(chat(("user", "Total?"), ("assistant", "12.50"), ("user", "Sure?")))
    ids = sample.input_ids.tolist()
    row = {"input_ids": ids, "labels": [IGNORE_INDEX] * (len(ids) - 1) + ids[-1:]}
    preparation = Preparation(processor, {"files": "rows.jsonl", "kind": "tokenized"}, loss=loss)
    decode = chats.family.tokenizer.decode
    expected = {"sampled": decode(ids[-1:]), "all": decode(ids[1:])}
    assert decoded(preparation, [preparation.sample(row)]) == [
        decoded(chats, [sample])[0] if isinstance(loss, RoleLoss) else expected[loss]
    ]


# ---- Real rows, real processors ----


@pytest.fixture(scope="module", params=["untiled", "tiled"])
def encoded(request, shared_data: Path):
    """A function: the rows of a file of shared data and their samples."""
    tiling = TILING if request.param == "tiled" else None

    @functools.cache
    def encode(processor: Any, name: str, kind: str, loss: Loss = "sampled"):
        file = shared_data / name
        dataset = {"files": str(file), "kind": kind}
        preparation = Preparation(processor, dataset, tiling=tiling, packing=ROOMY, loss=loss)
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        ((_, samples),) = preparation.windows()
        assert [sample.id for sample in samples] == [row["id"] for row in rows]
        assert all(isinstance(sample, Sample) for sample in samples)
        return preparation, rows, samples

    return encode


def composed(preparation: Preparation, text: str) -> str:
    """The text as the tokenizer keeps it: Qwen's composes letters and their accents."""
    normalizer = preparation.family.tokenizer.backend_tokenizer.normalizer
    return normalizer.normalize_str(text) if normalizer else text


def expected_text(row: dict[str, Any], end: str, *, default_system: bool, train_on_eos: str) -> str:
    """The assistants' texts, with the end markers that are to be trained."""
    turns = []
    for message in row["messages"]:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        turns.append((message["role"], "".join(part.get("text", "") for part in parts)))
    if default_system and turns[0][0] != "system":
        turns.insert(0, ("system", ""))
    last = max(number for number, (role, _) in enumerate(turns) if role == "assistant")
    pieces = []
    for number, (role, text) in enumerate(turns):
        trains = {"turn": role == "assistant", "all": True, "last": number == last, "none": False}[train_on_eos]
        pieces.append((text if role == "assistant" else "") + (end if trains else ""))
    return "".join(pieces)


def expected_texts(preparation: Preparation, rows: list[dict[str, Any]], *, default_system: bool, train_on_eos: str):
    end = preparation.family.tokenizer.eos_token
    texts = [expected_text(row, end, default_system=default_system, train_on_eos=train_on_eos) for row in rows]
    return [composed(preparation, text) for text in texts]


def test_shared_chat_by_boundaries(encoded, shared_processor):
    """Every way to train it: `sampled` is the assistants' turns with their ends, as a scan finds them."""
    sampled, _, of_messages = encoded(shared_processor, "chat.jsonl", "chat")
    assert sampled.encoder.sources == [LossSource.MESSAGES]
    preparation, rows, samples = encoded(shared_processor, "chat.jsonl", "chat", RoleLoss())
    assert {sample.rule for sample in samples} == {LossRule.ROLES}
    is_qwen = "<|im_start|>" in shared_processor.tokenizer.get_vocab()
    losses: list[Loss] = ["sampled", *(RoleLoss(train_on_eos=each) for each in ("turn", "all", "last", "none"))]
    for loss in losses:
        train_on_eos = "turn" if loss == "sampled" else loss.train_on_eos
        expected = expected_texts(preparation, rows, default_system=is_qwen, train_on_eos=train_on_eos)
        found = of_messages if loss == "sampled" else samples
        assert decoded(preparation, found, label_maker(loss, preparation.family)) == expected


def test_shared_chat_by_template(encoded, shared_processor):
    marked = with_marked_template(shared_processor)
    preparation, rows, samples = encoded(marked, "chat.jsonl", "chat")
    assert preparation.encoder.sources == [LossSource.MESSAGES]
    expected = expected_texts(preparation, rows, default_system=False, train_on_eos="turn")
    assert decoded(preparation, samples) == expected
    content_alone = with_marked_template(shared_processor, end_inside=False)
    preparation, rows, samples = encoded(content_alone, "chat.jsonl", "chat")
    assert decoded(preparation, samples) == expected


def test_shared_chat_as_a_whole(encoded, shared_processor):
    preparation, _, samples = encoded(shared_processor, "chat.jsonl", "chat", "all")
    decode = preparation.family.tokenizer.decode
    for sample, found in zip(samples, decoded(preparation, samples), strict=True):
        kept = ~np.isin(sample.input_ids, preparation.family.media_token_ids)
        for start, count in sample.blocks:
            kept[start : start + count] = False
        kept[0] = False
        assert found == decode(sample.input_ids[kept])
        assert kept.sum() > len(sample.input_ids) / 1000


def test_shared_pages(encoded, shared_processor):
    preparation, rows, samples = encoded(shared_processor, "pages.jsonl", "pretrain")
    end = preparation.family.tokenizer.eos_token
    expected = [composed(preparation, row["text"].removeprefix("<image>")) + end for row in rows]
    assert decoded(preparation, samples) == expected
