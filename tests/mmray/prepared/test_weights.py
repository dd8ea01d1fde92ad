"""Preparing sets whose rows are left out, drawn or repeated: every row is accounted for, in every format."""

import gzip
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from mmray.errors import UserError
from mmray.packing.settings import PackingSettings
from mmray.prepared import PreparedDataset
from mmray.prepared.fingerprint import check_settings
from mmray.prepared.stages import WindowMaker
from mmray.prepared.writer import PreparedWriter
from mmray.report import prepared_page, prepared_table
from mmray.rows.plan import by_window
from mmray.rows.read import chunk_rows
from mmray.rows.settings import DatasetSettings
from mmray.run.evaluation.rows import EvaluationData, RowSet
from mmray.synthetic.documents import make_document
from tests.mmray.preparing import Preparation, contents, write_rows

PACKING = PackingSettings(token_capacity=400, visual_capacity=64, window_rows=24)
WORDS = [make_document(0, number).text[:60] for number in range(200)]


def texts(count: int, name: str = "row", words: int = 1) -> list[dict[str, Any]]:
    return [{"id": f"{name}-{n}", "text": " ".join(WORDS[(n + k) % 200] for k in range(words))} for n in range(count)]


def ids_of(prepared: PreparedDataset) -> Counter[str]:
    return Counter(row_id for packed in prepared.bins(0, len(prepared)) for row_id in packed.sample_ids)


def made(processors: dict[str, Any], *sets: dict[str, Any], **data: Any) -> Preparation:
    return Preparation(
        processors["qwen2_vl"], *({"kind": "pretrain", **each} for each in sets), packing=PACKING, **data
    )


def written_as(form: str, folder: Path, rows: list[dict[str, Any]]) -> str:
    """The rows in a file of a form; text with blank lines at its beginning, in it and at its end."""
    lines = [json.dumps(row) for row in rows]
    text = "\n".join(["", " \t", *lines[:5], "", *lines[5:], "  ", "\r", ""])
    if form == "jsonl":
        (folder / "rows.jsonl").write_text(text)
        return str(folder / "rows.jsonl")
    if form == "gz":
        (folder / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        return str(folder / "rows.jsonl.gz")
    if form == "json":
        (folder / "rows.json").write_text(json.dumps(rows))
        return str(folder / "rows.json")
    if form == "csv":
        cells = [f'{row["id"]},"{row["text"]}"' for row in rows]
        (folder / "rows.csv").write_text("\n".join(["id,text", *cells[:4], "", *cells[4:], "", ""]))
        return str(folder / "rows.csv")
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=7)
        return str(folder / "rows.parquet")
    if form == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
        return str(folder / "rows.arrow")
    if form == "tar":
        with tarfile.open(folder / "rows.tar", "w") as shard:
            for number, row in enumerate(rows):
                data = json.dumps(row).encode()
                member = tarfile.TarInfo(f"{number:04d}.json")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
        return str(folder / "rows.tar")
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([row | {"unused": "x" * 50} for row in rows]).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


FORMS = ("jsonl", "gz", "json", "csv", "parquet", "arrow", "tar", "huggingface")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("taken", "times", "total"),
    [
        ({"repeat": 2.5}, {2, 3}, 125),
        ({"repeat": 0.1}, {0, 1}, 5),
        ({"max_rows": 20}, {0, 1}, 20),
        ({"max_rows": 13, "take": "first"}, {0, 1}, 13),
    ],
)
def test_rows_of_every_form_are_taken_as_often_as_said(
    processors: dict[str, Any], tmp_path: Path, form: str, taken: dict[str, Any], times: set[int], total: int
) -> None:
    rows = texts(50)
    files = written_as(form, tmp_path, rows)
    options = {"format": "huggingface"} if form == "huggingface" else {}
    preparation = made(processors, {"files": files, **taken, **options})
    prepared = preparation.write(tmp_path / "out")
    counts, facts = ids_of(prepared), prepared.statistics
    assert counts.total() == total
    assert {counts[row["id"]] for row in rows} == times
    distinct = len(counts)
    assert facts["rows_read"] == 50 == facts["rows_packed"] + facts["rows_left_out"]
    assert (facts["rows_packed"], facts["rows_repeated"]) == (distinct, total - distinct)
    assert (facts["rows_rejected"], facts["duplicate_ids"]) == (0, 0)
    if taken.get("take") == "first":
        assert set(counts) == {row["id"] for row in rows[:13]}
    for packed in prepared.bins(0, len(prepared)):  # the text of a row is its own, and its place too
        for row_id, source in zip(packed.sample_ids, packed.sample_sources, strict=True):
            assert ":" in source
            assert row_id.startswith("row-")


