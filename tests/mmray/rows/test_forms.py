"""Forms of row files: arrays, compressed files, CSV, UTF-16, Arrow, names that lie. Each is read as the rows that its
writer, a library of its own, has put into it."""

import csv
import gzip
import io
import itertools
import json
import os
import tracemalloc
import zlib
from itertools import count
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.errors import RowError, UserError
from mmray.images import image_size
from mmray.rows import records, streams
from mmray.rows.count import RowCount, count_rows
from mmray.rows.files import first_piece, source_files
from mmray.rows.plan import plan_chunks
from mmray.rows.read import RowReader, chunk_rows, read_piece
from mmray.rows.settings import DatasetSettings
from tests.mmray.oddities import ODD_ROWS, restored
from tests.mmray.preparing import Preparation, contents

fresh_names = count()
ROWS = [{"id": str(n), "text": f'row {n} \u2028 ü "quoted", [{{]}}\n second line, ' + "x" * (n % 7)} for n in range(40)]


def files_of(place: object, **options: object):
    return source_files([DatasetSettings(files=str(place), kind="pretrain", **options)])


def plan_of(place: object, rows: int = 7, **options: object):
    return plan_chunks(files_of(place, **options), window_rows=rows, chunk_rows=rows)


def values_of(place: object, rows: int = 7, **options: object) -> list:
    reader = RowReader()
    return [row.value for chunk in plan_of(place, rows, **options) for row in chunk_rows(chunk, reader)]


def as_jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows: list[dict], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_arrow(rows: list[dict] | pa.Table, new: object) -> bytes:
    sink, table = io.BytesIO(), rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    return sink.getvalue()


def as_parquet(rows: list[dict] | pa.Table) -> bytes:
    sink, table = io.BytesIO(), rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    pq.write_table(table, sink, row_group_size=9)
    return sink.getvalue()


def members(data: bytes, size: int = 900) -> bytes:
    """gzip of several members, as bgzip writes."""
    return b"".join(gzip.compress(data[at : at + size]) for at in range(0, len(data), size))


def frames(data: bytes, size: int = 900) -> bytes:
    return b"".join(zstandard.ZstdCompressor().compress(data[at : at + size]) for at in range(0, len(data), size))


LINES = as_jsonl(ROWS)
FORMS = {
    "one_line.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "marked.json": b"\xef\xbb\xbf \r\n" + json.dumps(ROWS, indent="\t").encode() + b"\n\n",
    "array.jsonl": json.dumps(ROWS, ensure_ascii=False).encode(),
    "rows.jsonl.gz": gzip.compress(LINES),
    "members.jsonl.gz": members(LINES) + b"\0" * 512,
    "rows.jsonl.zst": zstandard.ZstdCompressor().compress(LINES),
    "frames.jsonl.zst": frames(LINES),
    "array.json.gz": members(json.dumps(ROWS, indent=1).encode()),
    "rows.csv": as_csv(ROWS),
    "excel.csv": b"\xef\xbb\xbf" + as_csv(ROWS),
    "rows.tsv": as_csv(ROWS, "\t"),
    "rows.csv.gz": gzip.compress(as_csv(ROWS)),
    "le.jsonl": b"\xff\xfe" + LINES.decode().encode("utf-16-le"),
    "be.json": b"\xfe\xff" + json.dumps(ROWS, indent=1, ensure_ascii=False).encode("utf-16-be"),
    "utf16.csv": as_csv(ROWS).decode().encode("utf-16"),
    "utf16.jsonl.gz": gzip.compress(LINES.decode().encode("utf-16")),
    "rows.pq": as_parquet(ROWS),
    "rows.arrow": as_arrow(ROWS, pa.ipc.new_file),
    "stream.arrow": as_arrow(ROWS, pa.ipc.new_stream),
    # names that lie
    "parquet.jsonl": as_parquet(ROWS),
    "arrow.parquet": as_arrow(ROWS, pa.ipc.new_file),
    "lines.csv": LINES,
    "lines.json": LINES,
    "packed.jsonl": gzip.compress(LINES),
    "plain.jsonl.gz": LINES,
    "lines.parquet": LINES,
}


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://forms-{next(fresh_names)}"


