"""A small input of several windows, with rejected rows, and what prepares it."""

from pathlib import Path
from typing import Any

import pytest

from mmray.packing.settings import PackingSettings
from mmray.prepared import PreparedDataset
from mmray.synthetic.documents import make_document
from tests.mmray.preparing import PICTURES, Preparation, write_pictures, write_rows

PACKING = PackingSettings(token_capacity=240, visual_capacity=128, window_rows=30)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows.jsonl (70 rows: pages, text, every tenth bad) and the images they name."""
    folder = write_pictures(tmp_path_factory.mktemp("inputs"))
    names = list(PICTURES)
    rows: list[dict[str, Any]] = []
    for number in range(70):
        images = [names[number % 4]] if number % 5 else []
        text = "<image>\n" * len(images) + make_document(0, number).text
        rows.append({"id": f"row-{number}", "text": "" if number % 10 == 7 else text, "images": images})
    write_rows(folder / "rows.jsonl", rows)
    return folder


@pytest.fixture
def preparation(inputs: Path, processors: dict[str, Any]) -> Preparation:
    dataset = {"files": (str(inputs / "rows.jsonl"),), "kind": "pretrain"}
    return Preparation(processors["qwen2_vl"], dataset, packing=PACKING)


@pytest.fixture
def prepared(preparation: Preparation, tmp_path: Path) -> PreparedDataset:
    return preparation.write(tmp_path / "prepared")
