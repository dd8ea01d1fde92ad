"""Whatever a row or a file holds, preparing gives a sample or a rejected row with a known reason, and none is lost."""

import copy
import io
import json
import struct
from dataclasses import replace
from decimal import Decimal
from itertools import count
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmray.errors import UserError
from mmray.packing.settings import PackingSettings
from mmray.rows.files import source_files
from mmray.rows.plan import plan_chunks
from mmray.rows.read import RawRow, read_piece
from mmray.rows.sample import RejectedRow
from mmray.storage import Folder
from tests.mmray.preparing import Preparation
from tests.mmray.reasons import reasons_in_code

PACKING = PackingSettings(token_capacity=150, visual_capacity=100, window_rows=8)
TILING = {"grid": (2, 1), "tile_size": (56, 56), "overview": (56, 56), "labels": True, "min_area": 500}
REASONS = reasons_in_code()
fresh_names = count()

TOKENS = [
    "<image>",
    "<|image_pad|>",
    "<|vision_start|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_",
    "start|>",
    "<row1_col1>",
]
WORDS = ["<row_1_col_1>", "<end_of_utterance>", "User:", "\n", "é", "\0", "[", "]"]
PAGES = ["page.png", "line.png", "dot.png"]
PLACES = [*PAGES, "noise.jpg", "empty.jpg", "none.png", "../page.png", ".", "", "/etc/hostname", "http://h/a.png"]
URIS = ["memory://none.png", "file:///a", "x://y", "memory://a::file://b"]
ROLES = ["user", "assistant", "system", "human", "gpt", "tool", "narrator"]


def row_schema(letters, junk=st.nothing()):  # noqa: B008 - strategies are values
    """Rows with every field: most often what it should be or nearly that, else anything.

    letters: the characters of texts; junk: values beside those that JSON has.
    """
    text = st.lists(st.one_of(st.text(letters, max_size=8), st.sampled_from(TOKENS + WORDS)), max_size=5).map("".join)
    scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text, junk)
    anything = st.recursive(
        scalars,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
        max_leaves=6,
    )

    def mostly(good, other=anything):
        return st.one_of(good, good, good, other)

    def one_of(words):
        return st.sampled_from(words)

    structs = st.fixed_dictionaries({"path": one_of(PLACES), "bytes": st.none() | text | junk})
    images = st.lists(mostly(one_of(PLACES + URIS) | structs), max_size=3)
    part = st.fixed_dictionaries({"type": one_of(["text", "image", "image_url", "video"])}, optional={"text": text})
    content = mostly(text | st.lists(mostly(part), max_size=4))
    message = st.fixed_dictionaries({"role": mostly(one_of(ROLES)), "content": content})
    turn = st.fixed_dictionaries({"from": mostly(one_of(ROLES)), "value": mostly(text)})
    tokens = st.lists(mostly(st.integers(-1, 700), one_of([2**31, 10**40, True, 1.0, None, "1"])), max_size=12)
    fields = {
        "id": st.text(letters, max_size=5) | st.integers(),
        "text": text,
        "images": images,
        "messages": st.lists(mostly(message | turn), max_size=4),
        "conversations": st.lists(turn, max_size=2),
        "input_ids": tokens,
        "labels": tokens,
    }
    fuzzed = st.fixed_dictionaries({name: mostly(field) for name, field in fields.items()})
    return st.one_of(fuzzed, fuzzed, whole_rows(), st.dictionaries(text, anything, max_size=2))


@st.composite
def whole_rows(draw):
    """Rows with as many placeholders as images, so that the way behind the checks is walked too."""
    words = st.sampled_from(["a", "Text. ", "\n", "naïve 漢字", "<row1_col1>", "."])
    pages = draw(st.lists(st.sampled_from(PAGES), max_size=3))
    text = "".join(f"{draw(words)}<image>{draw(words)}" for _ in pages) or draw(words)
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": draw(words)}]
    ids = draw(st.lists(st.integers(0, 590), min_size=1, max_size=9))
    messages = turns[: draw(st.integers(1, 2))]
    return {"text": text, "messages": messages, "images": pages, "input_ids": ids, "labels": ids}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    Image.new("L", (40, 60)).save(folder / "page.png")
    Image.new("L", (1, 3000)).save(folder / "line.png")
    Image.new("L", (1, 1)).save(folder / "dot.png")
    (folder / "noise.jpg").write_bytes(bytes(range(256)))
    (folder / "empty.jpg").write_bytes(b"")
    return folder