def write(place: str, data: bytes) -> str:
    with fsspec.open(place, "wb") as file:
        file.write(data)
    return place


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("small", [False, True])
def test_every_form_gives_the_rows_that_were_written(name: str, small: bool, folder: str, monkeypatch) -> None:
    if small:  # blocks that end anywhere
        for module, size in ((records, "READ_BYTES"), (streams, "_COMPRESSED_BYTES"), (streams, "_DECODED_BYTES")):
            monkeypatch.setattr(module, size, 97)
        monkeypatch.setattr(streams, "ENTRY_BYTES", 300)
    place = write(f"{folder}/{name}", FORMS[name])
    for rows in (1, 7, 100):
        assert values_of(place, rows) == ROWS
    assert [len(chunk.pieces) for chunk in plan_of(place)] == [1] * 6


@pytest.mark.parametrize("name", FORMS)
def test_rows_can_be_read_from_the_middle_in_any_order(name: str, tmp_path: Path, monkeypatch) -> None:
    """As a prepare does that goes on after it was killed, and as actors do that take every second chunk."""
    monkeypatch.setattr(streams, "ENTRY_BYTES", 300)
    place = write(f"{tmp_path}/{name}", FORMS[name])
    chunks = plan_of(place)
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 97):
        reader = RowReader()
        for number in order:
            found = [row.value for row in chunk_rows(chunks[number], reader)]
            assert found == ROWS[number * 7 : number * 7 + 7]


@pytest.mark.parametrize("name", FORMS)
def test_the_first_rows_and_the_number_of_rows_of_every_form(name: str, tmp_path: Path) -> None:
    (file,) = files_of(write(f"{tmp_path}/{name}", FORMS[name]))
    assert [row.value for row in read_piece(first_piece(file, 5))] == ROWS[:5]
    assert [row.value for row in read_piece(first_piece(file, 500))] == ROWS
    assert count_rows([file], seconds=60) == RowCount(40, True)
    assert 1 <= count_rows([file], seconds=-1).rows < 200


