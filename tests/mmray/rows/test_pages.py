"""Rows that name pages of PDFs and of pictures: one image and one placeholder each, prepared and rendered alike."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmray.batches.micro_batch import Place, render
from mmray.errors import RowError
from mmray.images import load_image
from mmray.rows.image_refs import image_ref
from mmray.rows.sample import RejectedRow
from tests.mmray.pdfs import pdf_of
from tests.mmray.preparing import Preparation, chat, write_rows

COLORS = [(255, 0, 0), (0, 200, 0), (0, 0, 255)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pdf_of(tmp_path / "scan.pdf", [{"points": (90 + 20 * n, 120), "color": color} for n, color in enumerate(COLORS)])
    frames = [Image.new("RGB", (60 + 20 * n, 90), color) for n, color in enumerate(COLORS)]
    frames[0].save(tmp_path / "three.tif", save_all=True, append_images=frames[1:])
    frames = [frame.resize((60, 90)) for frame in frames]
    frames[0].save(tmp_path / "three.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "three.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(tmp_path / "one.png")
    return tmp_path


def preparation(processor: Any, folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Preparation:
    dataset = {"files": (write_rows(folder / "rows.jsonl", rows),), "kind": "pretrain"}
    return Preparation(processor, dataset | settings.pop("dataset", {}), **settings)


def colors_trained(made: Preparation, folder: Path) -> list[list[tuple[int, ...]]]:
    """What training renders: the colour at the lower left of each image, for each row in order."""
    prepared = made.write(folder / "prepared")
    rows: dict[str, list[tuple[int, ...]]] = {}
    for number in range(len(prepared)):
        packed = prepared.bin(number)
        rendered = render([packed], Place(0, 0, 0), made.family, made.policy)
        assert int((rendered.input_ids == made.family.image_token_id).sum()) > 0
        for image in packed.images:
            page = load_image(image["uri"])
            assert page.size == (image["width"], image["height"])
            pixels = np.asarray(page)[-10:, 3:10].reshape(-1, 3).mean(axis=0).round()
            rows.setdefault(packed.sample_ids[image["sample"]], []).append(tuple(int(value) for value in pixels))
    return [rows[name] for name in sorted(rows)]


def test_pages_of_a_pdf_are_prepared_verified_and_rendered(processors: dict[str, Any], folder: Path) -> None:
    rows = [
        {"id": "a", "text": "<image> b", "images": ["scan.pdf#page=2"]},
        {"id": "b", "text": "<image><image><image> x", "images": ["scan.pdf#pages=1-3"]},
        {"id": "c", "text": "<image> x <image>", "images": ["scan.pdf#page=3", "one.png"]},
    ]
    made = preparation(processors["qwen2_vl"], folder, rows, tiling={"pdf_dpi": 72})
    assert colors_trained(made, folder) == [COLORS[1:2], COLORS, [COLORS[2], COLORS[0]]]
    for result in made.encode(*rows, source=f"{folder}/rows.jsonl"):
        assert not isinstance(result, RejectedRow), result
        assert all(image.uri.endswith(("&dpi=72", "one.png")) for image in result.images)


def test_the_resolution_is_the_sets_then_the_jobs_and_sizes_follow(processors: dict[str, Any], folder: Path) -> None:
    row = {"text": "<image> b", "images": ["scan.pdf#page=1"]}
    for dpi, settings in (
        (150, {}), (72, {"tiling": {"pdf_dpi": 72}}), (100, {"dataset": {"pdf_dpi": 100}, "tiling": {"pdf_dpi": 72}})
    ):  # fmt: skip
        made = preparation(processors["qwen2_vl"], folder, [row], **settings)
        sample = made.sample(row, source=f"{folder}/rows.jsonl")
        assert sample.sizes == ((-(-90 * dpi // 72), -(-120 * dpi // 72)),)
    own = {"text": "<image> b", "images": ["scan.pdf#page=1&dpi=144"]}
    assert made.sample(own, source=f"{folder}/rows.jsonl").sizes == ((180, 240),)


def test_a_default_resolution_stays_out_of_the_record(processors: dict[str, Any], folder: Path) -> None:
    records = [
        preparation(processors["qwen2_vl"], folder, [], **settings).record
        for settings in ({}, {"tiling": {"pdf_dpi": 150}}, {"tiling": {"pdf_dpi": 100}}, {"dataset": {"pdf_dpi": 90}})
    ]
    assert "pdf_dpi" not in str(records[0])
    for record in records:
        del record["files"]
    assert records[0] == records[1]
    assert records[2]["tiling"]["pdf_dpi"] == 100
    assert records[3]["datasets"][0]["pdf_dpi"] == 90


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("scan.pdf#page=9", "pdf_page"), ("scan.pdf#pages=3-9", "placeholder_count"),
        ("scan.pdf#pages=x", "wrong_type"), ("scan.pdf#pages=1-1&dpi=0", "wrong_type"),
        ("scan.pdf#page=1&dpi=0", "image_missing"), ("scan.pdf#page=-1", "image_missing"),
        ("../other/scan.pdf#page=1", "image_outside_root"), ("no.pdf#page=1", "image_missing"),
        ("scan.pdf", "image_unreadable"), ("three.tif#page=7", "image_page"),
    ],
)  # fmt: skip
def test_pages_that_cannot_be_had(processors: dict[str, Any], folder: Path, name: str, reason: str) -> None:
    row = {"text": "<image> b", "images": [name]}
    made = preparation(processors["qwen2_vl"], folder, [row])
    assert made.rejected(row, source=f"{folder}/rows.jsonl").reason == reason


# ------------------------------------------------------------ frames


@pytest.mark.parametrize("name", ["three.tif", "three.gif", "three.webp"])
def test_each_frame_is_an_image_for_its_placeholder(processors: dict[str, Any], folder: Path, name: str) -> None:
    rows = [
        {"id": "a", "text": "<image><image><image> x", "images": [name]},
        {"id": "b", "text": "<image> x", "images": ["one.png"]},
    ]
    made = preparation(processors["qwen2_vl"], folder, rows, image_frames="all")
    assert colors_trained(made, folder) == [COLORS, COLORS[:1]]
    short = {"text": "<image> x", "images": [name]}
    rejected = made.rejected(short, source=f"{folder}/rows.jsonl")
    assert (rejected.reason, "3 images" in rejected.message) == ("placeholder_count", True)


@pytest.mark.parametrize("name", ["three.tif", "three.gif", "three.webp"])
def test_the_first_frame_alone_is_counted(processors: dict[str, Any], folder: Path, name: str) -> None:
    rows = [{"id": n, "text": "<image> x", "images": [image]} for n, image in enumerate([name, "one.png"])]
    made = preparation(processors["qwen2_vl"], folder, rows)
    assert colors_trained(made, folder) == [COLORS[:1], COLORS[:1]]
    facts = made.write(folder / "prepared").statistics
    assert facts["image_notes"] == {"several_frames": 1}
    assert facts["examples"]["several_frames"] == [f"{folder}/rows.jsonl:1"]
    named = {"text": "<image> x", "images": [f"{name}#page=2"]}
    assert made.sample(named, source=f"{folder}/rows.jsonl").notes == ()


def test_previews_are_no_pages(processors: dict[str, Any], tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffWriter(tmp_path / "page.tif") as tiff:
        tiff.write(np.full((40, 60), 90, np.uint8), photometric="minisblack", metadata=None)
        tiff.write(np.full((20, 30), 90, np.uint8), photometric="minisblack", subfiletype=1, metadata=None)
    row = {"text": "<image> x", "images": ["page.tif"]}
    for image_frames in ("first", "all", "reject"):
        made = preparation(processors["qwen2_vl"], tmp_path, [row], image_frames=image_frames)
        assert made.sample(row, source=f"{tmp_path}/rows.jsonl").notes == ()


def test_frames_without_a_file_are_refused(processors: dict[str, Any], folder: Path) -> None:
    row = {"text": "<image> x", "images": [{"bytes": (folder / "three.tif").read_bytes()}]}
    made = preparation(processors["qwen2_vl"], folder, [], image_frames="all")
    assert made.rejected(row).reason == "image_frames"


# ------------------------------------------------------------ pictures in the row itself


def pictures_as_text() -> list[Any]:
    file = io.BytesIO()
    Image.new("RGB", (60, 90), COLORS[1]).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    lines = "\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    return [
        f"data:image/png;base64,{text}",
        f"data:;base64,{lines}",
        text,
        {"bytes": text},
        {"bytes": text.rstrip("=")},
    ]


@pytest.mark.parametrize("number", range(5))
def test_pictures_that_the_row_holds_as_text(processors: dict[str, Any], folder: Path, number: int) -> None:
    row = {"text": "<image> x", "images": [pictures_as_text()[number]]}
    made = preparation(processors["qwen2_vl"], folder, [])
    sample = made.sample(row)
    assert sample.sizes == ((60, 90),)
    data = sample.images[0].data
    assert data is not None
    assert load_image(data).getpixel((9, 9)) == COLORS[1]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("data:image/png;base64,§§§", "no base64"), ("data:image/png,abc", "without base64"),
        ({"bytes": "no base64!"}, "no base64"), ("data:image/png;base64,aGVsbG8gd29ybGQ=", "text, which begins"),
    ],
)  # fmt: skip
def test_text_that_is_no_picture(processors: dict[str, Any], folder: Path, image: Any, words: str) -> None:
    made = preparation(processors["qwen2_vl"], folder, [])
    rejected = made.rejected({"text": "<image> x", "images": [image]})
    assert rejected.reason == "image_unreadable"
    assert words in rejected.message


def test_chats_name_pages_too(processors: dict[str, Any], folder: Path) -> None:
    made = Preparation(processors["qwen2_vl"], {"files": ("x",), "kind": "chat"}, tiling={"pdf_dpi": 72})
    row = chat("<image><image> Read.", "x", images=["scan.pdf#pages=2-3"])
    assert made.sample(row, source=f"{folder}/rows.jsonl").sizes == ((110, 120), (130, 120))


def test_a_part_of_a_message_names_one_page(processors: dict[str, Any], folder: Path) -> None:
    made = Preparation(processors["qwen2_vl"], {"files": ("x",), "kind": "chat"}, tiling={"pdf_dpi": 72})
    for name, sizes in (("scan.pdf#page=2", ((110, 120),)), ("scan.pdf#pages=1-2", None)):
        part = {"type": "image", "image": name}
        row = {
            "messages": [
                {"role": "user", "content": [part, {"type": "text", "text": "Read."}]},
                {"role": "assistant", "content": "x"},
            ]
        }
        if sizes:
            assert made.sample(row, source=f"{folder}/rows.jsonl").sizes == sizes
        else:
            rejected = made.rejected(row, source=f"{folder}/rows.jsonl")
            assert (rejected.reason, "2 pages" in rejected.message) == ("placeholder_count", True)


def test_a_local_name_may_hold_any_sign():
    """In a folder `?key=` is a part of a name; at a URI it is a secret."""
    assert image_ref("scan?key=12.png", "/scans").uri == "/scans/scan?key=12.png"
    with pytest.raises(RowError) as refused:
        image_ref("scan?key=12.png", "s3://bucket/scans")
    assert refused.value.reason == "image_credentials"
