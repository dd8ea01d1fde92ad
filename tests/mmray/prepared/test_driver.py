"""Preparing with the library alone: the accounting, continuing, refusing."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmray.config import Job
from mmray.errors import UserError
from mmray.prepared import PreparedDataset
from mmray.prepared.driver import prepare
from mmray.prepared.stages import ChunkEncoder, PrepareContext
from mmray.rows.files import plan_chunks, source_files
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
    assert manifest["loss_sources"] == ["all", "boundaries"]
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