@pytest.mark.parametrize("name", ["members.jsonl.gz", "frames.jsonl.zst", "le.jsonl"])
def test_a_file_of_several_members_is_entered_at_the_last_one_before_its_rows(
    name: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(streams, "ENTRY_BYTES", 300)
    monkeypatch.setattr(streams, "_DECODED_BYTES", 500)
    place = write(f"{tmp_path}/{name}", FORMS[name])
    last = plan_of(place)[-1].pieces[0]
    assert last.entry.place > len(FORMS[name].rstrip(b"\0")) / 3
    content = bytearray(FORMS[name])
    content[3 : last.entry.place] = bytes(last.entry.place - 3)  # of which nothing is read any more
    Path(place).write_bytes(content)
    assert [row.value for row in read_piece(last)] == ROWS[-5:]


TWO_TEXTS = pa.table([["a"], ["b"]], names=["text", "text"])
DAMAGED = {
    "cut.jsonl.gz": FORMS["rows.jsonl.gz"][:-9],
    "half.jsonl.gz": FORMS["rows.jsonl.gz"][: len(FORMS["rows.jsonl.gz"]) // 2],
    "flipped.jsonl.gz": FORMS["rows.jsonl.gz"][:200] + b"\x55\xaa" + FORMS["rows.jsonl.gz"][202:],
    "more.jsonl.gz": FORMS["rows.jsonl.gz"] + b"something else",
    "cut.jsonl.zst": FORMS["rows.jsonl.zst"][:-5],
    "cut.json": FORMS["pretty.json"][:-2],
    "half.json": FORMS["pretty.json"][: len(FORMS["pretty.json"]) // 2],
    "more.json": FORMS["pretty.json"] + b"[]",
    "comma.json": FORMS["pretty.json"].replace(b"},", b"}", 1),
    "broken.json": FORMS["pretty.json"].replace(b'"id"', b"id", 3),
    "open.csv": b'id,text\n1,"a\n2,b\n3,c\n',
    "two.csv": b"id,id\n1,2\n",
    "semicolons.csv": b"id;text\n1;a\n",
    "empty.csv": b"",
    "macintosh.csv": b"id,text\r1,a\r2,b\r",
    "odd.jsonl": FORMS["le.jsonl"][:-1],
    "nothing.jsonl.gz": b"",
    "nothing.zst": b"",
    "between-batches.arrow": FORMS["stream.arrow"][:-8],
    "joined.arrow": 2 * FORMS["stream.arrow"],
    "two.parquet": as_parquet(TWO_TEXTS),
    "two.arrow": as_arrow(TWO_TEXTS, pa.ipc.new_file),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_an_error_that_names_it_and_never_fewer_rows(name: str, folder: str) -> None:
    place = write(f"{folder}/{name}", DAMAGED[name])
    with pytest.raises(UserError, match="cannot be read as") as caught:
        plan_of(place)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"../store/part-2.jsonl", "a link that was copied as text"),
        (b"BZh91AY", "bzip2"), (b"PK\x03\x04zip", "ZIP"), (b"\xff\xfe\0\0a\0\0\0", "UTF-32"),
        (gzip.compress(FORMS["rows.pq"], mtime=0), "Parquet, compressed as a whole"),
        (gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "compressed twice"),
        (zlib.compress(b"{}"), "compressed with zlib"),
        (b"\x04\x22\x4d\x18\x64", "LZ4"), (b"\xff\x06\0\0sNaPpY", "Snappy"), (b"SQLite format 3\0", "SQLite"),
        ('{"id": "1"}'.encode("utf-16-le"), "UTF-16 without its mark"), (b"%PDF-1.7", "mmray from-pdf"),
        ("id,text".encode("utf-16-be"), "UTF-16 without its mark"), (b"\x89PNG\r\n\x1a\n", "a picture"),
    ],
)  # fmt: skip
def test_what_holds_no_rows_is_told_by_its_first_bytes(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        plan_of(write(f"{tmp_path}/rows.jsonl", content))


@pytest.mark.parametrize("content", [b"[]", b" [ \n ]\n"])
def test_an_empty_array_holds_no_rows(content: bytes, tmp_path: Path) -> None:
    assert values_of(write(f"{tmp_path}/rows.json", content)) == []


def test_a_format_that_the_job_says_is_not_overruled_in_silence(tmp_path: Path) -> None:
    place = write(f"{tmp_path}/rows.txt", FORMS["rows.pq"])
    with pytest.raises(UserError, match="is Parquet by its first bytes, and format is csv; leave format out"):
        plan_of(place, format="csv")
    assert values_of(write(f"{tmp_path}/table.txt", FORMS["rows.csv"]), format="csv") == ROWS


def test_rows_of_an_array_and_of_csv_are_rejected_one_by_one(tmp_path: Path) -> None:
    rows = values_of(
        write(f"{tmp_path}/a.json", b'[{"id": "1"}, 7, [{}], {"text": "\\ud83d"}, {"t": "\xff"}, {"t": "a\nb"}]')
    )
    assert [row if isinstance(row, dict) else row.reason for row in rows] == [
        {"id": "1"}, "bad_json", "bad_json", "not_utf8", "not_utf8", "bad_json",
    ]  # fmt: skip
    rows = values_of(write(f"{tmp_path}/a.csv", b'id,text\n1,a\n\n2,b,c\n3\n4,"a"b\n,"d ""q"""\n6,\xff\n'))
    assert [row if isinstance(row, dict) else row.reason for row in rows] == [
        {"id": "1", "text": "a"}, "bad_csv", "bad_csv", "bad_csv", {"text": 'd "q"'}, "not_utf8",
    ]  # fmt: skip


def test_a_broken_line_of_utf16_rejects_its_row_alone(tmp_path: Path) -> None:
    lines = '{"text": "a"}\n{"text": "\ud83d"}\n{"text": "😀"}\n'.encode("utf-16-le", "surrogatepass")
    first, second, third = values_of(write(f"{tmp_path}/a.jsonl", b"\xff\xfe" + lines))
    assert (first, third) == ({"text": "a"}, {"text": "😀"})
    assert isinstance(second, RowError)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_file_that_grows_a_thousandfold_is_read_in_flat_memory(pack) -> None:
    data, rows = pack(LINES[:-1].ljust(200 << 20) + b"\n"), 0
    assert len(data) < 1 << 20
    stream = streams.RowStream(io.BytesIO(data), "gzip" if pack is gzip.compress else "zstd", "utf-8")
    tracemalloc.start()
    while block := stream.read(1 << 20):
        rows += block.count(b"\n")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == 40
    assert peak < 150 << 20, "a block decoded, and copies of it; the file has 200 MB"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), min_size=1, max_size=5),
       st.sampled_from([None, 0, "\t"]), st.booleans(), st.integers(1, 4), st.sampled_from([1, 1 << 20]))  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_any_array_is_its_elements(rows, indent, is_ascii, chunk, read_bytes) -> None:
    place = f"memory://arrays-{next(fresh_names)}/rows.json"
    write(place, json.dumps(rows, indent=indent, ensure_ascii=is_ascii).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "READ_BYTES", read_bytes)
        assert values_of(place, chunk) == rows


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=6)


