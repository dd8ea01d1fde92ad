"""From file names to chunks: every row once, in order, and no chunk knows where one file ends and the next begins."""

import io
import os
from itertools import accumulate, count, pairwise

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.errors import UserError
from mmray.rows import records
from mmray.rows.files import source_files
from mmray.rows.plan import plan_chunks
from mmray.rows.read import read_piece
from mmray.rows.settings import DatasetSettings

fresh_names = count()


def found(*patterns, **settings):
    return source_files([DatasetSettings(files=patterns, kind="pretrain", **settings)])


def names(files):
    return [os.path.basename(file.uri) for file in files]


def rows_of(chunks):
    return [row for chunk in chunks for piece in chunk.pieces for row in read_piece(piece)]


def texts_of(chunks):
    return [row.value["text"] for row in rows_of(chunks)]


@pytest.fixture
def folder(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.parquet", "notes.txt"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "d.jsonl").mkdir()
    return tmp_path


# ---- Names ----


def test_files_come_in_the_order_of_the_patterns_and_sorted_within_each(folder):
    assert names(found(f"{folder}/*.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert names(found(f"{folder}/c.parquet", f"{folder}/*.jsonl")) == ["c.parquet", "a.jsonl", "b.jsonl"]
    assert names(found(f"{folder}/[bc].*")) == ["b.jsonl", "c.parquet"]


def test_one_pattern_may_be_written_without_a_list(folder):
    dataset = DatasetSettings(files=f"{folder}/a.jsonl", kind="pretrain")
    assert names(source_files([dataset])) == ["a.jsonl"]


def test_the_files_of_several_sets_follow_one_another_and_know_their_set(folder):
    sets = [DatasetSettings(files=[f"{folder}/{name}"], kind="pretrain") for name in ("b.jsonl", "a.jsonl")]
    assert [(file.dataset, os.path.basename(file.uri)) for file in source_files(sets)] == [
        (0, "b.jsonl"),
        (1, "a.jsonl"),
    ]


@pytest.mark.parametrize("pattern", ["nothing.jsonl", "*.csv", "d.jsonl"])
def test_a_name_that_matches_no_file_is_an_error_that_quotes_it(folder, pattern):
    with pytest.raises(UserError, match="no such file") as caught:
        found(f"{folder}/{pattern}")
    assert f"{folder}/{pattern}" in str(caught.value)


def test_a_scheme_that_nothing_opens_is_an_error(folder):
    with pytest.raises(UserError, match="nosuchscheme"):
        found("nosuchscheme://bucket/rows.jsonl")


def test_a_file_may_have_the_marks_of_a_glob_in_its_name(folder):
    (folder / "part[1].jsonl").write_text("{}\n")
    assert names(found(f"{folder}/part[1].jsonl")) == ["part[1].jsonl"]


def test_the_format_goes_by_the_ending_unless_it_is_said(folder):
    assert [file.format for file in found(f"{folder}/*.*")] == ["jsonl", "jsonl", "parquet", "jsonl"]
    assert [file.format for file in found(f"{folder}/notes.txt", format="parquet")] == ["parquet"]


@pytest.mark.parametrize("ending", [".bz2", ".xz", ".zip"])
def test_rows_of_other_compressions_are_refused_with_the_remedy(folder, ending):
    (folder / f"rows.jsonl{ending}").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match="decompress"):
        found(f"{folder}/rows.jsonl{ending}")


def test_size_and_version_tell_a_replaced_file(folder):
    before = found(f"{folder}/a.jsonl")
    assert found(f"{folder}/a.jsonl") == before
    os.utime(folder / "a.jsonl", (1, 1))
    touched = found(f"{folder}/a.jsonl")
    assert touched[0].version != before[0].version
    (folder / "a.jsonl").write_text("{}\n{}\n")
    os.utime(folder / "a.jsonl", (1, 1))
    assert found(f"{folder}/a.jsonl")[0].size != touched[0].size


def test_files_in_memory_have_uris_that_open_again_and_versions():
    with fsspec.open("memory://in-memory/rows.jsonl", "wb") as file:
        file.write(b'{"text": "one"}\n')
    (before,) = found("memory://in-memory/*.jsonl")
    assert texts_of(plan_chunks([before], window_rows=1, chunk_rows=1)) == ["one"]
    with fsspec.open("memory://in-memory/rows.jsonl", "wb") as file:
        file.write(b'{"text": "two"}\n')
    (after,) = found("memory://in-memory/rows.jsonl")
    assert (after.uri, after.size) == (before.uri, before.size)
    assert after.version != before.version


# ---- Chunks ----


@pytest.mark.parametrize("format_", ["jsonl", "parquet"])
def test_a_file_that_cannot_be_read_is_an_error_with_its_name(tmp_path, format_):
    path = tmp_path / f"rows.{format_}"
    path.write_bytes(b"not what it says\n")
    (file,) = found(str(path))
    if format_ == "jsonl":
        path.unlink()
    with pytest.raises(UserError, match="cannot be read as") as caught:
        plan_chunks([file], window_rows=2, chunk_rows=1)
    assert str(path) in str(caught.value)


def test_a_window_is_a_whole_number_of_chunks():
    with pytest.raises(ValueError, match="no multiple"):
        plan_chunks([], window_rows=3, chunk_rows=2)


def test_no_rows_no_chunks(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    files = found(f"{tmp_path}/empty.*")
    assert len(files) == 2
    assert plan_chunks(files, window_rows=4, chunk_rows=2) == []


@pytest.mark.parametrize("content", [b'{"text": "one"}', b'{"text": "one"}\n', b'\n\n{"text": "one"}\r\n  \n\n'])
def test_last_newlines_and_blank_lines_make_no_rows(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    chunks = plan_chunks(found(f"{tmp_path}/rows.jsonl"), window_rows=1, chunk_rows=1)
    assert texts_of(chunks) == ["one"]


lines = st.lists(st.sampled_from(["", "  ", "row", "row", "row", "rów\u2028with a separator"]), max_size=9)


@st.composite
def sources(draw):
    """Some files: (format, lines, whether the last line ends)."""
    kinds = st.sampled_from(["jsonl", "parquet"])
    return draw(st.lists(st.tuples(kinds, lines, st.booleans()), min_size=1, max_size=4))


def write_files(sources):
    """Write to memory; returns the pattern, and the texts of all rows in order."""
    folder, expected, numbers = f"memory://plans-{next(fresh_names)}", [], count()
    for place, (format_, file_lines, ends) in enumerate(sources):
        with fsspec.open(f"{folder}/{place}.{format_}", "wb") as file:
            texts = [f"{line} {next(numbers)}" if line.strip() else "" for line in file_lines]
            if format_ == "parquet":
                texts = [text for text in texts if text]
                pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), file, row_group_size=2)
            else:
                # as people write it: no escapes, so that a separator of Unicode stands there itself
                content = "\n".join(f'{{"text": "{text}"}}' if text else line for text, line in zip(texts, file_lines))
                file.write((content + ("\n" if ends and content else "")).encode())
            expected += [text for text in texts if text]
    return f"{folder}/*", expected


@given(sources(), st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 3, 1 << 20]))
@settings(deadline=None, max_examples=150)
def test_every_row_is_in_one_chunk_in_order(sources, chunk_rows, per_window, read_bytes):
    """One file after another; and side by side, where each file's rows keep their order."""
    pattern, expected = write_files(sources)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "READ_BYTES", read_bytes)
        before, chunks = (
            plan_chunks(found(pattern), window_rows=chunk_rows * per_window, chunk_rows=chunk_rows, dealing=dealing)
            for dealing in (1, 2)
        )
    assert texts_of(before) == expected
    assert sorted(texts_of(chunks)) == sorted(expected)
    for uri in {file.uri for file in found(pattern)}:
        of_file = [piece for chunk in chunks for piece in chunk.pieces if piece.uri == uri]
        assert [piece.first_row for piece in of_file] == [0, *accumulate(piece.num_rows for piece in of_file)][:-1]
    if len(sources) == 1:
        assert chunks == before
    assert all(chunk.num_rows == chunk_rows for chunk in chunks[:-1])
    assert all(1 <= chunk.num_rows <= chunk_rows for chunk in chunks[-1:])
    assert [(chunk.window, chunk.index) for chunk in chunks] == [divmod(n, per_window) for n in range(len(chunks))]
    assert [chunk.first_row for chunk in chunks] == [n * chunk_rows for n in range(len(chunks))]


@given(st.integers(0, 30), st.lists(st.integers(0, 30), max_size=3), st.integers(1, 7))
@settings(deadline=None, max_examples=50)
def test_one_after_another_it_does_not_matter_how_rows_are_spread_over_files(num_rows, cuts, chunk_rows):
    """One file, or the same rows in several files of both formats: the same rows in each chunk."""
    borders = sorted({0, num_rows, *(min(cut, num_rows) for cut in cuts)})
    spread = [
        (("parquet", "jsonl")[number % 2], ["row"] * (stop - start), True)
        for number, (start, stop) in enumerate(pairwise(borders))
    ]
    plans = []
    for each in ([("jsonl", ["row"] * num_rows, True)], spread or [("jsonl", [], True)]):
        pattern, _ = write_files(each)
        chunks = plan_chunks(found(pattern), window_rows=chunk_rows, chunk_rows=chunk_rows, dealing=1)
        plans.append([texts_of([chunk]) for chunk in chunks])
    assert plans[0] == plans[1]


def test_the_same_files_give_the_same_plan(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n' * 20)
    files = found(f"{tmp_path}/rows.jsonl")
    assert plan_chunks(files, window_rows=6, chunk_rows=3) == plan_chunks(files, window_rows=6, chunk_rows=3)


# ---- Blank lines ----


@given(
    st.lists(st.sampled_from([b'{"text": "a"}', b"", b" \t", b"\r", b"{}", b"  x", b"\x0b"]), max_size=30), st.data()
)
@settings(deadline=None)
def test_blank_lines_are_known_wherever_blocks_end(lines, data):
    text = b"\n".join(lines) + data.draw(st.sampled_from([b"", b"\n"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "READ_BYTES", data.draw(st.integers(1, 9)))
        scan = records.RecordScan(io.BytesIO(text).read, "jsonl")
        starts = records.row_starts(scan, None)
    parts = [text[start:stop] for start, stop in pairwise(starts.tolist())]
    assert scan.blank == [number for number, part in enumerate(parts) if not part.strip()]
    assert b"".join(parts) == text
