"""The written pages are what the rows say: upright after the EXIF fix, bad only on purpose."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmray.synthetic.documents import make_document, sample_texts
from mmray.synthetic.pages import SyntheticPages, write_pages
from mmray.synthetic.pictures import draw_page, storage_of


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> SyntheticPages:
    return write_pages(tmp_path_factory.mktemp("pages"), num_pages=100)


def rows_of(path: Path) -> list[dict]:
    """The rows whose id is not one of the bad ones'."""
    lines = [line for line in path.read_text().splitlines() if "bad-" not in line and line.startswith("{")]
    return [json.loads(line) for line in lines]


def image_parts(row: dict) -> int:
    contents = [message["content"] for message in row["messages"] if isinstance(message["content"], list)]
    return sum(part["type"] == "image" for content in contents for part in content)


def flat(image: Image.Image) -> np.ndarray:
    """Grey over white."""
    page = image.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", page.size, "white"), page).convert("L"), float)


def test_every_page_is_upright_after_the_exif_fix(written):
    for index in range(written.num_pages):
        expected = draw_page(make_document(0, index))
        with Image.open(written.folder / f"pages/train-{index:04d}{storage_of(index).suffix}") as stored:
            upright = ImageOps.exif_transpose(stored)
        assert upright.size == expected.size
        assert max(upright.size) <= 448
        assert np.abs(flat(upright) - flat(expected)).mean() < 4


def test_every_way_of_storing_occurs(written):
    orientations, modes = set(), set()
    for path in written.folder.glob("pages/train-*"):
        with Image.open(path) as image:
            orientations.add(image.getexif().get(0x0112, 1))
            modes.add((image.format, image.mode))
    assert orientations == set(range(1, 9))
    assert modes == {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "L")}


def test_no_line_leaves_the_page_or_runs_into_another():
    for index in range(200):
        pixels = np.asarray(draw_page(make_document(3, index)).convert("L"))
        edge = np.concatenate([pixels[:3].ravel(), pixels[-3:].ravel(), pixels[:, :3].ravel(), pixels[:, -3:].ravel()])
        assert edge.min() == 255
        ink = (pixels < 255).any(axis=1)
        assert (np.diff(ink.astype(int)) == 1).sum() == len(make_document(3, index).lines)


def test_good_page_rows(written):
    rows = rows_of(written.pages.path)
    assert len(rows) == written.pages.num_good_rows == 100
    assert len({row["id"] for row in rows}) == 100
    assert {len(row["images"]) for row in rows} == {1, 2}
    for row in rows:
        assert row["text"].count("<image>") == len(row["images"])
        assert all((written.folder / image).is_file() for image in row["images"])


def test_good_chat_rows(written):
    rows = rows_of(written.chat.path)
    assert len(rows) == written.chat.num_good_rows == 50
    assert {image_parts(row) for row in rows} == {0, 1, 2}
    assert all(image_parts(row) == len(row["images"]) for row in rows)
    assert {message["role"] for row in rows for message in row["messages"]} == {"system", "user", "assistant"}
    assert max(len(row["messages"]) for row in rows) >= 6
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)


def test_eval_rows_are_held_out(written):
    rows = rows_of(written.eval.path)
    assert len(rows) == written.eval.num_rows == 12
    assert written.eval.expected_rejects == {}
    assert not {row["text"] for row in rows} & {row["text"] for row in rows_of(written.pages.path)}


def test_bad_rows_are_bad_for_the_reason_given(written):
    for file, placeholders in (
        (written.pages, lambda row: row["text"].count("<image>")),
        (written.chat, image_parts),
    ):
        lines = file.path.read_text().splitlines()
        assert len(lines) == file.num_rows
        found: dict[str, int] = {}
        for line in lines:
            reason = judge(line, written.folder, placeholders)
            if reason is not None:
                found[reason] = found.get(reason, 0) + 1
        assert found == file.expected_rejects
        assert set(found) == {
            "image_missing",
            "placeholder_count",
            "image_unreadable",
            "bad_json",
            "too_long",
        }


def judge(line: str, folder: Path, placeholders) -> str | None:
    """A plain judge of rows, by nothing of mmray."""
    try:
        row = json.loads(line)
    except ValueError:
        return "bad_json"
    if placeholders(row) != len(row["images"]):
        return "placeholder_count"
    for image in row["images"]:
        if not (folder / image).is_file():
            return "image_missing"
        try:
            Image.open(folder / image).close()
        except OSError:
            return "image_unreadable"
    return "too_long" if len(line) > 50_000 else None


def test_same_seed_same_files(tmp_path):
    first, again, other = (
        write_pages(tmp_path / name, num_pages=12, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    files = sorted(path.relative_to(first.folder) for path in first.folder.rglob("*") if path.is_file())
    assert len(files) == 3 + 12 + 12 + 2
    assert all((first.folder / path).read_bytes() == (again.folder / path).read_bytes() for path in files)
    assert first.pages.path.read_bytes() != other.pages.path.read_bytes()


def test_texts_use_few_words():
    words = {word for text in sample_texts(500) for word in text.split() if word.isalpha()}
    assert 50 < len(words) < 150


def test_too_few_pages():
    with pytest.raises(ValueError, match="num_pages must be at least 2, got 1"):
        write_pages("nowhere", num_pages=1)