@pytest.fixture(
    scope="session",
    params=[("qwen2_vl", None), ("qwen2_vl", TILING), ("idefics3", None), ("smolvlm", TILING)],
    ids=["qwen2_vl", "qwen2_vl tiled", "idefics3", "smolvlm tiled"],
)
def preparations(request, processors, folder) -> dict[str, Preparation]:
    """For a family, untiled or tiled: a Preparation of each kind of rows."""
    family, tiling = request.param
    dataset = {"files": ("rows.jsonl",), "image_root": str(folder)}
    return {
        kind: Preparation(processors[family], dataset | {"kind": kind}, tiling=tiling, packing=PACKING)
        for kind in ("pretrain", "chat", "tokenized")
    }


def check(preparation, raw):
    """Every row comes out once: in a bin, or set aside with its reason. The real processor agrees on all samples."""
    results = preparation.encoder.encode(raw, verify=range(len(raw)))
    assert [result.source for result in results] == [row.source for row in raw]
    for result in results:
        if isinstance(result, RejectedRow):
            assert result.reason in REASONS
            assert result.message
            assert "\n" not in result.message
        else:
            assert 0 < len(result.input_ids) <= PACKING.token_capacity
            assert result.visual_tokens == (result.input_ids == preparation.family.image_token_id).sum()
            assert len(result.blocks) == len(result.images) == len(result.sizes)
    window = preparation.window(results)
    bins, rejected = (pq.read_table(io.BytesIO(data)) for data in (window.bins, window.rejected))
    packed = [source for sources in bins["sample_sources"].to_pylist() for source in sources]
    assert sorted(packed + rejected["source"].to_pylist()) == sorted(row.source for row in raw)
    assert window.statistics["rows_read"] == len(raw)
    assert window.statistics["rows_packed"] == len(packed)
    assert sum(window.statistics["rejected_by_reason"].values()) == rejected.num_rows == len(raw) - len(packed)


fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
any_letters = st.characters()  # halves of surrogate pairs too, which JSON can write


@pytest.mark.parametrize("kind", ["pretrain", "chat", "tokenized"])
@given(values=st.lists(row_schema(any_letters), min_size=1, max_size=6))
@settings(fuzz, max_examples=25)
def test_rows_of_a_json_file_are_all_packed_or_rejected(preparations, kind, values):
    uri = f"memory://fuzz-rows-{next(fresh_names) % 4}.jsonl"
    with fsspec.open(uri, "wb") as file:
        file.write("".join(json.dumps(value) + "\n" for value in values).encode())
    dataset = preparations[kind].data.train[0].model_copy(update={"files": (uri,)})
    chunks = plan_chunks(source_files([dataset]), window_rows=8, chunk_rows=8)
    raw = [row for chunk in chunks for piece in chunk.pieces for row in read_piece(piece)]
    assert len(raw) == len(values)
    check(preparations[kind], raw)


letters = st.characters(codec="utf-8")
binary_and_dates = st.sampled_from([b"\xff", b""]) | st.datetimes() | st.decimals()


@pytest.mark.parametrize("kind", ["pretrain", "chat", "tokenized"])
@given(values=st.lists(row_schema(letters, binary_and_dates), min_size=1, max_size=6))
@settings(fuzz, max_examples=15)
def test_rows_with_the_values_of_parquet_are_all_packed_or_rejected(preparations, kind, values):
    check(preparations[kind], [RawRow(f"rows.parquet:{number}", 0, value) for number, value in enumerate(values)])


# ---- Whole files, through all steps ----


def prepare_file(preparation, uri, num_rows):
    """Encode, pack, write, join: every row of the file is in the dataset once, or set aside with its reason."""
    dataset = preparation.data.train[0].model_copy(update={"files": (uri,)})
    data = preparation.data.model_copy(update={"train": (dataset,), "max_rejected_share": 1})
    made = copy.copy(preparation)
    made.context = replace(preparation.context, datasets=data.train, data=data)
    output = f"memory://fuzzed-{next(fresh_names)}"
    try:
        prepared = made.write(output)
    except UserError as refusal:  # of a whole set: nothing of it would be trained on, or it names no column of its rows
        if "is trained on" in str(refusal) or "columns" in str(refusal):
            return
        raise
    facts, rejected = prepared.statistics, prepared.rejected().to_pylist()
    assert facts["rows_read"] == num_rows == facts["rows_packed"] + facts["rows_rejected"]
    assert facts["rows_rejected"] == len(rejected) == sum(facts["rejected_by_reason"].values())
    assert facts["rejected_by_reason"].keys() <= REASONS
    packed = [source for number in range(len(prepared)) for source in prepared.bin(number).sample_sources]
    sources = packed + [row["source"] for row in rejected]
    assert len(set(sources)) == len(sources) == num_rows
    Folder(output).remove()


