"""Rows as they were written, each with its place; what cannot be read is a row with an error, never a crash."""

import json
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.errors import RowError, UserError
from mmray.rows.files import Piece, source_files
from mmray.rows.plan import plan_chunks
from mmray.rows.read import RowReader, read_piece
from mmray.rows.settings import DatasetSettings


def read(path, chunk_rows=1000):
    files = source_files([DatasetSettings(files=str(path), kind="pretrain")])
    chunks = plan_chunks(files, window_rows=chunk_rows, chunk_rows=chunk_rows)
    return [row for chunk in chunks for piece in chunk.pieces for row in read_piece(piece)]


def read_lines(path, *lines, chunk_rows=1000):
    path.write_bytes(b"\n".join(lines))
    return read(path, chunk_rows)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


def error_of(path, line):
    (row,) = read_lines(path, line)
    assert isinstance(row.value, RowError), row.value
    assert "\n" not in row.value.message
    return row.value


# ---- JSON lines ----


@pytest.mark.parametrize("chunk_rows", [1, 2, 1000])
def test_a_row_knows_its_file_and_line_counted_from_1_blank_lines_too(path, chunk_rows):
    rows = read_lines(path, b'{"n": 1}', b"", b'{"n": 3}', b"  ", b'{"n": 5}', chunk_rows=chunk_rows)
    assert [(row.source, row.value) for row in rows] == [(f"{path}:{line}", {"n": line}) for line in (1, 3, 5)]


def test_values_come_through_as_they_are(path):
    value = {"text": "naïve 漢字 \u2028 \x85 ☃", "images": ["a.jpg", None], "number": 1.5, "nested": {"a": [True]}}
    rows = read_lines(path, json.dumps(value).encode(), json.dumps(value, ensure_ascii=False).encode())
    assert [row.value for row in rows] == [value, value]


def test_a_byte_order_mark_and_windows_line_ends_are_no_matter(path):
    assert [row.value for row in read_lines(path, b'\xef\xbb\xbf{"n": 1}\r', b'{"n": 2}\r')] == [{"n": 1}, {"n": 2}]


def test_a_line_that_is_not_utf8_is_rejected_and_the_next_is_read(path):
    first, second = read_lines(path, b'{"text": "caf\xe9"}', b'{"text": "ok"}')
    assert first.value.reason == "not_utf8"
    assert "byte 13" in first.value.message
    assert "UTF-8" in first.value.message
    assert (first.source, second.value) == (f"{path}:1", {"text": "ok"})


@pytest.mark.parametrize("line", [b'{"text": "one"', b"not a row", b"{'text': 1}", b'{"text": 1} {}', b"\xef\xbb\xbf"])
def test_a_line_that_is_no_json_is_rejected_and_quoted(path, line):
    error = error_of(path, line)
    assert error.reason == "bad_json"
    assert repr(line.decode("utf-8-sig")) in error.message


@pytest.mark.parametrize("place", range(57, 63))
def test_a_line_that_is_no_json_is_quoted_whole_characters_only(path, place):
    """The quotation ends after 60 characters, which may be in the middle of one in bytes."""
    line = ("a" * place + "漢字") * 3
    error = error_of(path, line.encode())
    assert repr(line[:60]) in error.message


@pytest.mark.parametrize(
    ("line", "kind"), [(b"[1, 2]", "list"), (b'"text"', "str"), (b"7", "int"), (b"null", "NoneType")]
)
def test_json_that_is_no_object_is_rejected_with_what_it_is(path, line, kind):
    error = error_of(path, line)
    assert error.reason == "bad_json"
    assert f"this line is a {kind}" in error.message


def test_a_line_that_nests_without_end_is_rejected(path):
    assert error_of(path, b'{"a":' * 100_000).reason == "bad_json"


@pytest.mark.parametrize("where", ['{"text": "a %s b"}', '{"%s": 1}', '{"a": [{"b": ["%s"]}]}'])
def test_half_a_character_is_rejected(path, where):
    """JSON can name a lone surrogate; no file and no tokenizer takes it."""
    error = error_of(path, (where % "\\uD83D").encode())
    assert error.reason == "not_utf8"
    assert r"'\ud83d'" in error.message
    (row,) = read_lines(path, (where % "\\ud83d\\ude00").encode())
    assert isinstance(row.value, dict)
    assert "😀" in json.dumps(row.value, ensure_ascii=False)