def test_texts_and_places_are_those_of_the_rows(processors: dict[str, Any], tmp_path: Path) -> None:
    rows = texts(50)
    path = Path(written_as("jsonl", tmp_path, rows))
    lines = path.read_text().split("\n")
    preparation = made(processors, {"files": str(path), "repeat": 1.3})
    decode = preparation.family.tokenizer.decode
    prepared = preparation.write(tmp_path / "out")
    for packed in prepared.bins(0, len(prepared)):
        start = 0
        for row_id, source, length in zip(
            packed.sample_ids, packed.sample_sources, packed.sample_lengths.tolist(), strict=True
        ):
            line = json.loads(lines[int(source.rpartition(":")[2]) - 1])
            assert line["id"] == row_id
            assert decode(packed.input_ids[start : start + length].tolist()).startswith(line["text"])
            start += length


def mixed_sets(folder: Path) -> list[dict[str, Any]]:
    """Three sets of several files, with bad rows, two rows with one id, and blank lines."""
    bad = [{"id": f"bad-{n}", "text": ""} for n in range(3)]
    twice = [{"id": "twice", "text": "one of two"}, {"id": "twice", "text": "two of two"}]
    for part in range(3):
        write_rows(folder / f"a-{part}.jsonl", texts(17 + part, f"a{part}") + bad[part : part + 1])
    (folder / "b.jsonl").write_text("\n\n".join(map(json.dumps, texts(40, "b") + twice)))
    pq.write_table(pa.Table.from_pylist(texts(90, "c", words=3)), folder / "c.parquet", row_group_size=11)
    return [
        {"files": f"{folder}/a-*.jsonl", "repeat": 2.5},
        {"files": f"{folder}/b.jsonl"},
        {"files": f"{folder}/c.parquet", "max_rows": 31},
    ]


def test_every_row_is_accounted_for_by_sets(processors: dict[str, Any], tmp_path: Path) -> None:
    prepared = made(processors, *mixed_sets(tmp_path)).write(tmp_path / "out")
    facts, counts = prepared.statistics, ids_of(prepared)
    a, b, c = (facts["sets"][str(number)] for number in range(3))
    assert (a["rows_read"], a["rows_packed"], a["rows_rejected"], a["rows_left_out"]) == (57, 54, 3, 0)
    assert a["rows_repeated"] == sum(counts[name] - 1 for name in counts if name.startswith("a"))
    assert 54 + 24 <= a["rows_repeated"] <= 54 + 28, "every row again, and a half of all 57 rows"
    assert (b["rows_read"], b["rows_packed"], b["rows_repeated"], b["rows_left_out"]) == (42, 42, 0, 0)
    assert (c["rows_read"], c["rows_packed"], c["rows_left_out"]) == (90, 31, 59)
    for name in ("rows_read", "rows_packed", "rows_rejected", "rows_left_out", "rows_repeated", "tokens"):
        assert facts[name] == a[name] + b[name] + c[name]
    assert facts["rows_read"] == facts["rows_packed"] + facts["rows_rejected"] + facts["rows_left_out"]
    assert facts["rejected_by_reason"] == {"empty_text": 3}
    assert prepared.rejected().num_rows == 3
    assert facts["duplicate_ids"] == 1, "the row with the id of another; not what is repeated"
    assert facts["examples"]["duplicate_ids"] == ["twice"]
    of_sets = [Counter(packed.sample_sets.tolist()) for packed in prepared.bins(0, len(prepared))]
    assert [a["bins"], b["bins"], c["bins"]] == [sum(number in sets for sets in of_sets) for number in range(3)]


