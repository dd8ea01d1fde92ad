"""WebDataset shards as rows: by key, images by their bytes in the shard, and no damage without a reason."""

import io
import json
import os
import tarfile
from itertools import count
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmray.errors import RowError, UserError
from mmray.images import image_size, load_image
from mmray.images.size_cache import SizeCache, read_sizes
from mmray.images.tar_member import PartOfFile
from mmray.rows.files import first_piece, source_files
from mmray.rows.plan import plan_chunks
from mmray.rows.read import read_piece
from mmray.rows.settings import DatasetSettings
from tests.mmray.oddities import ODD_ROWS
from tests.mmray.pdfs import pdf_of
from tests.mmray.preparing import Preparation

fresh_names = count()
SIZES = {"a": (170, 220), "b": (220, 170), "c": (40, 60)}


def picture(name: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", SIZES[name], 200).save(buffer, "PNG")
    return buffer.getvalue()


A, B, C = (picture(name) for name in SIZES)


def shard(*members: tuple[str, bytes | str | None], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar. Content None: a folder; a string that begins with ->: a link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            data = content.encode() if isinstance(content, str) else content or b""
            if content is None:
                info.type = tarfile.DIRTYPE
            elif data.startswith(b"->"):
                info.type, info.linkname, data = tarfile.SYMTYPE, data[2:].decode(), b""
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write(place: Path | str, content: bytes) -> str:
    with fsspec.open(str(place), "wb") as file:
        file.write(content)
    return str(place)


def rows_of(place: str, chunk_rows: int = 100, **options):
    dataset = DatasetSettings(files=place, kind="pretrain", **options)
    chunks = plan_chunks(source_files([dataset]), window_rows=chunk_rows, chunk_rows=chunk_rows)
    rows = [row for chunk in chunks for piece in chunk.pieces for row in read_piece(piece)]
    assert len(rows) == sum(chunk.num_rows for chunk in chunks), "a row for each row of the plan"
    return rows


def values_of(place: str, **options):
    """The rows; images as (name, size)."""
    return [shown(row.value) for row in rows_of(place, **options)]


def shown(value):
    if isinstance(value, RowError):
        return value.reason
    names = [PartOfFile.written(image.uri).name if hasattr(image, "uri") else image for image in value["images"]]
    return {**value, "images": names}


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path) -> str:
    return str(tmp_path / "s-0.tar") if request.param == "local" else f"memory://shards-{next(fresh_names)}/s-0.tar"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_consecutive_members_of_a_key_are_a_row(place: str, format: int) -> None:
    long = "x" * 90
    content = shard(
        ("pages", None), ("README", "no ending"), ("pages/.hidden", "x"),
        ("pages/a.png", A), ("pages/a.txt", "Text of a"), ("pages/a.cls", "7"),
        ("pages/b.0.png", B), ("pages/b.1.PNG", C), ("pages/b.json", json.dumps({"id": "own", "text": "Two", "n": 1})),
        (f"{long}.png", C), (f"{long}.txt", "A long name"),
        ("c.json", '{"text": "No image"}'),
        format=format,
    )  # fmt: skip
    write(place, content)
    assert values_of(place) == [
        {"id": "s-0.tar/pages/a", "text": "Text of a", "images": ["a.png"]},
        {"id": "own", "text": "Two", "n": 1, "images": ["b.0.png", "b.1.PNG"]},
        {"id": f"s-0.tar/{long}", "text": "A long name", "images": [f"{long}.png"]},
        {"id": "s-0.tar/c", "text": "No image", "images": []},
    ]
    assert [row.source for row in rows_of(place)] == [
        f"{place.replace('memory://', 'memory:///')}:{number}" for number in range(4)
    ]


def test_an_image_is_read_from_its_bytes_in_the_shard(place: str) -> None:
    write(place, shard(("a.txt", "A"), ("a.png", A), ("b.png", B), ("b.txt", "B")))
    (first,), (second,) = (row.value["images"] for row in rows_of(place))
    assert (image_size(first.uri), image_size(second.uri)) == (SIZES["a"], SIZES["b"])
    assert load_image(second.uri).size == SIZES["b"]
    sizes = SizeCache(read_sizes(f"memory://no-sizes-{next(fresh_names)}"))
    assert sizes.image_size(first.uri) == SIZES["a"]
    assert sizes.image_size(second.uri) == SIZES["b"]
    assert len(sizes.take_new()) == 2, "each part is an image of its own"


def test_json_may_name_its_images_by_ending_or_member_and_others_outside(place: str) -> None:
    named = {"pics": ["1.png", "k.0.png", "in/k.1.png", "elsewhere.png", 7], "caption": "x", "key": 5}
    write(place, shard(("in/k.0.png", A), ("in/k.1.png", B), ("in/k.json", json.dumps(named))))
    (row,) = rows_of(place, columns={"images": "pics", "text": "caption", "id": "key"})
    found = row.value["pics"]
    assert [image_size(image.uri) for image in found[:3]] == [SIZES["b"], SIZES["a"], SIZES["b"]]
    assert found[3:] == ["elsewhere.png", 7]
    assert (row.value["caption"], row.value["key"]) == ("x", 5)


def test_a_text_stands_beside_json_that_has_none(place: str) -> None:
    write(
        place,
        shard(("a.json", '{"lang": "en"}'), ("a.txt", "\ufeffText"), ("b.json", '{"text": "own"}'), ("b.txt", "x")),
    )
    assert [value["text"] for value in values_of(place)] == ["Text", "own"]


@pytest.mark.parametrize(
    ("members", "reason", "words"),
    [
        ([("a.png", A), ("a.cls", "1")], "missing_column", "no .json and no .txt; its members are a.png, a.cls"),
        ([("a.txt", "1"), ("a.txt", "2")], "bad_tar", "'a.txt' is there twice"),
        ([("a.txt", "1"), ("a.png", "->b.png")], "bad_tar", "'a.png' is a link"),
        ([("a.txt", b"\xff\xfe"), ("a.png", A)], "not_utf8", "byte 0 of 'a.txt' is not UTF-8"),
        ([("a.json", "{")], "bad_json", "is not JSON"),
        ([("a.json", "[1]")], "bad_json", "must be a JSON object"),
    ],
)
def test_a_bad_sample_is_one_rejected_row(place: str, members, reason: str, words: str) -> None:
    write(place, shard(("0.txt", "good"), *members, ("z.txt", "good")))
    first, bad, last = rows_of(place)
    assert (first.value["text"], last.value["text"]) == ("good", "good")
    assert bad.value.reason == reason
    assert words in bad.value.message


def test_behind_a_damaged_header_the_rest_is_one_row_and_none_is_lost_in_silence(place: str) -> None:
    content = bytearray(shard(*((f"{number}.txt", f"text {number}") for number in range(9))))
    at = 4 * 1024
    content[at : at + 8] = b"\xff" * 8
    write(place, bytes(content))
    rows = rows_of(place)
    assert [row.value["text"] for row in rows[:3]] == ["text 0", "text 1", "text 2"]
    assert len(rows) == 4
    assert rows[3].value.reason == "bad_tar"
    assert f"byte {at} of the shard" in rows[3].value.message


@pytest.mark.parametrize("content", [b"", b"no tar at all, but long enough for a header" * 40])
def test_what_is_no_tar_is_a_rejected_row(place: str, content: bytes) -> None:
    write(place, content)
    (row,) = rows_of(place)
    assert row.value.reason == "bad_tar"


def test_an_empty_shard_has_no_rows(place: str) -> None:
    write(place, shard())
    assert rows_of(place) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (shard(("a.txt", "A"), ("b.txt", "B"))[:2048], "byte 2048 of the shard: the mark of the archive's end"),
        (
            shard(("a.txt", "A"), ("b.txt", "B")) + shard(("c.txt", "C")),
            "byte 2048 of the shard: the archive ends here",
        ),
    ],
    ids=["cut off", "joined"],
)
def test_a_shard_that_may_lack_something_says_so_in_its_last_row(place: str, content: bytes, words: str) -> None:
    write(place, content)
    first, last = rows_of(place)
    assert first.value["text"] == "A"
    assert last.value.reason == "bad_tar"
    assert words in last.value.message


