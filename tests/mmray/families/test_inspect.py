"""`mmray inspect` on every family: each token once, trained as in training, text as the tokenizer decodes it."""

import numpy as np
import pytest
from PIL import Image

from mmray.inspect.page import page_of
from mmray.inspect.view import Mark, view_bin
from mmray.loss.rules import IGNORE_INDEX
from mmray.packing.settings import PackingSettings
from tests.mmray.looking import training_labels
from tests.mmray.preparing import Preparation, chat, write_rows


@pytest.mark.parametrize("loss", ["sampled", "all"])
def test_a_bin_of_every_family(member, member_family, tmp_path, loss):
    family = member_family()
    Image.new("RGB", (120, 90), "navy").save(tmp_path / "page.png")
    chats = [
        chat("<image>Two words?", "Red, 日本.", "And one?", "Blue.", images=["page.png"], id="first"),
        chat("<image>Again?", "No more.", images=["page.png"], id="second"),
    ]
    documents = [{"id": name, "text": "<image> Total 12.50 €", "images": ["page.png"]} for name in ("first", "second")]
    kind, rows = ("chat", chats) if member.turns else ("pretrain", documents)
    made = Preparation(
        family,
        {"files": write_rows(tmp_path / "rows.jsonl", rows), "kind": kind},
        packing=PackingSettings(token_capacity=8_192, visual_capacity=8_192, mode="none" if member.refuses else "bins"),
        loss=loss,
    )
    prepared = made.write(tmp_path / "prepared")
    view, packed, labels = view_bin(prepared, 0, family), prepared.bin(0), training_labels(prepared, 0, made)
    assert [sample.id for sample in view.samples] == (["first"] if member.refuses else ["first", "second"])
    for sample in view.samples:
        pieces = [piece for turn in sample.turns for piece in turn.pieces]
        shown = [(token, piece.mark is Mark.TRAINED) for piece in pieces for token in piece.token_ids]
        own = slice(sample.start, sample.start + sample.num_tokens)
        assert [token for token, _ in shown] == packed.input_ids[own].tolist()
        assert [trains for _, trains in shown] == (labels[own] != IGNORE_INDEX).tolist()
        text = "".join(piece.text for piece in pieces if not piece.is_run)
        runs = [piece for piece in pieces if piece.is_run]
        kept = np.ones(sample.num_tokens, dtype=bool)
        for run in runs:
            kept[run.start : run.start + len(run.token_ids)] = False
        decoded = family.tokenizer.decode(packed.input_ids[own][kept], skip_special_tokens=False)
        assert text.replace(" ", "") == decoded.replace(" ", "")
        if member.turns:
            roles = [turn.role for turn in sample.turns if turn.role in ("user", "assistant")]
            # The token by which GLM ends its last answer opens a turn of the user, in which nothing follows.
            stops = member.turns.stop and not member.turns.ends.get("assistant") and loss == "sampled"
            expected = ["user", "assistant"] * (2 if sample.id == "first" else 1)
            assert roles == expected + (["user"] if stops else [])
            assert "Again?" in text or "Two words?" in text
    assert page_of(view, family, prepared.tiling).count("<img") == len(view.samples)
