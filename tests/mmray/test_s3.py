"""S3 as a folder of rows, images, prepared datasets and caches, against a real server."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmray.errors import RowError, UserError
from mmray.images import image_size, load_image
from mmray.images.size_cache import SizeCache, merge_sizes, read_sizes
from mmray.prepared import PreparedDataset
from mmray.rows.files import source_files
from mmray.rows.from_pdf import write_pdf_rows
from mmray.rows.settings import DatasetSettings
from mmray.storage import Folder, file_system
from tests.mmray.pdfs import pdf_of
from tests.mmray.preparing import Preparation, write_pictures, write_rows
from tests.s3 import PORT, SECRET

ROWS = [
    {"id": f"row {number}", "text": f"<image>\nPage {number}", "images": [name]}
    for number, name in enumerate(["page.png", "wide.png", "small.png", "nowhere.png", "page.png"])
]


@pytest.fixture
def pictures(bucket: str, tmp_path: Path) -> str:
    """A folder in the bucket with pictures and rows."""
    target = f"{bucket}/{tmp_path.name}"
    for path in write_pictures(tmp_path / "pictures").iterdir():
        Folder(target).write(path.name, path.read_bytes())
    write_rows(f"{target}/rows.jsonl", ROWS)
    return target


def test_a_folder_of_thousands_of_files_is_listed_whole_and_cleared(bucket: str) -> None:
    folder = Folder(f"{bucket}/many")
    folder.create()
    assert folder.names() == []
    names = [f"part-{number:05d}" for number in range(1100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: folder.write(name, b"1"), names))
    folder.write("deeper/one", b"12")
    assert folder.names() == ["deeper", *names]
    folder.remove_files(names[1:])
    assert folder.sizes() == {"deeper": 0, "part-00000": 1}
    folder.remove("part-00000")
    folder.remove()
    assert not folder.exists()


def test_what_another_machine_writes_or_removes_is_seen_at_once(bucket: str) -> None:
    folder, other = Folder(f"{bucket}/shared"), fsspec.filesystem("s3", skip_instance_cache=True)
    folder.write("one", b"1")
    assert folder.names() == ["one"]
    other.pipe_file(folder.path("two"), b"22")
    assert folder.sizes() == {"one": 1, "two": 2}
    other.rm_file(folder.path("one"))
    assert not folder.exists("one")
    assert folder.names() == ["two"]
    other.pipe_file(folder.path("two"), b"other")
    assert folder.read("two") == b"other"


def test_a_large_file_is_sent_in_parts_and_is_whole(bucket: str) -> None:
    folder, content = Folder(f"{bucket}/large"), bytes(range(256)) * (110 << 12)
    with folder.writing("one") as file:
        file.write(content)
    assert "-" in file_system(f"{bucket}/large/one")[0].info(folder.path("one"))["ETag"], "an upload in parts"
    with folder.open("one") as file:
        file.seek(len(content) - 5)
        assert file.read() == content[-5:]
    assert folder.sizes() == {"one": len(content)}
    with pytest.raises(TypeError), folder.writing("one") as file:
        file.write("half")
    assert folder.sizes() == {"one": len(content)}


def test_images_are_measured_and_read_and_a_missing_one_rejects_its_row(pictures: str) -> None:
    assert image_size(f"{pictures}/page.png") == (170, 220)
    assert load_image(f"{pictures}/page.png").getpixel((0, 0)) == (200, 200, 200)
    with pytest.raises(RowError, match="image_missing"):
        image_size(f"{pictures}/nowhere.png")


def test_a_prepare_from_s3_to_s3_equals_the_local_one(pictures: str, processors, tmp_path: Path) -> None:
    local = write_rows(write_pictures(tmp_path / "local") / "rows.jsonl", ROWS)
    expected = Preparation(processors["qwen2_vl"], {"files": local, "kind": "pretrain"}).write(tmp_path / "prepared")
    job = Preparation(processors["qwen2_vl"], {"files": f"{pictures}/*.jsonl", "kind": "pretrain"})
    found = job.write(f"{pictures}/prepared")
    assert found.statistics == expected.statistics
    assert found.statistics["rejected_by_reason"] == {"image_missing": 1}
    for number, each in enumerate(expected.bin(index) for index in range(len(expected))):
        ours = found.bin(number)
        assert ours.input_ids.tolist() == each.input_ids.tolist()
        assert [image["uri"] for image in ours.images] == [
            image["uri"].replace(str(tmp_path / "local"), pictures) for image in each.images
        ]
    assert Folder(f"{pictures}/prepared").names() == sorted(
        ["manifest.json", "rejected.parquet", *(shard["file"] for shard in found.manifest["shards"])]
    )
    again = job.write(f"{pictures}/prepared")
    assert again.fingerprint == found.fingerprint
    write_rows(f"{pictures}/rows.jsonl", ROWS[:3])
    with pytest.raises(UserError, match="prepared from other input"):
        job.write(f"{pictures}/prepared")
    assert len(PreparedDataset(f"{pictures}/prepared").rejected()) == 1


def test_pages_of_pdfs_in_s3_equal_local_ones(bucket: str, processors, tmp_path: Path) -> None:
    """Rows that `mmray from-pdf` writes for both: sizes, reasons and pixels."""
    folder = f"{bucket}/{tmp_path.name}-pdfs"
    documents = {
        "a.pdf": Path(pdf_of(tmp_path / "a.pdf", [{"points": (90, 120)}, {"points": (60, 40), "color": (0, 0, 255)}])),
        "b.pdf": Path(pdf_of(tmp_path / "b.pdf", [{"points": (40, 90)}])),
    }
    for name, path in documents.items():
        Folder(folder).write(name, path.read_bytes())
    Folder(folder).write("damaged.pdf", documents["a.pdf"].read_bytes()[:300])
    write_pdf_rows([f"{folder}/*.pdf"], str(tmp_path / "far.jsonl"))
    write_pdf_rows([str(path) for path in documents.values()], str(tmp_path / "near.jsonl"))
    gone = {"id": "gone", "text": "<image>", "images": [f"{folder}/gone.pdf#page=1"]}
    with (tmp_path / "far.jsonl").open("a") as file:
        file.write(json.dumps(gone) + "\n")
    shown = []
    for name in ("near", "far"):
        rows = {"files": f"{tmp_path}/{name}.jsonl", "kind": "pretrain"}
        job = Preparation(processors["qwen2_vl"], rows, tiling={"pdf_dpi": 72}, max_rejected_share=1)
        prepared = job.write(tmp_path / name)
        images = [image for packed in prepared.bins(0, len(prepared)) for image in packed.images]
        shown.append(sorted((image["width"], image["height"], load_image(image["uri"]).tobytes()) for image in images))
    assert shown[0] == shown[1]
    assert len(shown[0]) == 3
    assert prepared.statistics["rejected_by_reason"] == {"image_missing": 1}


def test_rows_in_parquet_files_are_read_by_ranges(bucket: str, processors) -> None:
    uri = f"{bucket}/rows/one.parquet"
    table = pa.table({"id": [str(number) for number in range(500)], "text": [f"Row {n}" for n in range(500)]})
    with fsspec.open(uri, "wb") as file:
        pq.write_table(table, file, row_group_size=70)
    job = Preparation(processors["qwen2_vl"], {"files": f"{bucket}/rows/*", "kind": "pretrain"})
    rows = [row for _, results in job.windows() for row in results]
    assert [row.id for row in rows] == table["id"].to_pylist()


def test_sizes_are_kept_in_s3_and_go_by_etags(pictures: str) -> None:
    cache = SizeCache(read_sizes(f"{pictures}/sizes"))
    assert cache.image_size(f"{pictures}/page.png") == (170, 220)
    assert merge_sizes(f"{pictures}/sizes", [cache.take_new()]) == 1
    known = SizeCache(read_sizes(f"{pictures}/sizes"))
    assert known.image_size(f"{pictures}/page.png") == (170, 220)
    assert len(known.take_new()) == 0
    Folder(pictures).write("page.png", Folder(pictures).read("wide.png"))
    assert known.image_size(f"{pictures}/page.png") == (220, 170)


@pytest.mark.parametrize("place", ["s3://no-such-bucket-of-ours/rows.jsonl", "s3://no-such-bucket-of-ours/*.jsonl"])
def test_a_bucket_that_is_not_there_is_one_line(s3_server: None, place: str) -> None:
    with pytest.raises(UserError, match="no-such-bucket-of-ours") as caught:
        source_files([DatasetSettings(files=place, kind="pretrain")])
    assert "\n" not in str(caught.value)


NO_CREDENTIALS = """
import json, sys
from mmray.errors import UserError
from mmray.images import image_size
from mmray.rows.files import source_files
from mmray.rows.from_pdf import write_pdf_rows
from mmray.rows.settings import DatasetSettings
from mmray.storage import Folder
for step in (
    lambda: source_files([DatasetSettings(files=sys.argv[1] + "/rows.jsonl", kind="pretrain")]),
    lambda: Folder(sys.argv[1]).names(),
    lambda: image_size(sys.argv[1] + "/page.png"),
):
    try:
        step()
        print("nothing was raised")
    except (UserError, ConnectionError) as error:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "UserError .*give credentials to every node"),
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"}, "(UserError|ConnectionError) .*127.0.0.1:1"),
    ],
    ids=["no credentials", "no server"],
)
def test_what_a_store_refuses_is_one_line_and_rejects_no_row(
    pictures: str, tmp_path: Path, environment: dict[str, str], expected: str
) -> None:
    variables = {**os.environ, "HOME": str(tmp_path), **environment}
    variables = {key: value for key, value in variables.items() if value}
    done = subprocess.run(
        [sys.executable, "-c", NO_CREDENTIALS, pictures], env=variables, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout + done.stderr
    assert all(re.match(expected, line) for line in lines), lines


def test_secrets_stand_in_no_prepared_dataset(pictures: str, processors) -> None:
    made = Preparation(processors["qwen2_vl"], {"files": f"{pictures}/*.jsonl", "kind": "pretrain"})
    made.write(f"{pictures}/prepared")
    folder = Folder(f"{pictures}/prepared")
    assert "mmray-tests" not in json.dumps(json.loads(folder.read("manifest.json")))
    assert all(SECRET.encode() not in folder.read(name) for name in folder.names())
    assert f"127.0.0.1:{PORT}" not in folder.read("manifest.json").decode()