@given(st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line), max_size=5))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_rows_or_errors(tmp_path_factory, lines):
    """Behind a first row: how a file begins says what it is."""
    path, lines = tmp_path_factory.getbasetemp() / "any-bytes.jsonl", [b"{}", *lines]
    rows = read_lines(path, *lines)
    assert [row.source for row in rows] == [f"{path}:{n}" for n, line in enumerate(lines, start=1) if line.strip()]
    assert all(isinstance(row.value, dict | RowError) for row in rows)


# ---- Parquet ----


@pytest.mark.parametrize("chunk_rows", [1, 3, 4, 7, 1000])
def test_slices_cross_row_groups_and_rows_count_from_0(tmp_path, chunk_rows):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"n": list(range(11))}), path, row_group_size=4)
    assert [(row.source, row.value) for row in read(path, chunk_rows)] == [(f"{path}:{n}", {"n": n}) for n in range(11)]


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=4),
    st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 1000), st.integers(1, 400)), max_size=8),
)
@settings(deadline=None, max_examples=60)
def test_a_reader_gives_the_rows_of_any_pieces_in_any_order(tmp_path_factory, groups, wanted):
    """It goes on where it stopped, and must not when the next piece lies elsewhere, or in another file."""
    total = sum(groups)
    for name in "ab":
        with pq.ParquetWriter(folder_file(tmp_path_factory, name), pa.schema({"n": pa.string()})) as writer:
            begin = 0
            for size in groups:
                writer.write_table(pa.table({"n": [f"{name}{n}" for n in range(begin, begin + size)]}), size)
                begin += size
    reader = RowReader()
    for name, first, count in wanted:
        first = first % total
        count = min(count, total - first)
        piece = Piece(0, folder_file(tmp_path_factory, name), "parquet", first, count)
        assert [row.value for row in reader.read(piece)] == [{"n": f"{name}{n}"} for n in range(first, first + count)]


def folder_file(tmp_path_factory, name):
    return str(tmp_path_factory.getbasetemp() / f"pieces-{name}.parquet")


def test_pieces_read_in_turn_decode_a_row_group_once(tmp_path, monkeypatch):
    """Two actors that share a file each read it once; a chunk that starts in its middle costs no second start."""
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"n": list(range(1000))}), path, row_group_size=1000)
    started = []
    iter_batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda *args, **kwargs: started.append(1) or iter_batches(*args, **kwargs)
    )
    reader = RowReader()
    for first in range(0, 1000, 200):
        (row, *_) = reader.read(Piece(0, str(path), "parquet", first, 100))
        assert row.value == {"n": first}
    assert len(started) == 1


def test_a_piece_that_is_not_read_to_its_end_loses_nothing(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"n": list(range(300))}), path)
    reader = RowReader()
    assert next(reader.read(Piece(0, str(path), "parquet", 0, 200))).value == {"n": 0}
    assert [row.value["n"] for row in reader.read(Piece(0, str(path), "parquet", 1, 299))] == list(range(1, 300))


def test_cells_of_all_kinds_are_python_values(tmp_path):
    path = tmp_path / "rows.parquet"
    when = datetime(2024, 5, 6)
    value = {"text": "a", "images": [{"bytes": b"\xff", "path": None}], "id": when, "image": None}
    pq.write_table(pa.Table.from_pylist([value]), path)
    assert [row.value for row in read(path)] == [value]


def test_a_text_that_is_not_utf8_rejects_its_row_alone(tmp_path):
    path = tmp_path / "rows.parquet"
    offsets = pa.py_buffer(b"\x00\0\0\0" + b"\x02\0\0\0" + b"\x04\0\0\0" + b"\x06\0\0\0")
    broken = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"ok\xff\xfeOK")])
    pq.write_table(pa.table({"text": broken}), path)
    first, second, third = read(path)
    assert (first.value, third.value) == ({"text": "ok"}, {"text": "OK"})
    assert (second.source, second.value.reason) == (f"{path}:1", "not_utf8")


def test_a_damaged_file_is_an_error_with_its_name_and_rows(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": [f"some text {n}" for n in range(1000)]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xaa" * 396
    path.write_bytes(content)
    with pytest.raises(UserError, match="rows 0 to 999 cannot be read") as caught:
        read(path)
    assert str(path) in str(caught.value)
