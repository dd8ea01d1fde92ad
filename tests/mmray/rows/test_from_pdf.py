"""Rows of PDFs: one a page, read again by a prepare; continued after a stop."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmray.errors import UserError
from mmray.rows import from_pdf
from mmray.rows.from_pdf import write_pdf_rows
from mmray.rows.sample import Sample
from tests.mmray.pdfs import pdf_of
from tests.mmray.preparing import Preparation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in/deep").mkdir(parents=True)
    pdf_of(tmp_path / "in/a.pdf", [{"text": "INVOICE 0815"}, {"text": ""}, {"text": "Total 74.00"}])
    pdf_of(tmp_path / "in/deep/b.PDF", [{}])
    (tmp_path / "in/noise.pdf").write_bytes(b"%PDF-1.7 nothing more")
    return tmp_path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_row_for_each_page(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    written = write_pdf_rows(
        [f"{folder}/in"], f"{folder}/rows.jsonl", on_progress=lambda done, total: seen.append((done, total))
    )
    rows = rows_of(folder / "rows.jsonl")
    assert [row["id"] for row in rows] == [
        "in/a.pdf#page=1", "in/a.pdf#page=2", "in/a.pdf#page=3", "in/deep/b.PDF#page=1"
    ]  # fmt: skip
    assert all(row["text"] == "<image>" and row["images"] == [row["id"]] and len(row) == 3 for row in rows)
    assert (written.rows, written.without_text, written.image_root) == (4, 0, None)
    assert len(written.failed) == 1
    assert "pdf_damaged" in written.failed[0]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert sorted(path.name for path in folder.iterdir()) == ["in", "rows.jsonl"]


def test_the_text_layer_is_a_marked_beginning(folder: Path, processors: dict[str, Any]) -> None:
    written = write_pdf_rows([f"{folder}/in/a.pdf"], f"{folder}/rows.jsonl", text=True)
    rows = rows_of(folder / "rows.jsonl")
    assert [(row["text"], row["text_from"]) for row in rows] == [
        ("<image>\nINVOICE 0815", "pdf"), ("<image>\nTotal 74.00", "pdf")
    ]  # fmt: skip
    assert (written.rows, written.without_text) == (2, 1)
    made = Preparation(processors["qwen2_vl"], {"files": ("x",), "kind": "pretrain"}, tiling={"pdf_dpi": 72})
    results = made.encode(*rows, source=f"{folder}/rows.jsonl")
    assert [isinstance(result, Sample) and result.sizes for result in results] == [((200, 300),)] * 2


def test_pdfs_elsewhere_need_an_image_root(folder: Path, processors: dict[str, Any]) -> None:
    (folder / "out").mkdir()
    written = write_pdf_rows([f"{folder}/in/*.pdf"], f"{folder}/out/rows.jsonl")
    assert written.image_root == f"{folder}/in"
    rows = rows_of(folder / "out/rows.jsonl")
    assert rows[0]["images"] == [f"{folder}/in/a.pdf#page=1"]
    made = Preparation(
        processors["qwen2_vl"], {"files": ("x",), "kind": "pretrain", "image_root": written.image_root},
        tiling={"pdf_dpi": 72},
    )  # fmt: skip
    assert made.sample(rows[0], source=f"{folder}/out/rows.jsonl").sizes == ((200, 300),)


def test_documents_in_a_store(folder: Path) -> None:
    import fsspec

    with fsspec.open("memory://from_pdf/a.pdf", "wb") as file:
        file.write((folder / "in/a.pdf").read_bytes())
    write_pdf_rows(["memory://from_pdf/*.pdf"], f"{folder}/rows.jsonl")
    rows = rows_of(folder / "rows.jsonl")
    assert [row["images"][0].rpartition("#")[2] for row in rows] == ["page=1", "page=2", "page=3"]
    assert rows[0]["images"][0].startswith("memory://")


def test_a_stopped_run_goes_on_where_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = folder / "expected.jsonl"
    write_pdf_rows([f"{folder}/in"], str(expected))
    asked = []

    def stopping(path: str) -> int:
        asked.append(Path(path).name)
        if path.endswith("b.PDF") and asked.count("b.PDF") == 1:
            raise KeyboardInterrupt
        return num_pages(path)

    num_pages = from_pdf.num_pages
    monkeypatch.setattr(from_pdf, "num_pages", stopping)
    out = folder / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_pdf_rows([f"{folder}/in"], str(out))
    with (folder / "rows.jsonl.partial").open("a") as file:
        file.write('{"id": "half a li')
    write_pdf_rows([f"{folder}/in"], str(out))
    assert out.read_bytes() == expected.read_bytes()
    assert asked == ["a.pdf", "b.PDF", "b.PDF", "noise.pdf"]


def test_other_words_begin_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "rows.jsonl.partial").write_text('{"files": "other", "text": false}\n{"id": "x"}\n{"done": "y"}\n')
    write_pdf_rows([f"{folder}/in/a.pdf"], f"{folder}/rows.jsonl")
    assert [row["id"] for row in rows_of(folder / "rows.jsonl")] == [f"in/a.pdf#page={n}" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["{}/nowhere.pdf"], "no such PDF"), (["{}/in/noise.pdf"], "no row from 1 PDFs"),
        (["{}/rows.txt"], "does not end with .pdf"),
    ],
)  # fmt: skip
def test_what_gives_no_rows(folder: Path, files: list[str], words: str) -> None:
    (folder / "rows.txt").write_text("x")
    with pytest.raises(UserError, match=words):
        write_pdf_rows([name.format(folder) for name in files], f"{folder}/rows.jsonl")
    assert not list(folder.glob("rows.jsonl*"))


def test_nothing_is_overwritten(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("mine")
    with pytest.raises(UserError, match="there already"):
        write_pdf_rows([f"{folder}/in"], f"{folder}/rows.jsonl")
    assert (folder / "rows.jsonl").read_text() == "mine"
