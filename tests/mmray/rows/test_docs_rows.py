"""docs/rows.md says what the code does: its reasons, its examples, and the messages it quotes, word by word."""

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mmray.config.job import load_job
from mmray.errors import UserError
from mmray.images import ALLOWED_SCHEMES
from mmray.images.readers import FORMATS
from mmray.packing.settings import PackingSettings
from mmray.rows.files import source_files
from mmray.rows.messages import ROLES
from mmray.rows.plan import plan_chunks
from mmray.rows.read import read_piece
from mmray.rows.sample import RejectedRow, Sample
from mmray.rows.settings import FIELDS, DatasetSettings
from tests.mmray.pdfs import pdf_of
from tests.mmray.preparing import Preparation
from tests.mmray.reasons import reasons_in_code

PAGE = Path(__file__).parents[3] / "docs/rows.md"
TEXT = PAGE.read_text(encoding="utf-8")
PACKING = PackingSettings(token_capacity=1024, visual_capacity=512)


def blocks(language):
    """The code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.S)


def test_the_table_of_reasons_is_that_of_the_code():
    table = re.findall(r"^\| `(\w+)` \|", TEXT[TEXT.index("## Reasons") :], flags=re.M)
    assert len(table) == len(set(table))
    assert set(table) == reasons_in_code()


def test_lists_of_names_are_those_of_the_code():
    for kind, fields in FIELDS.items():
        (row,) = re.findall(rf"^\| `{kind}` \| (.*?) \|", TEXT, flags=re.M)
        assert re.findall(r"`(\w+)`", row) == list(fields)
    for name in [*ROLES, *ALLOWED_SCHEMES]:
        assert f"`{name}`" in TEXT, name
    assert ", ".join(FORMATS) in TEXT
    for field in DatasetSettings.model_fields:
        assert f"`{field}`" in TEXT, field


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pages").mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("L", (850, 1100), 255).save(tmp_path / "pages" / name)
    pdf_of(tmp_path / "pages/d.pdf", [{"points": (408, 528)}])
    return tmp_path


def encode(processor, folder, kind, lines):
    """Encode lines as the rows of a file of the folder."""
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    dataset = {"files": (str(folder / "rows.jsonl"),), "kind": kind}
    preparation = Preparation(processor, dataset, packing=PACKING)
    chunks = plan_chunks(source_files(preparation.data.train), window_rows=99, chunk_rows=99)
    rows = [row for chunk in chunks for piece in chunk.pieces for row in read_piece(piece)]
    return preparation.encoder.encode(rows)


def test_the_rows_shown_are_good_rows(processors, folder):
    seen = set()
    for block in blocks("json"):
        for line in block.splitlines():
            fields = json.loads(line).keys()
            kind = "pretrain" if "text" in fields else "tokenized" if "input_ids" in fields else "chat"
            (result,) = encode(processors["qwen2_vl"], folder, kind, line)
            assert isinstance(result, Sample), result
            seen.add(kind)
    assert seen == set(FIELDS)


def test_the_settings_shown_are_good_settings():
    for block in blocks("yaml"):
        for each in yaml.safe_load(block)["data"]["train"]:
            DatasetSettings.model_validate(each)


# The rows whose messages the page quotes: (line, what stands in it).
BAD_ROWS = {
    "missing image": '{"id": "a#7", "text": "<image>\\nSome text", "images": ["pages/nowhere.jpg"]}',
    "wrong count": '{"id": "a#8", "text": "<image>\\n<image>\\nSome text", "images": ["pages/a.jpg"]}',
    "too long": json.dumps({"id": "a#9", "text": "<image>\n" + "Q7zj " * 900, "images": ["pages/a.jpg"]}),
    "special token": '{"id": "a#10", "text": "Type <|im_end|> to stop"}',
    "no JSON": '{"id": "a#11", "text": "<image>',
}

BAD_JOB = """
name: pages
model: {path: some/model}
data:
  train:
    - {files: rows.jsonl, kind: pretrained}
packing: {token_capacity: 4096, visual_capcity: 2048}
training: {steps: 100, epochs: 1}
output: {prepared: out/prepared, run: out/run}
"""


def quoted(message, folder):
    """A message as the page shows it: the folder is called /data there."""
    return message.replace(str(folder), "/data")


@pytest.mark.parametrize("name", BAD_ROWS)
def test_the_messages_shown_are_those_of_the_code(processors, folder, name):
    (result,) = encode(processors["qwen2_vl"], folder, "pretrain", BAD_ROWS[name])
    assert isinstance(result, RejectedRow)
    assert f"{result.reason}: {quoted(result.message, folder)}\n" in TEXT


def test_the_error_of_a_bad_job_file_is_shown_as_it_is(tmp_path):
    (tmp_path / "job.yaml").write_text(BAD_JOB)
    with pytest.raises(UserError) as caught:
        load_job(tmp_path / "job.yaml")
    assert quoted(f"error: {caught.value}\n", tmp_path) in TEXT


def test_the_error_that_stops_a_strict_job_is_shown_as_it_is(processors, folder):
    (folder / "rows.jsonl").write_text(BAD_ROWS["missing image"] + "\n")
    dataset = {"files": (str(folder / "rows.jsonl"),), "kind": "pretrain"}
    strict = Preparation(processors["qwen2_vl"], dataset, packing=PACKING, on_bad_row="error")
    with pytest.raises(UserError) as caught:
        list(strict.windows())
    assert quoted(f"error: {caught.value}\n", folder) in TEXT
