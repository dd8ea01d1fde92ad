"""Preparing with the library alone: the accounting, continuing, refusing."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mmray.config.job import Job
from mmray.errors import UserError
from mmray.prepared import PreparedDataset
from mmray.prepared.driver import prepare, run_windows_here
from mmray.prepared.stages import ChunkEncoder, PrepareContext
from mmray.report import prepared_table
from mmray.rows.files import source_files
from mmray.rows.plan import plan_chunks
from tests.conftest import Inputs, write_inputs
from tests.here import prepare_here, prepare_without_ray
from tests.mmray.preparing import contents

WINDOW_ROWS = 20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Those of the tests on Ray, in place of this folder's."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def job_of(inputs: Inputs, folder: Path, **changes: object) -> Job:
    return Job.model_validate(inputs.job(folder, packing__window_rows=WINDOW_ROWS, **changes))


def job_on(rows: Path, inputs: Inputs, folder: Path, **data: object) -> Job:
    """A job on the rows of one file, whose images lie with the inputs."""
    pages = {"files": str(rows), "kind": "pretrain", "image_root": str(inputs.folder / "data")}
    return job_of(inputs, folder, data={"train": [pages], **data})


@pytest.fixture
def rows(inputs: Inputs, tmp_path: Path) -> Path:
    """A copy of the pages' rows; it may be spoiled."""
    return shutil.copy(inputs.folder / "data" / "pages.jsonl", tmp_path / "rows.jsonl")


@pytest.fixture(scope="module")
def prepared(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, PreparedDataset]:
    job = job_of(inputs, tmp_path_factory.mktemp("prepared"))
    calls: list[tuple[int, int]] = []
    dataset, made = prepare(job, on_progress=lambda done, total: calls.append((done, total)))
    assert made
    total = sum(inputs.rows.values())
    assert calls == [(min(done, total), total) for done in range(0, total + WINDOW_ROWS, WINDOW_ROWS)]
    return job, dataset


def once(do: Callable[[], object]) -> Callable[[int, int], None]:
    """A progress callback that does something when the first window is committed."""
    left = [do]

    def on_progress(done: int, total: int) -> None:
        if done and left:
            left.pop()()

    return on_progress