@st.composite
def lines(draw):
    """Lines of a file: rows, rows with some bytes changed, or anything; blank ones too."""
    value = json.dumps(draw(row_schema(any_letters)), ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    line = bytearray(draw(st.just(value) | st.just(value) | st.binary(max_size=40)))
    for place, byte in draw(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=2)):
        if place < len(line):
            line[place] = byte
    return bytes(line)


@pytest.mark.parametrize("kind", ["pretrain", "chat", "tokenized"])
@given(written=st.lists(lines(), min_size=1, max_size=9), end=st.sampled_from([b"", b"\n", b"\r\n\n"]))
@settings(fuzz, max_examples=12)
def test_any_file_of_lines_is_prepared(one_family, kind, written, end):
    uri = f"memory://fuzz-lines-{next(fresh_names)}.jsonl"
    content = b"\n".join([b'{"id": "first"}', *written]) + end  # else its first bytes may tell another form of file
    num_rows = sum(bool(line.strip()) for line in content.split(b"\n"))
    if num_rows:
        with fsspec.open(uri, "wb") as file:
            file.write(content)
        prepare_file(one_family[kind], uri, num_rows)


def binary_as_text():
    """A column of text whose second value is no UTF-8."""
    ends = pa.py_buffer(struct.pack("<4i", 0, 1, 3, 4))
    return pa.Array.from_buffers(pa.string(), 3, [None, ends, pa.py_buffer(b"a\xff\xfeb")])


TURNS = [{"role": "user", "content": "<image>Read."}, {"role": "assistant", "content": "Yes."}]
PARTS = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Read."}]}]
COLUMNS = [
    pa.array(["<image> a", "b", "<image>"]),
    pa.array(["<image> a", None, ""], pa.large_string()),
    pa.array(["x", "y", "x"]).dictionary_encode(),
    binary_as_text(),
    pa.array([b"a", None, b"\xff"]),
    pa.array([b"abcd"] * 3, pa.binary(4)),
    pa.nulls(3),
    pa.array([1, None, 2**40]),
    pa.array([0.5, float("nan"), None]),
    pa.array([True, False, None]),
    pa.array([2**62, None, 0], pa.timestamp("us")),
    pa.array([2**62, None, 0], pa.duration("s")),
    pa.array([1, 2, 3], pa.date32()),
    pa.array([1, 2, 3], pa.time64("us")),
    pa.array([Decimal("1.50"), None, Decimal(2)]),
    pa.array([["page.png"], [], None]),
    pa.array([["page.png"], ["none.png", None], ["../page.png"]], pa.list_(pa.large_string())),
    pa.array([[b"\x89PNG"], [b""], None]),
    pa.array([[{"bytes": None, "path": "page.png"}], [{"bytes": b"x", "path": None}], [None]]),
    pa.array([[3, 4, 5], [3], [-1, 2**31]], pa.list_(pa.int64())),
    pa.array([[3, 4, 5], [3, None], []], pa.list_(pa.int16())),
    pa.array([[3, 4], [5, 6], [7, 8]], pa.list_(pa.int32(), 2)),
    pa.array([[1.0, 2.0], [0.0], None]),
    pa.array([[True, False, True], [True], None]),
    pa.array([TURNS, TURNS[:1], []]),
    pa.array([PARTS, None, PARTS]),
    pa.array([[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]] * 3),
    pa.array([{"a": {"b": [1]}}] * 3),
    pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int32())),
]
NAMES = ["id", "text", "images", "messages", "conversations", "input_ids", "labels", "sampled_mask", "other"]


@pytest.mark.parametrize("kind", ["pretrain", "chat", "tokenized"])
@given(columns=st.dictionaries(st.sampled_from(NAMES), st.sampled_from(COLUMNS), min_size=1))
@settings(fuzz, max_examples=30)
def test_any_file_of_columns_is_prepared(one_family, kind, columns):
    uri = f"memory://fuzz-columns-{next(fresh_names)}.parquet"
    with fsspec.open(uri, "wb") as file:
        pq.write_table(pa.table(columns), file, row_group_size=2)
    prepare_file(one_family[kind], uri, 3)


@pytest.fixture(scope="session")
def one_family(processors, folder) -> dict[str, Preparation]:
    dataset = {"files": ("rows.jsonl",), "image_root": str(folder)}
    return {
        kind: Preparation(processors["qwen2_vl"], dataset | {"kind": kind}, packing=PACKING)
        for kind in ("pretrain", "chat", "tokenized")
    }
