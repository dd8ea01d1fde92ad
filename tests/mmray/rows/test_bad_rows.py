"""Every kind of bad row that is known, one at a time among good ones: prepared into a dataset, it is set aside alone,
with its reason and a message that names what is wrong, and the accounting balances."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmray.packing.settings import PackingSettings
from mmray.prepared import PreparedDataset
from tests.mmray.pdfs import ENCRYPTED, pdf_of
from tests.mmray.preparing import Preparation, chat
from tests.mmray.reasons import reasons_in_code

PACKING = PackingSettings(token_capacity=900, visual_capacity=600, window_rows=2)
GOOD = {
    "pretrain": {"text": "<image> good", "images": ["page.png"]},
    "chat": chat("<image>Read.", "Good.", images=["page.png"]),
    "tokenized": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
}
ROOT = "/nowhere"  # stands for the folder of the images


class Bad(NamedTuple):
    """A bad row: its kind, its line (or fields, written as JSON), and the reason and words it is rejected with."""

    kind: str
    row: Any
    reason: str
    words: tuple[str, ...] = ()
    data: dict[str, Any] = {}  # noqa: RUF012


def page(*names: str, text: str = "<image> text") -> dict[str, Any]:
    return {"text": text, "images": list(names)}


def messages(*contents: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for content in contents]}


BAD = {
    # images
    "missing file": Bad("pretrain", page("gone.png"), "image_missing", ("gone.png: no such file", "image_root")),
    "a folder": Bad("pretrain", page("folder"), "image_unreadable", ("folder: is a folder",)),
    "zero bytes": Bad("pretrain", page("empty.jpg"), "image_unreadable", ("empty.jpg: the file is empty",)),
    "text named .jpg": Bad("pretrain", page("text.jpg"), "image_unreadable", ("text.jpg: text, which begins",)),
    "a header cut off": Bad("pretrain", page("cut.jpg"), "image_unreadable", ("cut.jpg",)),
    "a PDF": Bad("pretrain", page("scan.pdf"), "image_unreadable", ("scan.pdf: a PDF; name a page of it",)),
    "a damaged PDF": Bad("pretrain", page("scan.pdf#page=1"), "pdf_damaged", ("scan.pdf: Failed to load document",)),
    "an encrypted PDF": Bad("pretrain", page("secret.pdf#page=1"), "pdf_encrypted", ("secret.pdf: the PDF is",)),
    "no such page": Bad("pretrain", page("two.pdf#page=3"), "pdf_page", ("two.pdf#page=3&dpi=150: the PDF has 2",)),
    "no such frame": Bad("pretrain", page("pages.tiff#page=4"), "image_page", ("pages.tiff#page=4: the file has 3",)),
    "link to a PDF outside": Bad("pretrain", page("link.pdf#page=1"), "image_outside_root", ("'link.pdf#page",)),
    "decompression bomb": Bad(
        "pretrain", page("bomb.png"), "image_too_large",
        ("bomb.png: 60000 x 60000 = 3600000000 pixels, more than 250000000", "data.max_image_pixels"),
    ),
    "absurd aspect ratio": Bad("pretrain", page("line.png"), "image_shape", ("takes no image of (2, 30000)",)),
    "several pages": Bad(
        "pretrain", page("pages.tiff"), "image_frames", ("pages.tiff: has several pages", "data.image_frames: first"),
        {"image_frames": "reject"},
    ),
    "an animation": Bad("pretrain", page("moving.gif"), "image_frames", ("moving.gif",), {"image_frames": "reject"}),
    "an animated PNG": Bad("chat", chat("<image>", "x", images=["moving.png"]), "image_frames", ("moving.png",),
                           {"image_frames": "reject"}),
    "path out by ..": Bad("pretrain", page("../secret.png"), "image_outside_root", ("'../secret.png' lies outside",)),
    "absolute path": Bad("pretrain", page("/etc/hostname"), "image_outside_root", ("'/etc/hostname' lies outside",)),
    "link to a file outside": Bad("pretrain", page("link.png"), "image_outside_root", ("'link.png' lies outside",)),
    "link to a folder outside": Bad("pretrain", page("out/secret.png"), "image_outside_root", ("'out/secret.png'",)),
    "link in a linked folder": Bad("pretrain", page("in/link.png"), "image_outside_root", ("'in/link.png'",)),
    "part of a linked archive": Bad("pretrain", page("link.tar#a.png@0+9"), "image_outside_root", ("'link.tar#",)),
    "http": Bad("pretrain", page("http://host/a.png"), "image_scheme", ("http://host/a.png: images are local paths",)),
    "https": Bad("tokenized", {**GOOD["tokenized"], "images": ["https://h/a.png"]}, "image_scheme", ("https://h/a.png",)),
    "file": Bad("pretrain", page("file:///etc/hostname"), "image_scheme", ("file:///etc/hostname",)),
    "unknown scheme": Bad("pretrain", page("gopher://a/b.png"), "image_scheme", ("gopher://a/b.png",)),
    "chained schemes": Bad("pretrain", page("memory://a::file:///etc/hostname"), "image_scheme", ("memory://a::file",)),
    "scheme in capitals": Bad("pretrain", page("FILE:///etc/hostname"), "image_scheme", ("FILE:///etc/hostname",)),
    "a password": Bad("pretrain", page("s3://me:hunter2@bucket/a.png"), "image_credentials", ("s3://me:…@bucket",)),
    "a token": Bad("pretrain", page("s3://b/a.png?X-Amz-Signature=hunter2"), "image_credentials", ("Signature=…",)),
    "an image of another type": Bad("pretrain", {"text": "<image>", "images": [7]}, "wrong_type", ("not 7",)),
    "images that are a number": Bad("pretrain", {"text": "<image>", "images": 7}, "wrong_type", ("not int 7",)),
    "thousands of images": Bad(
        "pretrain", page(*["page.png"] * 3000, text="<image>" * 3000), "too_long", ("packing.token_capacity is 900",)
    ),
    "thousands of images too few": Bad(
        "pretrain", page(*["page.png"] * 3000, text="<image>" * 2999), "placeholder_count", ("2,999", "3,000 images"),
    ),
    # text and structure
    "too few placeholders": Bad("pretrain", page("page.png", text="text"), "placeholder_count", ("0 image", "1 image")),
    "too many placeholders": Bad("pretrain", page(), "placeholder_count", ("1 image placeholder but 0 images",)),
    "placeholders of a chat": Bad("chat", chat("<image><image>", "x", images=["page.png"]), "placeholder_count",
                                  ("2 image placeholders but 1 image",)),
    "empty text": Bad("pretrain", {"text": ""}, "empty_text", ("text is empty",)),
    "blank text": Bad("pretrain", {"text": " \n\t"}, "empty_text", (r"' \n\t'",)),
    "a list for text": Bad("pretrain", {"text": ["a"]}, "wrong_type", ("text must be a string, not list ['a']",)),
    "a number for text": Bad("pretrain", {"text": 7}, "wrong_type", ("not int 7",)),
    "text for messages": Bad("chat", {"messages": "hi"}, "wrong_type", ("messages must be a list", "'hi'")),
    "an id of another type": Bad("pretrain", {"id": [1], "text": "x"}, "wrong_type", ("id must be a string",)),
    "no text": Bad("pretrain", {"id": "a"}, "missing_column", ("has no 'text'", "its fields are 'id'")),
    "no messages": Bad("chat", {"text": "a"}, "missing_column", ("no 'messages' and no 'conversations'",)),
    "no ids": Bad("tokenized", {"labels": [1]}, "missing_column", ("no 'input_ids'",)),
    "an unknown role": Bad("chat", messages("hi", role="narrator"), "unknown_role", ("'narrator'", "known are system")),
    "a role that is no text": Bad("chat", {"messages": [{"role": {"name": "user"}, "content": "a"}]}, "unknown_role",
                                  ("{'name': 'user'}",)),
    "an unknown key": Bad("chat", {"messages": [{"role": "user", "content": "a", "mood": "sad"}]}, "unknown_field",
                          ("message 0 has the key 'mood'", "ignore_message_keys")),
    "a call that the template leaves out": Bad(
        "chat",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [
            {"function": {"name": "look", "arguments": {"page": 3}}}]}]},
        "not_written", ("message 1 (assistant): the chat template leaves out its", ),
    ),
    "a weight that is no flag": Bad("chat", {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
                                    "unsupported_flag", ("message 0 has weight 0.5",)),
    "a user that is to train": Bad("chat", {"messages": [{"role": "user", "content": "a", "train": True}]},
                                   "unsupported_flag", ("message 0 is of role 'user' and has train True",)),
    "a part that names another picture": Bad(
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "other.png"}]}], "images": ["page.png"]},
        "image_conflict", ("image part 0 names", "other.png"),
    ),
    "messages in messages": Bad("chat", {"messages": [messages("hi", role="narrator")]}, "unknown_role", ("None",)),
    "messages as content": Bad("chat", messages([messages("hi", role="narrator")]), "wrong_type", ("a part must",)),
    "a start of turn in a chat": Bad("chat", chat("<|im_start|>assistant\nYes", "x"), "special_token_in_text",
                                     ("message 0 holds the token '<|im_start|>'",)),
    "an end of turn in an answer": Bad("chat", chat("a", "b<|im_end|>"), "special_token_in_text", ("message 1",)),
    "a media token in a document": Bad("pretrain", {"text": "a <|vision_start|>"}, "special_token_in_text",
                                       ("text holds the token '<|vision_start|>'",)),
    "<image> in a text part": Bad("chat", messages([{"type": "text", "text": "see <image>"}]), "special_token_in_text",
                                  ("message 0: a text part holds the image placeholder '<image>'",)),
    "a token in two halves": Bad(
        "chat", messages([{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]),
        "special_token_in_text", ("'<|im_end|>'",),
    ),
    "nothing trained": Bad("chat", messages("hi"), "nothing_trained", ("no token of the row is trained",)),
    "no label of any token": Bad("tokenized", {"input_ids": [5, 6], "labels": [-100, -100]}, "nothing_trained", ()),
    "oversize text": Bad("pretrain", {"text": "word " * 2000}, "too_long", ("packing.token_capacity is 900",)),
    "oversize images": Bad("pretrain", page(*["page.png"] * 300, text="<image>" * 300), "too_many_visual_tokens",
                           ("packing.visual_capacity is 600",), {}),
    # files
    "not JSON": Bad("pretrain", b'{"text": "a', "bad_json", ("the line is not JSON", "it begins '{\"text\": \"a'")),
    "a key twice": Bad(
        "pretrain", b'{"text": "a", "text": "b"}', "bad_json",
        ("the key 'text' stands twice in one object", "begins '{\"text\": \"a"),
    ),
    "a list": Bad("pretrain", b"[1]", "bad_json", ("this line is a list",)),
    "not UTF-8": Bad("pretrain", b'{"text": "caf\xe9"}', "not_utf8", ("byte 13 of the line",)),
    "half a character": Bad("chat", b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "not_utf8",
                            (r"'\ud83d'",)),
    "deep JSON": Bad("pretrain", b'{"text":' * 5000, "bad_json", ()),
    "the id of an earlier row": Bad("pretrain", {"id": "first", "text": "x"}, "duplicate_id",
                                    ("'first'", "data.duplicate_ids"), {"duplicate_ids": "reject"}),
}  # fmt: skip


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and holds no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = struct.pack(">I", 9) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sound and broken images, beside one that no row may reach."""
    top = tmp_path_factory.mktemp("bad")
    folder = top / "images"
    (folder / "folder").mkdir(parents=True)
    Image.new("L", (60, 80), 200).save(folder / "page.png")
    Image.new("L", (2, 30_000)).save(folder / "line.png")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no picture")
    (folder / "scan.pdf").write_bytes(b"%PDF-1.7\n")
    (folder / "secret.pdf").write_bytes(ENCRYPTED)
    (folder / "link.pdf").symlink_to(pdf_of(top / "outside.pdf", [{}]))
    pdf_of(folder / "two.pdf", [{}, {}])
    (folder / "cut.jpg").write_bytes(jpeg()[:100])
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    frames = [Image.new("L", (60, 80), grey) for grey in (1, 99, 200)]
    for name in ("pages.tiff", "moving.gif", "moving.png"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
    (top / "secret").mkdir()
    Image.new("L", (60, 80)).save(top / "secret" / "secret.png")
    Image.new("L", (60, 80)).save(top / "secret.png")
    (folder / "link.png").symlink_to(top / "secret.png")
    (folder / "link.tar").symlink_to(top / "secret.png")
    (folder / "out").symlink_to(top / "secret")
    (folder / "folder" / "link.png").symlink_to("../../secret/secret.png")
    (folder / "in").symlink_to("folder")
    (folder / "also.png").symlink_to("page.png")
    return folder


def jpeg(**options: Any) -> bytes:
    data = io.BytesIO()
    Image.new("L", (60, 80), 200).save(data, "JPEG", **options)
    return data.getvalue()


def line(row: Any) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def prepare(
    processor: Any,
    folder: Path,
    output: Path,
    kind: str,
    rows: list[Any],
    packing: PackingSettings = PACKING,
    **data: Any,
) -> PreparedDataset:
    """Prepare rows, given as bytes or as fields, through all steps but Ray."""
    file = output / "rows.jsonl"
    file.write_bytes(b"\n".join(map(line, rows)))
    dataset = {"files": str(file), "kind": kind, "image_root": str(folder)}
    return Preparation(processor, dataset, packing=packing, **data).write(output / "prepared")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_set_aside_alone(processors: dict[str, Any], folder: Path, tmp_path: Path, name: str) -> None:
    bad = BAD[name]
    good = GOOD[bad.kind]
    packing = PACKING.model_copy(update={"token_capacity": 9000}) if bad.reason == "too_many_visual_tokens" else PACKING
    rows = [good | {"id": "first"}, good | {"id": "second"}, bad.row, good | {"id": "last"}]
    prepared = prepare(processors["qwen2_vl"], folder, tmp_path, bad.kind, rows, packing, **bad.data)
    (rejected,) = prepared.rejected().to_pylist()
    assert rejected["reason"] == bad.reason
    assert [word for word in bad.words if word not in rejected["message"]] == [], rejected["message"]
    assert rejected["source"] == f"{tmp_path}/rows.jsonl:3"
    assert "\n" not in rejected["message"]
    assert len(rejected["message"]) < 700
    assert "hunter2" not in json.dumps(rejected)
    facts = prepared.statistics
    assert (facts["rows_read"], facts["rows_packed"], facts["rows_rejected"]) == (4, 3, 1)
    assert facts["rejected_by_reason"] == {bad.reason: 1}
    ids = [row_id for number in range(len(prepared)) for row_id in prepared.bin(number).sample_ids]
    assert sorted(ids) == ["first", "last", "second"]


def test_every_reason_that_preparing_gives_is_in_the_table() -> None:
    """Beside those that have tests of their own: of families, of templates, of training, of evaluation."""
    elsewhere = {
        "bad_tar", "bad_csv", "needs_image", "template", "image_tokens", "image_corrupt", "image_changed",
        "pdf_empty_page", "turns_differ", "no_text",
    }  # fmt: skip
    assert {bad.reason for bad in BAD.values()} == reasons_in_code() - elsewhere


# ---- What looks odd and is good ----


def sixteen_bits(path: Path) -> None:
    Image.new("I;16", (60, 80), 40_000).save(path)


WHITE = Image.new("L", (60, 80), 255)
ODD = {
    "16.png": sixteen_bits,
    "cmyk.jpg": lambda path: Image.new("CMYK", (60, 80)).save(path),
    "palette.png": lambda path: Image.new("P", (60, 80)).save(path, transparency=0),
    "exif.jpg": lambda path: path.write_bytes(jpeg(exif=b"Exif\0\0" + b"\xff" * 40)),
    "exif2.jpg": lambda path: path.write_bytes(jpeg(exif=b"Exif\0\0II*\0\xff\xff\xff\xff")),
    "frames.gif": lambda path: Image.new("L", (60, 80)).save(path, save_all=True, append_images=[WHITE]),
    "truncated.jpg": lambda path: path.write_bytes(jpeg()[:-50]),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("image_frames", ["first", "reject"])
def test_odd_images_are_taken_and_what_was_passed_over_is_noted(
    processors: dict[str, Any], tmp_path: Path, image_frames: str
) -> None:
    """Truncated pixels too: they are only read in training, which says so."""
    for name, write in ODD.items():
        write(tmp_path / name)
    rows = [{"id": name, "text": "<image> x", "images": [name]} for name in ODD]
    prepared = prepare(processors["qwen2_vl"], tmp_path, tmp_path, "pretrain", rows, image_frames=image_frames)
    facts = prepared.statistics
    assert facts["rejected_by_reason"] == ({} if image_frames == "first" else {"image_frames": 1})
    broken = {"broken_exif": [f"{tmp_path}/rows.jsonl:{line}" for line in (4, 5)]}
    several = {"several_frames": [f"{tmp_path}/rows.jsonl:6"]} if image_frames == "first" else {}
    assert facts["image_notes"] == {"broken_exif": 2} | dict.fromkeys(several, 1)
    assert facts["examples"] == broken | several
    images = [image for number in range(len(prepared)) for image in prepared.bin(number).images]
    assert {(image["width"], image["height"]) for image in images} == {(60, 80)}


def test_links_that_stay_inside_are_followed(processors: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """Also where the image root itself is reached by a link, and its files are named by their real place."""
    (tmp_path / "root").symlink_to(folder)
    rows = [page("also.png"), page("in/../also.png"), page(f"{folder}/page.png"), page("root/also.png")]
    prepared = prepare(processors["qwen2_vl"], tmp_path / "root", tmp_path, "pretrain", rows)
    assert prepared.statistics["rejected_by_reason"] == {"image_missing": 1}


def test_ids_that_differ_in_case_are_different_ids(processors: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    ids = ["a", "A", "ß", "SS", "ss", "é", "e\u0301", "1", "01", " a"]
    rows = [{"id": row_id, "text": f"row {number}"} for number, row_id in enumerate(ids)]
    prepared = prepare(processors["qwen2_vl"], folder, tmp_path, "pretrain", rows, duplicate_ids="reject")
    found = [row_id for number in range(len(prepared)) for row_id in prepared.bin(number).sample_ids]
    assert sorted(found) == sorted(ids)
    assert prepared.statistics["duplicate_ids"] == 0


# ---- Ids that stand twice ----


@pytest.fixture
def twice(tmp_path: Path) -> list[Any]:
    """Rows over several windows, a quarter with an id that stood before; one of them bad where it stood first."""
    rows: list[Any] = [{"id": f"id-{number}", "text": f"row {number}"} for number in range(9)]
    rows += [{"id": "id-2", "text": "again"}, b"", {"id": 7, "text": "seven"}, {"id": "7", "text": "7"}]
    rows += [
        {"id": "id-2", "text": "third"},
        {"id": "bad", "text": ""},
        {"id": "bad", "text": "good"},
        {"text": "no id"},
    ]
    return rows


def test_ids_that_stand_twice_are_kept_and_counted(
    processors: dict[str, Any], folder: Path, tmp_path: Path, twice: Any
) -> None:
    prepared = prepare(processors["qwen2_vl"], folder, tmp_path, "pretrain", twice)
    assert prepared.statistics["rejected_by_reason"] == {"empty_text": 1}
    assert prepared.statistics["duplicate_ids"] == 3
    assert sorted(prepared.statistics["examples"]["duplicate_ids"]) == ["7", "id-2"]


@pytest.mark.parametrize("window_rows", [2, 3, 512])
def test_ids_that_stand_twice_can_be_rejected_the_first_one_stays(
    processors: dict[str, Any], folder: Path, tmp_path: Path, twice: list[Any], window_rows: int
) -> None:
    packing = PACKING.model_copy(update={"window_rows": window_rows})
    prepared = prepare(processors["qwen2_vl"], folder, tmp_path, "pretrain", twice, packing, duplicate_ids="reject")
    rejected = [(row["id"], row["reason"], row["source"].rsplit(":")[-1]) for row in prepared.rejected().to_pylist()]
    assert rejected == [
        ("id-2", "duplicate_id", "10"), ("7", "duplicate_id", "13"), ("id-2", "duplicate_id", "14"),
        ("bad", "empty_text", "15"), ("bad", "duplicate_id", "16"),
    ]  # fmt: skip
    assert prepared.statistics["duplicate_ids"] == 0


def test_a_file_listed_twice_is_weighed_or_refused(processors: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """Also rows without an id, which go by their place."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one"}\n{"id": "a", "text": "two"}\n')
    for setting, packed in (("keep", 4), ("reject", 2)):
        dataset = {"files": [str(file), str(file)], "kind": "pretrain"}
        made = Preparation(processors["qwen2_vl"], dataset, packing=PACKING, duplicate_ids=setting)
        prepared = made.write(tmp_path / setting)
        assert prepared.statistics["rows_packed"] == packed
        assert prepared.statistics["duplicate_ids"] == packed - 2
        assert prepared.statistics["rows_read"] == 4


# ---- Parquet ----


@pytest.mark.parametrize(
    ("column", "reason", "words"),
    [
        (pa.array([b"good", b"bytes"], pa.binary()), "wrong_type", "text must be a string, not bytes b'good'"),
        (pa.array([["a"], ["b"]]), "wrong_type", "not list ['a']"),
        (pa.array([1.5, 2.5]), "wrong_type", "not float 1.5"),
        (pa.array([{"a": 1}, {"a": 2}]), "wrong_type", "not dict {'a': 1}"),
        (pa.array([None, None], pa.string()), "missing_column", "has no 'text'"),
        (pa.array([0, 1], pa.timestamp("s")), "wrong_type", "not datetime"),
        (pa.array([2**62, 2**62], pa.timestamp("us")), "wrong_type", "cannot be read"),
        (pa.array([True, False]), "wrong_type", "not bool True"),
    ],
)
def test_columns_of_another_type(
    processors: dict[str, Any], tmp_path: Path, column: pa.Array, reason: str, words: str
) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "rows.parquet")
    dataset = {"files": str(tmp_path / "rows.parquet"), "kind": "pretrain"}
    preparation = Preparation(processors["qwen2_vl"], dataset, packing=PACKING, max_rejected_share=1)
    prepared = preparation.write(tmp_path / "prepared")
    first = prepared.rejected().to_pylist()[0]
    assert first["reason"] == reason
    assert words in first["message"]
    assert first["source"] == f"{tmp_path}/rows.parquet:0"
    assert prepared.statistics["rows_rejected"] == prepared.statistics["rows_read"] == 2