@given(st.integers(0, 100), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_a_shard_cut_anywhere_gives_whole_rows_and_one_reason(cut: int, chunk_rows: int) -> None:
    members = [(f"{number}.{ending}", data) for number in range(4) for ending, data in (("txt", "T" * 700), ("png", A))]
    content = shard(*members)
    stop, end = len(content) * cut // 100, len(content.rstrip(b"\0")) // 512 * 512 + 1024
    place = write(f"memory://cut-{next(fresh_names)}/s.tar", content[:stop])
    rows = rows_of(place, chunk_rows)
    good = [row.value for row in rows if not isinstance(row.value, RowError)]
    assert [value["id"] for value in good] == [f"s.tar/{number}" for number in range(len(good))]
    for value in good:
        assert value["text"] == "T" * 700
        (image,) = value["images"]
        assert load_image(image.uri).size == SIZES["a"]
    assert len(rows) - len(good) == (len(good) < 4 or stop < end)


@given(st.lists(st.integers(1, 3), max_size=12), st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_pieces_give_the_rows_of_the_whole(members: list[int], chunk_rows: int) -> None:
    entries = [("notes", None)] + [
        (f"{row}.{number}.txt" if number else f"{row}.txt", f"{row}")
        for row, each in enumerate(members)
        for number in range(each)
    ]
    place = write(f"memory://pieces-{next(fresh_names)}/s.tar", shard(*entries))
    assert [value["text"] for value in values_of(place, chunk_rows=chunk_rows)] == [str(n) for n in range(len(members))]


def test_the_first_rows_of_a_shard_alone(tmp_path: Path) -> None:
    write(tmp_path / "s.tar", shard(*((f"{key}.txt", "<image>") for key in "abc")))
    (file,) = source_files([DatasetSettings(files=(f"{tmp_path}/s.tar",), kind="pretrain")])
    for most, ids in ((2, ["s.tar/a", "s.tar/b"]), (3, ["s.tar/a", "s.tar/b", "s.tar/c"]), (9, None)):
        piece = first_piece(file, most)
        assert piece.num_rows == min(most, 3)
        assert ids is None or [row.value["id"] for row in read_piece(piece)] == ids


def test_a_shard_is_named_as_one(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", b"{}\n")
    with pytest.raises(UserError, match=r"ends with \.tar"):
        rows_of(str(tmp_path / "rows.jsonl"), format="webdataset")
    write(tmp_path / "s.tar", shard(("a.txt", "A")))
    with pytest.raises(UserError, match=r"ends with \.tar"):
        rows_of(str(tmp_path / "s.tar"), format="jsonl")
    write(tmp_path / "s.tar.gz", b"")
    with pytest.raises(UserError, match="decompress"):
        rows_of(str(tmp_path / "s.tar.gz"))


def test_shards_are_prepared_and_train_without_their_pictures_stored_twice(processors, tmp_path: Path) -> None:
    place = write(tmp_path / "s.tar", shard(
        ("a.png", A), ("a.txt", "Page a"), ("b.png", B), ("b.txt", "Look: <image>"), ("c.png", b"no image"),
        ("c.txt", "Page c"), ("d.txt", "Only text"), ("e.0.png", C), ("e.1.png", C), ("e.txt", "Two"),
    ))  # fmt: skip
    job = Preparation(processors["qwen2_vl"], {"files": place, "kind": "pretrain", "images_first": True})
    prepared = job.write(tmp_path / "prepared")
    assert prepared.statistics["rows_read"] == 5
    assert prepared.statistics["rejected_by_reason"] == {"image_unreadable": 1}
    (message,) = prepared.rejected()["message"].to_pylist()
    assert f"{place}#c.png@" in message, "file and member"
    images = [image for index in range(len(prepared)) for image in prepared.bin(index).images]
    assert sorted((image["width"], image["height"]) for image in images) == sorted(
        [SIZES["a"], SIZES["b"], SIZES["c"], SIZES["c"]]
    )
    assert all(image["data"] is None and load_image(image["uri"]).size for image in images)
    texts = {value["id"]: value for value in values_of(place)}
    assert texts["s.tar/b"]["text"] == "Look: <image>"


@pytest.mark.parametrize("text", ["/x/s.tar", "/x/#a@1+2", "/x/s.tar#a@1", "/x/s.tar#a@-1+2", "/x/s.tar.gz#a@1+2"])
def test_what_names_no_part_is_a_whole_file(text: str) -> None:
    assert PartOfFile.written(text) is None


@pytest.mark.parametrize("file", ["/x/s.tar", "s3://b/k#1.tar"])
@pytest.mark.parametrize("name", ["a.jpg", "a#b@1+2.jpg", "ä b.jpg", ""])
def test_a_part_is_written_and_read_back(file: str, name: str) -> None:
    part = PartOfFile(file, name, 1536, 20481)
    assert PartOfFile.written(str(part)) == part


def test_a_part_reads_as_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(bytes(range(200)))
    for block in (1, 7, 4096):
        with PartOfFile(str(tmp_path / "x.tar"), "n", 50, 20).open_local(block) as file:
            assert file.read() == bytes(range(50, 70))
            assert file.seek(-3, os.SEEK_END) == 17
            assert file.read(10) == bytes([67, 68, 69])
            assert file.seek(5) == 5
            assert file.read(2) == bytes([55, 56])
            assert file.seek(40) == 40
            assert file.read() == b""


def test_a_shard_that_is_gone_is_a_missing_image(tmp_path: Path) -> None:
    for place in (f"{tmp_path}/gone.tar", f"memory://gone-{next(fresh_names)}/s.tar"):
        with pytest.raises(RowError, match="image_missing"):
            image_size(f"{place}#a.png@512+100")


# ---- Orders that people have ----


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_a_key_that_comes_back_refuses_every_row_of_it_and_no_other(place: str, chunk_rows: int) -> None:
    write(
        place,
        shard(
            ("0.png", A), ("1.png", B), ("1.txt", "One"), ("2.png", C), ("0.txt", "Nought"), ("3.txt", "Three"),
            ("2.txt", "Two"), ("0.json", "{}"),
        ),
    )  # fmt: skip
    rows = rows_of(place, chunk_rows)
    assert [row.value.reason if isinstance(row.value, RowError) else row.value["text"] for row in rows] == [
        "bad_tar", "One", "bad_tar", "bad_tar", "Three", "bad_tar", "bad_tar",
    ]  # fmt: skip
    assert "key '0' stands in several places of the shard" in rows[0].value.message


def test_numbered_images_are_taken_by_number_and_that_is_noted(place: str) -> None:
    numbers = ["0", "1", "10", "11", "2", "9"]
    write(
        place,
        shard(
            *((f"a.{number}.png", B) for number in numbers), ("a.txt", "A"),
            *((f"b.page-{number}.png", B) for number in numbers), ("b.txt", "B"),
            ("c.0.png", A), ("c.1.png", A), ("c.txt", "C"),
            *((f"d.{number}.png", B) for number in numbers), ("d.json", '{"text": "D", "images": ["10.png", "2.png"]}'),
            *((f"e.{number}.png", B) for number in numbers), ("e.main.png", B), ("e.txt", "E"),
            ("f.0.png", A), ("f.1.png", A), ("f.main.png", A), ("f.txt", "F"),
        ),
    )  # fmt: skip
    rows = rows_of(place)
    names = [None if isinstance(row.value, RowError) else shown(row.value)["images"] for row in rows]
    assert names == [
        [f"a.{number}.png" for number in (0, 1, 2, 9, 10, 11)],
        [f"b.page-{number}.png" for number in (0, 1, 2, 9, 10, 11)],
        ["c.0.png", "c.1.png"],
        ["d.10.png", "d.2.png"],
        None,
        ["f.0.png", "f.1.png", "f.main.png"],
    ]
    assert [row.notes for row in rows] == [("image_order",), ("image_order",), (), (), (), ()]
    assert "neither stored in the order of their numbers nor all numbered alike" in rows[4].value.message


def test_members_are_chosen_and_the_others_are_nothing(place: str) -> None:
    write(
        place,
        shard(
            ("a.jpg", A), ("a.png", B), ("a.mask.png", C), ("a.caption.txt", "A"), ("a.old.txt", "x"),
            ("b.0.JPG", A), ("b.1.jpg", B), ("b.caption.txt", "B"), ("b.meta.json", '{"n": 1}'),
        ),
    )  # fmt: skip
    chosen = ["jpg", "*.jpg", "caption.txt"]
    assert values_of(place, members=chosen) == [
        {"id": "s-0.tar/a", "text": "A", "images": ["a.jpg"]},
        {"id": "s-0.tar/b", "text": "B", "images": ["b.0.JPG", "b.1.jpg"]},
    ]
    assert values_of(place, members=[*chosen, "meta.json"])[1]["n"] == 1
    assert values_of(place, members=["jpg", "*.txt"])[0] == "bad_tar", "two texts are chosen"
    with pytest.raises(UserError, match=r"'webp' chooses no member of the shards .* their endings are .*mask\.png"):
        rows_of(place, members=[*chosen, "webp"])


def test_members_are_of_shards_alone(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", b"{}\n")
    with pytest.raises(UserError, match="leave members out"):
        rows_of(str(tmp_path / "rows.jsonl"), members="jpg")


def test_a_text_whose_picture_is_missing_is_counted_with_its_place(processors, tmp_path: Path) -> None:
    place = write(tmp_path / "s.tar", shard(
        ("a.png", A), ("a.txt", "Page a"), ("b.txt", "No picture"), ("c.0.png", C), ("c.10.png", C), ("c.9.png", C),
        ("c.txt", "Three"), ("d.json", '{"text": "Said", "images": []}'), ("e.json", '{"text": "Unsaid"}'),
    ))  # fmt: skip
    job = Preparation(processors["qwen2_vl"], {"files": place, "kind": "pretrain", "images_first": True})
    facts = job.write(tmp_path / "prepared").statistics
    assert facts["rows_packed"] == 5
    assert facts["image_notes"] == {"image_order": 1, "missing_image": 2}
    assert facts["examples"]["missing_image"] == [f"{place}:1", f"{place}:4"]


def test_pages_of_a_pdf_in_a_shard_are_named_by_its_json(processors, tmp_path: Path) -> None:
    pages = [{"points": (90, 120)}, {"points": (60, 40)}, {"points": (30, 30)}]
    pdf = Path(pdf_of(tmp_path / "scan.pdf", pages)).read_bytes()
    place = write(tmp_path / "s.tar", shard(
        ("a.pdf", pdf), ("a.json", '{"text": "<image> two", "images": ["a.pdf#page=2"]}'),
        ("b.pdf", pdf), ("b.json", '{"text": "<image><image> two", "images": ["pdf#pages=2-3"]}'),
    ))  # fmt: skip
    job = Preparation(processors["qwen2_vl"], {"files": place, "kind": "pretrain"}, tiling={"pdf_dpi": 72})
    prepared = job.write(tmp_path / "prepared")
    images = [image for packed in prepared.bins(0, len(prepared)) for image in packed.images]
    assert sorted((image["width"], image["height"]) for image in images) == [(30, 30), (60, 40), (60, 40)]
    assert all(load_image(image["uri"]).size == (image["width"], image["height"]) for image in images)


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.pdf", "a.pdf is a PDF; name pages in the sample's JSON"), ("a.jxl", "a.jxl is a picture that cannot be read")],
)
def test_a_picture_of_another_kind_is_not_left_out_in_silence(place: str, name: str, words: str) -> None:
    write(place, shard((name, b"?"), ("a.txt", "one"), ("b.png", A), ("b.svg", b"?"), ("b.txt", "two")))
    first, second = rows_of(place)
    assert isinstance(first.value, RowError)
    assert words in first.value.message
    assert shown(second.value)["images"] == ["b.png"]
    assert [row.notes for row in rows_of(place, members=["txt", "png"])] == [("missing_image",), ()]


@pytest.mark.skipif(ODD_ROWS is None, reason="the shared data is not here")
def test_the_shards_that_people_have(tmp_path: Path) -> None:
    assert values_of(str(ODD_ROWS / "unsorted/s-0000.tar")) == ["bad_tar"] * 4
    rows = rows_of(str(ODD_ROWS / "missing/s-0000.tar"))
    assert [isinstance(row.value, RowError) or len(row.value["images"]) for row in rows] == [True, 1, 0]
    assert [row.notes for row in rows] == [(), (), ("missing_image",)]
    (row,) = rows_of(str(ODD_ROWS / "tenth/s-0000.tar"))
    assert shown(row.value)["images"] == [f"0001.{number}.png" for number in range(12)]
    assert row.notes == ("image_order",)


def test_a_member_whose_bytes_are_stored_with_holes_is_refused(place: str) -> None:
    """`tar --sparse` stores a file's bytes without its zeros, so the range of the shard is not the file."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, kind in (("a.txt", tarfile.GNUTYPE_SPARSE), ("b.txt", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, 4
            archive.addfile(member, io.BytesIO(b"text"))
    write(place, content.getvalue())
    bad, good = rows_of(place)
    assert "is stored sparse; run tar without --sparse" in bad.value.message
    assert good.value["text"] == "text"