@given(st.lists(st.tuples(CELLS.filter(bool), CELLS), min_size=1, max_size=6), st.sampled_from(",\t"),
       st.sampled_from(["\n", "\r\n"]), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.integers(1, 4),
       st.sampled_from([1, 5, 1 << 20]))  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_any_csv_is_its_records(rows, delimiter, line, quoting, chunk, read_bytes) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=line, quoting=quoting).writerows([("id", "text"), *rows])
    place = f"memory://tables-{next(fresh_names)}/rows.{'csv' if delimiter == ',' else 'tsv'}"
    write(place, text.getvalue().encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "READ_BYTES", read_bytes)
        assert values_of(place, chunk) == [{"id": first, "text": second} for first, second in rows]


# ---- Tables ----


def test_only_columns_that_rows_are_made_of_are_read(tmp_path: Path) -> None:
    """Parquet whose other column is damaged is read all the same."""
    path = f"{tmp_path}/wide.parquet"
    table = pa.table({"id": ["a", "b"], "junk": [os.urandom(5000), os.urandom(5000)], "markdown": ["x", "y"]})
    pq.write_table(table, path, compression="none", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    content = bytearray(Path(path).read_bytes())
    content[column.data_page_offset : column.data_page_offset + 64] = b"\xff" * 64
    Path(path).write_bytes(content)
    expected = [{"id": "a", "markdown": "x"}, {"id": "b", "markdown": "y"}]
    assert values_of(path, columns={"text": "markdown"}) == expected
    with pytest.raises(UserError, match="cannot be read"):
        values_of(path, columns={"text": "junk"})


def test_rows_without_their_column_name_those_that_the_file_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "caption": ["x"]}), f"{tmp_path}/a.parquet")
    assert values_of(f"{tmp_path}/a.parquet") == [{"id": "a", "caption": "x"}]


# ---- Whole ways ----


def picture(tmp_path: Path) -> bytes:
    from PIL import Image

    Image.new("L", (60, 80), 200).save(tmp_path / "p.png")
    return (tmp_path / "p.png").read_bytes()


def test_images_as_people_name_them_are_the_rows_images(processors, tmp_path: Path) -> None:
    data, text = picture(tmp_path), "<image> a page"
    forms = [{"image": "p.png"}, {"images": "p.png"}, {"images": '["p.png"]'}, {"images": ["p.png"]}]
    (tmp_path / "rows.jsonl").write_bytes(as_jsonl([{"text": text, **form} for form in forms]))
    (tmp_path / "rows.csv").write_bytes(as_csv([{"text": text, "images": each} for each in ("p.png", '["p.png"]')]))
    (tmp_path / "text.csv").write_bytes(as_csv([{"text": "no page", "image": ""}]))
    pq.write_table(pa.table({"text": [text], "image": [data]}), tmp_path / "binary.parquet")
    pq.write_table(pa.table({"text": [text], "image": [{"bytes": data, "path": None}]}), tmp_path / "struct.parquet")
    files = [
        f"{tmp_path}/{name}" for name in ("rows.jsonl", "rows.csv", "text.csv", "binary.parquet", "struct.parquet")
    ]
    prepared = Preparation(processors["qwen2_vl"], {"files": files, "kind": "pretrain"}).write(tmp_path / "prepared")
    facts = prepared.statistics
    assert (facts["rows_packed"], facts["rows_rejected"], facts["images"]) == (9, 0, 8)
    images = [image for number in range(len(prepared)) for image in prepared.bin(number).images]
    assert sum(image["data"] == data for image in images) == 2


