"""Whatever a row holds, encoding it gives a sample or a rejected row with a known reason, and none is lost."""

import io
import json
from itertools import count
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmray.packing_settings import PackingSettings
from mmray.rows.files import plan_chunks, source_files
from mmray.rows.read import RawRow, read_piece
from mmray.rows.sample import RejectedRow
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
