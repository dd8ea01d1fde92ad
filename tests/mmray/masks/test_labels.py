"""Labels of packed rows, and the label maker that a job's settings and a family give."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmray.errors import UserError
from mmray.families import family_of
from mmray.images import TilingPolicy
from mmray.masks import RoleBoundary
from mmray.masks.labels import IGNORE_INDEX, PADDING_SEGMENT, LabelMaker, LossRule, segment_ids
from mmray.masks.settings import BoundarySettings, MaskingSettings, label_maker
from mmray.packing_settings import PackingSettings
from mmray.rows.encode import Sample
from tests.mmray.preparing import Preparation

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


def trained(samples, *, blocks=(), padding=0, maker=MAKER, dtype=torch.int64):
    """The trained positions of samples packed into one row, each (rule, ids, given or None)."""
    ids = [token for _, tokens, _ in samples for token in tokens]
    lengths = torch.tensor([len(tokens) for _, tokens, _ in samples])
    given = [flag for _, tokens, flags in samples for flag in (flags or [0] * len(tokens))]
    labels = maker.labels(
        torch.tensor(ids, dtype=dtype),
        segment_ids(lengths, padding),
        torch.repeat_interleave(torch.tensor([int(rule) for rule, _, _ in samples]), lengths),
        torch.tensor(given, dtype=torch.bool),
        torch.tensor(blocks, dtype=torch.int32).reshape(-1, 2),
    )
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


def test_padding():
    assert trained([(ALL, [10, 11], None), (ALL, [12, 13, 14], None)], padding=3) == [1]
    assert trained([(ALL, [12, 13, 14], None)], padding=3) == []


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
    assert segment_ids(torch.tensor([2, 3], dtype=torch.int32), 3).tolist() == [0, 0] + [PADDING_SEGMENT] * 3


# ---- Settings ----


def test_the_family_s_boundaries(processor):
    family = family_of(processor)
    maker = label_maker(MaskingSettings(), family)
    assert {boundary.role for boundary in maker.boundaries} == {"system", "user", "assistant"}
    assert maker.media_token_ids == family.media_token_ids
    assert family.image_token_id in maker.media_token_ids


def test_own_boundaries(processor):
    family = family_of(processor)
    boundaries = (
        BoundarySettings(role="asked", start="Question: ", end="?", include_start=True, include_end=False),
        BoundarySettings(role="said", start="Answer: ", end="eos_token"),
        BoundarySettings(role="rest", start="Remark: "),
    )
    maker = label_maker(MaskingSettings(boundaries=boundaries, roles_to_train=("said", "rest")), family)
    asked, said, rest = maker.boundaries
    assert (asked.include_start, asked.include_end, said.include_start, said.include_end) == (True, False, False, True)
    assert said.end == (family.tokenizer.eos_token_id,)
    assert rest.end == ()
    decode = family.tokenizer.decode
    assert (decode(asked.start), decode(asked.end), decode(rest.start)) == ("Question: ", "?", "Remark: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"roles_to_train": ("asistant",)}, r"'asistant'.*'assistant', 'system', 'user'"),
        ({"roles_to_train": ("assistant", "tool")}, r"'tool'.*'assistant', 'system', 'user'"),
        ({"roles_to_train": ()}, r"masking.roles_to_train: \[\].*name at least one"),
        ({"boundaries": ({"role": "assistant", "start": ""},)}, "start '' of role 'assistant' encodes to no token"),
        ({"boundaries": ({"role": "user", "start": "U:"},)}, r"'assistant'.*\['user'\]"),
    ],
)
def test_settings_refused(processor, settings, message):
    with pytest.raises(UserError, match=message):
        label_maker(MaskingSettings.model_validate(settings), family_of(processor))


def test_eos_token_that_the_tokenizer_lacks():
    boundaries = (BoundarySettings(role="assistant", start="A:", end="eos_token"),)
    family: Any = SimpleNamespace(tokenizer=SimpleNamespace(eos_token=None))
    with pytest.raises(UserError, match="the tokenizer has none"):
        label_maker(MaskingSettings(boundaries=boundaries), family)


# ---- Rows of every family ----


def decoded(preparation: Preparation, samples: list[Sample], maker: LabelMaker | None = None) -> list[str]:
    """The trained text of each sample, from labels of all samples packed into one row."""
    maker = maker or preparation.labels
    lengths = torch.tensor([len(sample.input_ids) for sample in samples])
    starts = lengths.cumsum(0) - lengths
    given = [sample.given if len(sample.given) else np.zeros(len(sample.input_ids), bool) for sample in samples]
    labels = maker.labels(
        torch.from_numpy(np.concatenate([sample.input_ids for sample in samples])),
        segment_ids(lengths),
        torch.repeat_interleave(torch.tensor([int(sample.rule) for sample in samples]), lengths),
        torch.from_numpy(np.concatenate(given)),
        torch.from_numpy(np.concatenate([sample.blocks + [int(start), 0] for sample, start in zip(samples, starts)])),
    )
    return [preparation.family.tokenizer.decode(part[part != IGNORE_INDEX]) for part in labels.split(lengths.tolist())]


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
    users = label_maker(MaskingSettings(roles_to_train=("user",)), preparation.family)
    assert decoded(preparation, [preparation.sample(row)], users) == [f"{space}Total?{end}{space}Sure?{end}"]


def test_train_on_inputs(processor):
    row = chat(("user", "Total?"), ("assistant", "12.50"))
    preparation = Preparation(
        processor, {"files": "rows.jsonl", "kind": "chat"}, masking=MaskingSettings(train_on_inputs=True)
    )
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


# ---- Real rows, real processors ----


@pytest.fixture(scope="module", params=["untiled", "tiled"])
def encoded(request, shared_processor, shared_data: Path):
    """A function: the rows of a file of shared data and their samples."""
    tiling = TILING if request.param == "tiled" else None

    def encode(name: str, kind: str) -> tuple[Preparation, list[dict[str, Any]], list[Sample]]:
        file = shared_data / name
        preparation = Preparation(shared_processor, {"files": str(file), "kind": kind}, tiling=tiling, packing=ROOMY)
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


def test_shared_chat(encoded):
    preparation, rows, samples = encoded("chat.jsonl", "chat")
    tokenizer = preparation.family.tokenizer
    is_qwen = "<|im_start|>" in tokenizer.get_vocab()
    for train_on_eos in ("turn", "all", "last", "none"):
        maker = label_maker(MaskingSettings(train_on_eos=train_on_eos), preparation.family)
        expected = [
            expected_text(row, tokenizer.eos_token, default_system=is_qwen, train_on_eos=train_on_eos) for row in rows
        ]
        assert decoded(preparation, samples, maker) == [composed(preparation, text) for text in expected]


def test_shared_pages(encoded):
    preparation, rows, samples = encoded("pages.jsonl", "pretrain")
    end = preparation.family.tokenizer.eos_token
    expected = [composed(preparation, row["text"].removeprefix("<image>")) + end for row in rows]
    assert decoded(preparation, samples) == expected