def test_table_and_page_show_the_sets(processors: dict[str, Any], tmp_path: Path) -> None:
    prepared = made(processors, *mixed_sets(tmp_path)).write(tmp_path / "out")
    console = Console(width=200, file=io.StringIO())
    console.print(prepared_table(prepared))
    shown = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "189 read = 127 packed + 3 rejected + 59 left out" in shown
    c = prepared.statistics["sets"]["2"]
    share = c["tokens"] / prepared.statistics["tokens"]
    assert f"90 rows (31 packed, 59 left out), {c['tokens']:,} tokens ({share:.1%}), {c['bins']} bins" in shown
    page = prepared_page(prepared)
    assert "<th>left out</th>" in page
    assert "<td>59</td>" in page
    assert f"<td>{share * 100:.1f} %</td>" in page


def test_windows_are_equal_in_any_order_and_after_a_stop(processors: dict[str, Any], tmp_path: Path) -> None:
    sets = mixed_sets(tmp_path)
    expected = contents(made(processors, *sets).write(tmp_path / "out").path)

    def backwards(context: Any, token: str, chunks: Any, _sizes: Any) -> Any:
        for window in reversed(list(by_window(chunks))):
            yield WindowMaker(context, token)(window)

    def stopped(context: Any, token: str, chunks: Any, _sizes: Any) -> Any:
        for number, window in enumerate(by_window(chunks)):
            if number == 2:
                raise KeyboardInterrupt
            yield WindowMaker(context, token)(window)

    assert contents(made(processors, *sets).write(tmp_path / "back", run_windows=backwards).path) == expected
    with pytest.raises(KeyboardInterrupt):
        made(processors, *sets).write(tmp_path / "stopped", run_windows=stopped)
    assert contents(made(processors, *sets).write(tmp_path / "stopped").path) == expected
    again = made(processors, *sets).write(tmp_path / "other", run_windows=backwards)
    assert contents(again.path) == expected


def test_another_seed_draws_other_rows_and_as_many(processors: dict[str, Any], tmp_path: Path) -> None:
    sets = mixed_sets(tmp_path)
    one = ids_of(made(processors, *sets).write(tmp_path / "one"))
    two = ids_of(made(processors, *sets, seed=7).write(tmp_path / "two"))
    assert one != two
    assert abs(one.total() - two.total()) <= 2
    with pytest.raises(UserError, match=r"seed: None -> 7"):
        made(processors, *sets, seed=7).write(tmp_path / "one")


def test_copies_of_a_duplicate_go_the_way_of_the_first(processors: dict[str, Any], tmp_path: Path) -> None:
    """With `duplicate_ids: reject`, whatever follows of the second row with an id is left away too."""
    rows = [*texts(30, "x"), {"id": "x-3", "text": "a second text"}, *texts(10, "y"), {"id": "y-1", "text": "another"}]
    sets = [
        {"files": write_rows(tmp_path / "rows.jsonl", rows), "repeat": 3.4},
        {"files": write_rows(tmp_path / "more.jsonl", [*texts(5, "x"), *texts(5, "z")])},
    ]
    preparation = made(processors, *sets, duplicate_ids="reject", max_rejected_share=1)
    prepared = preparation.write(tmp_path / "out")
    facts, counts = prepared.statistics, ids_of(prepared)
    assert facts["rejected_by_reason"] == {"duplicate_id": 7}
    assert facts["rows_read"] == 52 == facts["rows_packed"] + facts["rows_rejected"]
    texts_of = Counter[str]()
    decode = preparation.family.tokenizer.decode
    for packed in prepared.bins(0, len(prepared)):
        start = 0
        for row_id, length in zip(packed.sample_ids, packed.sample_lengths.tolist(), strict=True):
            texts_of[f"{row_id}: {decode(packed.input_ids[start : start + length].tolist())[:9]}"] += 1
            start += length
    by_id = Counter(name.partition(":")[0] for name in texts_of)
    assert set(by_id.values()) == {1}, "of each id one row alone is trained on, however often"
    assert all(counts[f"y-{n}"] in (3, 4) for n in range(10))