def test_what_is_prepared_does_not_depend_on_form_or_chunks(processors, tmp_path: Path, monkeypatch) -> None:
    """The same rows as lines, as members of gzip and as an array: the same bins, but for the names of their places."""
    from mmray.packing.settings import PackingSettings

    made = []
    for name in ("rows.jsonl", "members.jsonl.gz", "one_line.json", "rows.pq", "rows.tsv"):
        place = write(f"{tmp_path}/{name}", LINES if name == "rows.jsonl" else FORMS[name])
        for chunk in (4, 16):
            packing = PackingSettings(token_capacity=128, visual_capacity=64, window_rows=16)
            monkeypatch.setattr(PackingSettings, "chunk_rows", chunk)
            job = Preparation(processors["qwen2_vl"], {"files": place, "kind": "pretrain"}, packing=packing)
            prepared = job.write(tmp_path / f"{name}-{chunk}")
            bins = [prepared.bin(number) for number in range(len(prepared))]
            made.append([(each.input_ids.tolist(), each.sample_ids) for each in bins])
            if chunk == 16:
                files = [contents(tmp_path / f"{name}-{size}") for size in (4, 16)]
                first, second = [{k: v for k, v in each.items() if k.startswith("bins")} for each in files]
                assert first == second
    assert all(each == made[0] for each in made)


@pytest.mark.skipif(ODD_ROWS is None, reason="the shared data is not here")
def test_the_forms_that_people_have(processors, tmp_path: Path) -> None:
    cases = {
        "array_one_line/r.json": (2, 2), "array_pretty/r.json": (2, 2),
        "hfcache/hub/datasets--me--pages/snapshots/*/train.jsonl": (1, 1),
    }  # fmt: skip
    for number, (name, (rows, images)) in enumerate(cases.items()):
        case = name.split("/")[0]
        root = restored(case, tmp_path / str(number))
        settings = {"files": f"{root.parent}/{name}", "kind": "pretrain"}
        facts = Preparation(processors["qwen2_vl"], settings).write(tmp_path / f"{number}-prepared").statistics
        assert (facts["rows_packed"], facts["rows_rejected"], facts["images"]) == (rows, 0, images), name
    settings = {"files": f"{ODD_ROWS}/llava/rows.jsonl", "kind": "chat"}
    facts = Preparation(processors["qwen2_vl"], settings).write(tmp_path / "llava").statistics
    assert (facts["rows_packed"], facts["rows_rejected"], facts["images"]) == (2, 0, 1)


def hub(tmp_path: Path, repository: str = "datasets--me--pages") -> Path:
    """A repository in the hub's cache; returns the folder of its snapshot."""
    root = tmp_path / "hub" / repository
    snapshot = root / "snapshots/abc"
    (snapshot / "images").mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "blobs/sha1").write_bytes(picture(tmp_path))
    (snapshot / "images/p.png").symlink_to("../../../blobs/sha1")
    return snapshot


def test_links_of_the_hubs_cache_lead_to_blobs_of_their_own_repository_alone(tmp_path: Path) -> None:
    from mmray.rows.image_refs import image_refs

    snapshot = hub(tmp_path)
    root = snapshot.parents[1]
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "hub/datasets--other/blobs").mkdir(parents=True)
    (tmp_path / "hub/datasets--other/blobs/sha9").write_bytes(b"x")
    (root / "blobs/way-out").symlink_to(tmp_path / "secret.png")
    (root / "blobs/deeper").mkdir()
    (root / "blobs/deeper/x").write_bytes(b"x")
    (root / "elsewhere").write_bytes(b"x")
    targets = {
        "other-repository": tmp_path / "hub/datasets--other/blobs/sha9", "outside": tmp_path / "secret.png",
        "chain": root / "blobs/way-out", "deeper": root / "blobs/deeper/x", "beside": root / "elsewhere",
    }  # fmt: skip
    for name, target in targets.items():
        (snapshot / f"{name}.png").symlink_to(target)
    (snapshot / "folder").symlink_to(root / "blobs")

    def read(name: str, **options: str) -> str:
        dataset = DatasetSettings(files="x", kind="pretrain", **options)
        (ref,) = image_refs({"images": [name]}, f"{snapshot}/rows.jsonl:1", dataset)
        return ref.uri

    assert image_size(read("images/p.png")) == (60, 80)
    assert image_size(read("p.png", image_root=f"{snapshot}/images")) == (60, 80)
    for name in [*(f"{name}.png" for name in targets), "folder/sha1", "../../blobs/sha1"]:
        with pytest.raises(RowError, match="image_outside_root"):
            read(name)
    with pytest.raises(RowError, match="image_outside_root"):
        read(f"{snapshot}/images/p.png", image_root=str(tmp_path / "elsewhere"))
    plain = hub(tmp_path / "plain", "pages")  # no repository of the hub by its name
    with pytest.raises(RowError, match="image_outside_root"):
        read(f"{plain}/images/p.png", image_root=str(plain))
