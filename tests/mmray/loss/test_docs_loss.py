"""docs/loss.md says what the code does: its settings are good ones, its tables complete, its messages word by word."""

import logging
import re
from pathlib import Path

import pytest
import yaml

from mmray.errors import UserError
from mmray.families import load_processor
from mmray.loss.settings import BoundarySettings, RoleLoss, loss_of_record
from mmray.rows.files import source_files
from mmray.rows.plan import plan_chunks
from mmray.rows.preflight import FIRST_ROWS, check_first_rows
from tests.mmray.preparing import Preparation, chat, write_rows

TEXT = (Path(__file__).parents[3] / "docs/loss.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.S)


def test_the_settings_shown_are_good_settings():
    shown = [loss_of_record(yaml.safe_load(block)["loss"]) for block in blocks("yaml")]
    assert shown[:2] == ["sampled", "all"]
    assert all(isinstance(each, RoleLoss) for each in shown[2:])
    assert shown[2] == RoleLoss()  # the defaults


def test_every_key_is_described():
    (table,) = re.findall(r"\| key \| says \|\n\| --- \| --- \|\n(.*?)\n\n", TEXT, flags=re.S)
    assert set(re.findall(r"^\| `(\w+)` \|", table, flags=re.M)) == set(RoleLoss.model_fields)
    for field in BoundarySettings.model_fields:
        assert re.search(rf"\b{field}\b", TEXT), field
    assert f"first {FIRST_ROWS} rows" in TEXT


@pytest.fixture
def check(shared_data, tmp_path, caplog):
    """A function: what the check of the first rows logs, for a few chats and the real Qwen processor."""
    processor = load_processor(shared_data / "processors/qwen2-vl")
    file = write_rows(
        tmp_path / "rows.jsonl", [chat(f"Question {number}?", f"Answer {number}.") for number in range(5)]
    )

    def check(loss):
        preparation = Preparation(processor, {"files": file, "kind": "chat"}, loss=loss)
        (chunk,) = plan_chunks(source_files(preparation.data.train), window_rows=64, chunk_rows=64)
        with caplog.at_level(logging.INFO, logger="mmray"):
            check_first_rows(preparation.encoder, preparation.labels, chunk.pieces, split="train")
        return caplog.messages

    return check


def test_the_line_shown_is_the_code_s(check):
    (line,) = check("sampled")
    assert blocks("text")[0] == f"{line}\n"


def test_the_error_shown_is_the_code_s(check, tmp_path):
    loss = RoleLoss.model_validate({"boundaries": [{"role": "assistant", "start": "### Answer:"}]})
    with pytest.raises(UserError) as caught:
        check(loss)
    assert blocks("text")[1] == f"error: {str(caught.value).replace(str(tmp_path), '/data')}\n"