def test_weights_deal_out_rows_and_tokens(processors: dict[str, Any], tmp_path: Path) -> None:
    short = write_rows(tmp_path / "short.jsonl", texts(300, "s"))
    long = write_rows(tmp_path / "long.jsonl", texts(40, "l", words=4))
    sets = [{"files": short, "weight": 1}, {"files": long, "weight": 1}]
    by_rows = made(processors, *sets, rows=200).write(tmp_path / "rows").statistics["sets"]
    assert [by_rows[n]["rows_packed"] + by_rows[n]["rows_repeated"] for n in "01"] == [100, 100]
    assert (by_rows["0"]["rows_left_out"], by_rows["1"]["rows_repeated"]) == (200, 60)
    prepared = made(processors, *sets, rows=200, weigh_by="tokens").write(tmp_path / "tokens")
    by_tokens = prepared.statistics["sets"]
    assert sum(by_tokens[n]["rows_packed"] + by_tokens[n]["rows_repeated"] for n in "01") == 200
    assert by_tokens["0"]["tokens"] == pytest.approx(by_tokens["1"]["tokens"], rel=0.1)
    lengths = prepared.manifest["tokens_per_row"]
    assert lengths[1] == pytest.approx(by_rows["1"]["tokens"] / 100, rel=0.1)


def test_a_continued_prepare_keeps_what_was_measured(
    processors: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of other lengths would be measured, were it measured again: by what cannot be reached at the moment."""
    short = write_rows(tmp_path / "short.jsonl", texts(300, "s"))
    long = write_rows(tmp_path / "long.jsonl", texts(40, "l", words=4))
    sets = [{"files": short, "weight": 1}, {"files": long, "weight": 1}]
    options = {"rows": 200, "weigh_by": "tokens"}
    expected = contents(made(processors, *sets, **options).write(tmp_path / "whole").path)

    def stopped(context: Any, token: str, chunks: Any, _sizes: Any) -> Any:
        yield WindowMaker(context, token)(next(iter(by_window(chunks))))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(processors, *sets, **options).write(tmp_path / "out", run_windows=stopped)
    monkeypatch.setattr("mmray.prepared.weighing.WEIGHED_ROWS", 1)
    assert contents(made(processors, *sets, **options).write(tmp_path / "out").path) == expected


def test_training_on_what_was_prepared_with_other_weights_is_refused(
    processors: dict[str, Any], tmp_path: Path
) -> None:  # fmt: skip
    path = write_rows(tmp_path / "rows.jsonl", texts(20))
    preparation = made(processors, {"files": path, "repeat": 2})
    record = json.loads(json.dumps(preparation.record))
    now: dict[str, Any] = {
        "processor": preparation.family.processor, "tiling": preparation.policy, "packing": PACKING, "loss": "sampled",
    }  # fmt: skip
    check_settings("some/folder", record, **now, datasets=preparation.data.train, data=preparation.data)
    once = (DatasetSettings(files=(path,), kind="pretrain"),)
    with pytest.raises(UserError, match=r"datasets\[0\]\.repeat: 2\.0 -> None"):
        check_settings("some/folder", record, **now, datasets=once, data=preparation.data)
    other = preparation.data.model_copy(update={"seed": 4})
    with pytest.raises(UserError, match=r"data\.seed: None -> 4"):
        check_settings("some/folder", record, **now, datasets=preparation.data.train, data=other)


def test_the_writer_tells_two_runs_that_measured_otherwise(processors: dict[str, Any], tmp_path: Path) -> None:
    record = made(processors, {"files": write_rows(tmp_path / "rows.jsonl", texts(3))}).record
    PreparedWriter(str(tmp_path / "out")).begin(record, [10.0, 20.0])
    with pytest.raises(UserError, match="another run has just begun here"):
        PreparedWriter(str(tmp_path / "out")).begin(record, [10.0, 21.0])


def test_an_evaluation_reads_the_rows_that_preparing_takes_each_once(
    processors: dict[str, Any], tmp_path: Path
) -> None:  # fmt: skip
    sets = mixed_sets(tmp_path)
    prepared = made(processors, *sets, seed=5).write(tmp_path / "out")
    settings = [DatasetSettings.model_validate({"kind": "pretrain", **each}) for each in sets]
    data = EvaluationData("eval", tuple(RowSet(str(n), dataset, n) for n, dataset in enumerate(settings)), seed=5)
    rows = [row.value for chunk in data.chunks(None) for row in chunk_rows(chunk)]
    ids = Counter(row["id"] for row in rows if isinstance(row, dict) and row["text"])
    assert ids == Counter(dict.fromkeys(ids_of(prepared), 1)) | Counter(twice=2)
    last = EvaluationData("eval", data.sets[2:], seed=5)  # a set alone has the rows that it has among others
    alone = {row.value["id"] for chunk in last.chunks(None) for row in chunk_rows(chunk)}
    assert alone == {row_id for row_id in ids if row_id.startswith("c-")}
