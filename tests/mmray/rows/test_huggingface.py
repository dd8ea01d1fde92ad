"""Datasets of Hugging Face: saved ones read in place, others written once as Parquet rows."""

import io
import json
from itertools import count
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmray.errors import UserError
from mmray.rows import huggingface
from mmray.rows.files import source_files
from mmray.rows.huggingface import write_rows
from mmray.rows.plan import plan_chunks
from mmray.rows.read import RowReader
from mmray.rows.settings import DatasetSettings
from mmray.storage import Folder
from tests.mmray.preparing import PICTURES, Preparation, write_pictures

fresh_names = count()
datasets.disable_progress_bars()


def picture(width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, 60), 200).save(buffer, "PNG")
    return buffer.getvalue()


def saved(folder: Path, rows: int = 150, shards: int = 3) -> str:
    features = datasets.Features(
        {"key": datasets.Value("string"), "caption": datasets.Value("string"), "image": datasets.Image()}
    )
    content = {
        "key": [f"k{number}" for number in range(rows)],
        "caption": [f"Picture {number}" for number in range(rows)],
        "image": [{"bytes": picture(40 + number % 3), "path": None} for number in range(rows)],
    }
    datasets.Dataset.from_dict(content, features=features).save_to_disk(str(folder), num_shards=shards)
    return str(folder)


def settings_of(place: str, **options) -> dict[str, object]:
    columns = {"id": "key", "text": "caption", "images": "image"}
    return {"files": place, "kind": "pretrain", "columns": columns, "images_first": True, **options}


def rows_of(settings, chunk_rows: int = 37):
    dataset, reader = DatasetSettings(**settings), RowReader()
    chunks = plan_chunks(source_files([dataset]), window_rows=chunk_rows, chunk_rows=chunk_rows)
    return [row for chunk in reversed(chunks) for piece in chunk.pieces for row in reader.read(piece)]


def test_a_saved_dataset_is_read_in_place_by_ranges(tmp_path: Path) -> None:
    place = saved(tmp_path / "set")
    rows = sorted(rows_of(settings_of(place, format="huggingface")), key=lambda row: int(row.value["key"][1:]))
    assert [row.value["key"] for row in rows] == [f"k{number}" for number in range(150)]
    assert [row.source for row in rows] == [f"{place}:{number}" for number in range(150)]
    assert rows[4].value["image"]["bytes"] == picture(41), "as stored, not decoded"


def test_a_saved_dataset_is_prepared_and_another_one_at_its_place_is_noticed(processors, tmp_path: Path) -> None:
    place = saved(tmp_path / "set", rows=20)
    job = Preparation(processors["qwen2_vl"], settings_of(place, format="huggingface"))
    prepared = job.write(tmp_path / "prepared")
    assert prepared.statistics["rows_packed"] == 20
    assert prepared.statistics["images"] == 20
    again = Preparation(processors["qwen2_vl"], settings_of(place, format="huggingface"))
    assert again.write(tmp_path / "prepared").fingerprint == prepared.fingerprint
    saved(tmp_path / "set", rows=21)
    with pytest.raises(UserError, match="prepared from other input"):
        job.write(tmp_path / "prepared")


def test_what_is_no_saved_dataset_is_told_with_the_remedy(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"a": [1]})}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "empty").mkdir()
    for place, words in [
        (f"{tmp_path}/splits", f"holds the splits train; name one: {tmp_path}/splits/train"),
        (f"{tmp_path}/empty", "no folder of Dataset.save_to_disk"),
        (f"{tmp_path}/nowhere", "no folder of Dataset.save_to_disk"),
        ("s3://bucket/set", "from a folder that all nodes share"),
    ]:
        with pytest.raises(UserError, match=words):
            source_files([DatasetSettings(**settings_of(place, format="huggingface"))])


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """An image folder as `datasets` knows it, with captions."""
    folder = write_pictures(tmp_path / "pictures")
    lines = [json.dumps({"file_name": name, "caption": f"This is {name}"}) for name in sorted(PICTURES)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_an_image_folder_becomes_rows_with_its_pictures(image_folder: Path, processors, tmp_path: Path) -> None:
    target = str(tmp_path / "rows")
    assert write_rows(target, path="imagefolder", data_dir=str(image_folder), split="train") == len(PICTURES)
    assert Folder(target).names() == ["rows-00000.parquet", "source.json"]
    for path in image_folder.iterdir():
        path.unlink()
    columns = {"text": "caption", "images": "image"}
    dataset = {"files": f"{target}/rows-*.parquet", "kind": "pretrain", "columns": columns, "images_first": True}
    prepared = Preparation(processors["qwen2_vl"], dataset).write(tmp_path / "prepared")
    assert prepared.statistics["rows_packed"] == len(PICTURES)
    found = sorted((image["width"], image["height"]) for n in range(len(prepared)) for image in prepared.bin(n).images)
    assert found == sorted(PICTURES.values())


def test_a_stream_is_written_once_in_order_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"id": n, "text": f"row {n}"}) + "\n" for n in range(25)))
    source = {"path": "json", "data_files": str(tmp_path / "rows.jsonl"), "split": "train"}
    whole = f"memory://rows-{next(fresh_names)}"
    assert write_rows(whole, rows_per_file=10, **source) == 25

    target, tables = f"memory://rows-{next(fresh_names)}", huggingface._tables
    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "_tables", lambda stream, rows: stopping(tables(stream, rows)))
        with pytest.raises(KeyboardInterrupt):
            write_rows(target, rows_per_file=10, **source)
    assert Folder(target).names() == ["rows-00000.parquet", "source.json"]
    assert write_rows(target, rows_per_file=10, **source) == 25
    for name in ("rows-00000.parquet", "rows-00001.parquet", "rows-00002.parquet"):
        assert Folder(target).read(name) == Folder(whole).read(name)
    table = pq.read_table(io.BytesIO(Folder(target).read("rows-00002.parquet")))
    assert table["id"].to_pylist() == list(range(20, 25))

    monkeypatch.setattr(huggingface, "_stream", None)
    assert write_rows(target, rows_per_file=10, **source) == 25, "nothing to do"
    with pytest.raises(UserError, match="rows of another source"):
        write_rows(target, rows_per_file=10, **source, revision="other")


def stopping(tables):
    yield next(tables)
    raise KeyboardInterrupt


def test_a_source_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        write_rows(str(tmp_path / "rows"), path="json", data_files=str(tmp_path / "none.jsonl"), split="train")
    assert "\n" not in str(caught.value)