def test_every_row_is_packed_or_rejected_with_its_reason(prepared: tuple[Job, PreparedDataset], inputs: Inputs) -> None:
    _, dataset = prepared
    facts = dataset.statistics
    assert facts["rows_read"] == sum(inputs.rows.values()) == facts["rows_packed"] + facts["rows_rejected"]
    assert facts["rejected_by_reason"] == dict(sorted(inputs.rejects.items()))
    assert dataset.rejected().num_rows == sum(inputs.rejects.values())
    ids = [sample for number in range(len(dataset)) for sample in dataset.bin(number).sample_ids]
    assert len(ids) == len(set(ids)) == facts["rows_packed"]
    assert len(dataset.manifest["shards"]) == -(-facts["rows_read"] // WINDOW_ROWS)
    assert sorted(path.name for path in Path(dataset.path).iterdir()) == sorted(
        ["manifest.json", "rejected.parquet", *(shard["file"] for shard in dataset.manifest["shards"])]
    )


def test_the_table_shows_a_row_of_each_reason(prepared: tuple[Job, PreparedDataset]) -> None:
    dataset = prepared[1]
    console = Console(width=1000, file=io.StringIO())
    console.print(prepared_table(dataset))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    first = {row["reason"]: row for row in reversed(dataset.rejected().to_pylist())}
    assert len(first) == 5
    for row in first.values():
        assert f"{row['source']}: {row['message']}" in shown


def test_a_prepare_that_is_killed_continues_where_there_is_no_ray(
    prepared: tuple[Job, PreparedDataset], inputs: Inputs, tmp_path: Path
) -> None:
    """Its finished windows are kept, and the result is the same to the byte."""
    job = job_of(inputs, tmp_path)
    assert prepare_without_ray(job, tmp_path, kill=True).returncode == -9
    (first,) = (tmp_path / "prepared/train").glob("bins-*")
    written = first.stat().st_mtime_ns
    done = prepare_without_ray(job, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 windows are there from an earlier run and are kept" in done.stderr
    assert contents(job.prepared_path("train")) == contents(prepared[1].path)
    assert first.stat().st_mtime_ns == written


def test_the_first_window_chooses_the_cost_of_all_bins_once(inputs: Inputs, tmp_path: Path) -> None:
    """It is made alone; a run that continues reads what it chose, and the result is the same to the byte."""
    whole, stopped = (job_of(inputs, tmp_path / name, packing__mode="equal_cost") for name in ("whole", "stopped"))
    turns: list[tuple[float | None, list[int]]] = []

    def run_windows(context: PrepareContext, *arguments: Any) -> Iterator[int]:
        turns.append((context.bin_cost, []))
        for number in run_windows_here(context, *arguments):
            turns[-1][1].append(number)
            yield number

    expected, _ = prepare(whole, run_windows=run_windows)
    num_windows = len(expected.manifest["shards"])
    (unplanned, first), (bin_cost, others) = turns
    assert (unplanned, first, others) == (None, [0], list(range(1, num_windows)))
    assert bin_cost is not None
    turns.clear()

    def stop() -> None:
        raise KeyboardInterrupt

    for _ in range(2):  # after the first window, and after the second
        with pytest.raises(KeyboardInterrupt):
            prepare(
                stopped, on_progress=once(stop) if not turns else at(3 * WINDOW_ROWS, stop), run_windows=run_windows
            )
    prepare(stopped, run_windows=run_windows)
    assert [cost for cost, _ in turns] == [None, bin_cost, bin_cost]
    assert contents(stopped.prepared_path("train")) == contents(expected.path)


def at(rows: int, do: Callable[[], object]) -> Callable[[int, int], None]:
    """A progress callback that does something when so many rows are done."""
    return lambda done, total: do() if done == rows else None


def test_a_second_run_does_nothing_and_other_settings_are_refused(
    prepared: tuple[Job, PreparedDataset], inputs: Inputs
) -> None:
    job, dataset = prepared
    before = {path: path.stat().st_mtime_ns for path in Path(dataset.path).iterdir()}
    again, made = prepare(job)
    assert not made
    assert again.fingerprint == dataset.fingerprint
    assert {path: path.stat().st_mtime_ns for path in Path(dataset.path).iterdir()} == before

    other = Job.model_validate(inputs.job(Path(job.output.run).parent, packing__token_capacity=600))
    with pytest.raises(UserError, match=r"packing\.token_capacity: 512 -> 600"):
        prepare(other)


def test_the_manifest_says_what_the_loss_comes_from_and_names_processor_and_model(
    prepared: tuple[Job, PreparedDataset], inputs: Inputs
) -> None:
    manifest = prepared[1].manifest
    assert manifest["loss_sources"] == ["all", "messages"]
    assert manifest["record"]["loss"] == "sampled"
    assert manifest["processor_source"] == str(inputs.folder / "processor")
    assert (manifest["model_type"], manifest["model_family"]) == ("qwen2_vl", "Qwen2VL")


def test_a_loss_that_cannot_work_stops_before_anything_is_written_or_deleted(
    prepared: tuple[Job, PreparedDataset], inputs: Inputs, tmp_path: Path
) -> None:
    """From the first rows: no window is made, and what --replace would delete is still there."""
    job, dataset = prepared

    def unasked(*_: Any) -> Any:
        pytest.fail("a window was asked for")

    wrong = {"roles": ["assistant"], "boundaries": [{"role": "assistant", "start": "<nowhere>"}]}
    never = r"data\.train\[1\] \(chat\): no turn of role 'assistant' begins .* Row .* begins "
    with pytest.raises(UserError, match=never):
        prepare(job_of(inputs, tmp_path, loss=wrong), run_windows=unasked)
    assert not (tmp_path / "prepared").exists()
    before = contents(dataset.path)
    with pytest.raises(UserError, match=never):
        prepare(job_of(inputs, Path(job.output.run).parent, loss=wrong), replace=True, run_windows=unasked)
    assert contents(dataset.path) == before
    assert PreparedDataset(dataset.path).fingerprint == dataset.fingerprint


def test_a_size_cache_of_an_unknown_kind_stops_before_anything_is_deleted(
    prepared: tuple[Job, PreparedDataset], inputs: Inputs
) -> None:
    job, dataset = prepared
    data = job.data.model_copy(update={"size_cache": "nosuch://sizes"})
    before = contents(dataset.path)
    with pytest.raises(UserError, match="nosuch://sizes"):
        prepare(job.model_copy(update={"data": data}), replace=True)
    assert contents(dataset.path) == before


def test_on_bad_row_error_stops_with_file_and_line(inputs: Inputs, tmp_path: Path) -> None:
    content = inputs.job(tmp_path)
    content["data"]["on_bad_row"] = "error"  # type: ignore[index]
    data = inputs.folder / "data"
    with pytest.raises(UserError, match=rf"{data}/(pages|chat)\.jsonl:\d+: (image_|placeholder|bad_json|too_long)"):
        prepare_here(Job.model_validate(content))
    assert not (tmp_path / "prepared" / "train" / "manifest.json").exists()
    assert json.loads((tmp_path / "prepared" / "train" / "plan.json").read_text())["fingerprint"]


def test_rows_are_verified_where_most_lines_are_blank(
    inputs: Inputs, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows.write_text("\n" * 60 + "\n".join(rows.read_text().splitlines()[:3]))
    job = job_on(rows, inputs, tmp_path)
    (chunk,) = plan_chunks(source_files(job.data.train), window_rows=64, chunk_rows=64)
    encode = ChunkEncoder(PrepareContext.of(job, "train"))
    verified = []
    monkeypatch.setattr(encode._encoder, "_verify", lambda item, sample: verified.append(sample.source))
    encode(replace(chunk, verify=(5, 30, 62)))
    assert verified == [f"{rows}:{line}" for line in (61, 62, 63)]


def test_rows_that_change_while_they_are_prepared_stop_it(inputs: Inputs, rows: Path, tmp_path: Path) -> None:
    job = job_on(rows, inputs, tmp_path / "job")

    def lose_lines() -> None:
        lines = rows.read_text().splitlines(keepends=True)
        rows.write_text("".join(lines[:30]))

    with pytest.raises(UserError, match=f"{rows} has changed while it was being prepared; .* --replace"):
        prepare_here(job, on_progress=once(lose_lines))
    with pytest.raises(UserError, match="no prepared dataset"):
        PreparedDataset(job.prepared_path("train"))
    with pytest.raises(UserError, match=r"(?s)files\[0\]: .* -> .*--replace"):
        prepare_here(job)


def test_a_folder_that_breaks_is_one_line_and_the_next_run_has_the_same_result(
    inputs: Inputs, rows: Path, tmp_path: Path
) -> None:
    """A file where the folder was, from the first window on."""
    job = job_on(rows, inputs, tmp_path / "broken")
    folder, aside = Path(job.prepared_path("train")), tmp_path / "aside"

    def put_a_file() -> None:
        folder.rename(aside)
        folder.write_text("in the way")

    with pytest.raises(UserError, match=rf"^{folder}: [\w ]+; a file stands where a folder should be; move it, or"):
        prepare_here(job, on_progress=once(put_a_file))
    folder.unlink()
    aside.rename(folder)
    (committed,) = folder.glob("bins-*")
    written = committed.stat().st_mtime_ns
    expected = prepare_here(job_on(rows, inputs, tmp_path / "whole"))
    assert contents(prepare_here(job).path) == contents(expected.path)
    assert committed.stat().st_mtime_ns == written


def test_rows_with_an_earlier_id_are_rejected_and_blank_lines_are_progress(
    inputs: Inputs, rows: Path, tmp_path: Path
) -> None:
    write_twice(rows)
    calls: list[int] = []
    job = job_on(rows, inputs, tmp_path, duplicate_ids="reject")
    dataset = prepare_here(job, on_progress=lambda done, total: calls.append(done))
    assert calls == [*range(0, 121, 20), 132], "blank lines are no rows, but progress"
    assert_later_ones_rejected(dataset, rows)


# ---- How many rows may be rejected ----


def write_pages(path: Path, good: int, bad: int) -> None:
    """Rows without images, the good before the bad."""
    lines = [
        {"id": f"row-{number}", "text": f"words {number}" if number < good else ""} for number in range(good + bad)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_set_with_too_many_rejected_rows_stops_and_a_larger_share_continues(
    inputs: Inputs, rows: Path, tmp_path: Path
) -> None:
    """As soon as all of its rows, those to come too, allow no fewer: of 200 rows, twenty may be bad."""
    write_pages(rows, good=100, bad=100)
    job = job_on(rows, inputs, tmp_path)
    progress: list[int] = []
    place = f"{rows}:101: text is empty"
    told = (
        rf"data\.train\[0\] \(pretrain\): 40 of 200 rows are rejected, 20\.0%, .* 5\.0%: 40 empty_text, such as {place}"
    )
    with pytest.raises(UserError, match=told):
        prepare_here(job, on_progress=lambda done, total: progress.append(done))
    assert progress == [0, 20, 40, 60, 80, 100, 120, 140]
    with pytest.raises(UserError, match=told):
        prepare_here(job, run_windows=lambda *_: pytest.fail("what is there is judged first"))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared/train").glob("bins-*")}
    dataset = prepare_here(job_on(rows, inputs, tmp_path, max_rejected_share=0.6))
    assert dataset.statistics["rejected_by_reason"] == {"empty_text": 100}
    assert written.items() <= {path: path.stat().st_mtime_ns for path in Path(dataset.path).iterdir()}.items()
    assert "max_rejected_share" not in json.dumps(dataset.manifest)
    assert not prepare(job)[1], "what is finished is used as it is"


@pytest.mark.parametrize(("bad", "stops"), [(20, False), (21, True)])
def test_twenty_rows_may_be_rejected_whatever_their_share(
    inputs: Inputs, rows: Path, tmp_path: Path, bad: int, stops: bool
) -> None:
    write_pages(rows, good=5, bad=bad)
    job = job_on(rows, inputs, tmp_path)
    if stops:
        with pytest.raises(UserError, match=f"{bad} of 26 rows are rejected"):
            prepare_here(job)
    else:
        assert prepare_here(job).statistics["rows_rejected"] == bad


def test_blank_lines_make_no_share_smaller(inputs: Inputs, rows: Path, tmp_path: Path) -> None:
    write_pages(rows, good=379, bad=21)
    assert prepare_here(job_on(rows, inputs, tmp_path / "allowed", max_rejected_share=0.0525)).statistics["bins"] > 0
    rows.write_text(rows.read_text() + "\n" * 100)
    with pytest.raises(UserError, match=r"21 of 400 rows are rejected, 5\.2%, .* allows 5\.2%"):
        prepare_here(job_on(rows, inputs, tmp_path / "refused", max_rejected_share=0.052))


def test_each_set_is_judged_by_its_own_rows(inputs: Inputs, rows: Path, tmp_path: Path) -> None:
    """Thirty bad rows are few of all, but many of the set that has them; the windows hold rows of both."""
    write_pages(rows, good=70, bad=30)
    many = tmp_path / "many.jsonl"
    write_pages(many, good=1000, bad=0)
    job = job_on(many, inputs, tmp_path)
    second = job.data.train[0].model_copy(update={"files": (str(rows),)})
    data = job.data.model_copy(update={"train": (*job.data.train, second)})
    with pytest.raises(UserError, match=r"data\.train\[1\] \(pretrain\): 2\d of 100 rows are rejected, 2\d\.0%"):
        prepare_here(job.model_copy(update={"data": data}))


def test_a_set_of_which_no_first_row_is_good_stops_before_anything_is_written(
    inputs: Inputs, rows: Path, tmp_path: Path
) -> None:
    """Such as one whose text has another name: the rest of a million rows is not read."""
    rows.write_text("".join(json.dumps({"caption": f"words {number}"}) + "\n" for number in range(100)))
    none = (
        r"data\.train\[0\] \(pretrain\): none of its first rows can be used, 64 looked at: 64 missing_column, such as"
    )
    with pytest.raises(UserError, match=none):
        prepare_here(job_on(rows, inputs, tmp_path))
    assert not (tmp_path / "prepared").exists()
    dataset = prepare_here(job_on(rows, inputs, tmp_path, max_rejected_share=1))
    assert (len(dataset), dataset.statistics["rows_rejected"]) == (0, 100)
    with pytest.raises(UserError, match="has no bins: every row was rejected, see its rejected"):
        dataset.check_has_bins()


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_set_without_rows_stops_before_anything_is_written(
    inputs: Inputs, rows: Path, tmp_path: Path, content: str
) -> None:
    """Beside another set, whose rows alone would be trained on."""
    empty = tmp_path / "empty.jsonl"
    empty.write_text(content)
    good = {"files": str(rows), "kind": "pretrain", "image_root": str(inputs.folder / "data")}
    job = job_of(inputs, tmp_path, data={"train": [good, {"files": str(empty), "kind": "pretrain"}]})
    with pytest.raises(UserError, match=rf"data.train\[1\] \(pretrain\): its files hold no rows: {empty}; name others"):
        prepare_here(job)
    assert not Path(job.prepared_path("train")).exists()


def write_twice(rows: Path) -> None:
    """Rows of which nine have the id of an earlier one, with blank lines."""
    first = [{"id": f"id-{number}", "text": f"words {number}"} for number in range(12)]
    rows.write_text("\n\n".join(map(json.dumps, [*first, *first[3:], {"id": "last", "text": "words"}])) + "\n" * 90)


def assert_later_ones_rejected(dataset: PreparedDataset, rows: Path) -> None:
    facts = dataset.statistics
    assert facts["rows_read"] == 22 == facts["rows_packed"] + facts["rows_rejected"]
    assert facts["rejected_by_reason"] == {"duplicate_id": 9}
    assert facts["duplicate_ids"] == 0
    places = [row["source"] for row in dataset.rejected().to_pylist() if row["reason"] == "duplicate_id"]
    assert places == [f"{rows}:{line}" for line in range(25, 43, 2)]
