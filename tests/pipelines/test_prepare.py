"""Preparing, on a real Ray where it is `prepare`: the accounting, equality to the byte, continuing, refusing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmray.config.job import Job
from mmray.errors import UserError
from mmray.prepared import PreparedDataset, PreparedWriter
from mmray.rows.files import plan_chunks, source_files
from pipelines import measures
from pipelines.prepare import EncodeChunk, PrepareContext, prepare
from tests.conftest import Inputs, RayHead
from tests.here import prepare_here, run_here
from tests.scraping import scraped, wait_until


@pytest.fixture(scope="module")
def prepared(
    ray_head: RayHead, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Job, PreparedDataset]:
    folder = tmp_path_factory.mktemp("prepared")
    job = Job.model_validate(inputs.job(folder, name="prepared", resources__encode_actors=2))
    seen: list[tuple[int, int]] = []
    dataset, made = prepare(job, "train", on_progress=lambda done, total: seen.append((done, total)))
    assert made
    total = sum(inputs.rows.values())
    assert seen[0] == (0, total)
    assert seen[-1][0] == seen[-1][1] == total
    return job, dataset


def bins_of(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.parquet"))}


def test_every_row_is_packed_or_rejected_with_its_reason(prepared: tuple[Job, PreparedDataset], inputs: Inputs) -> None:
    _, dataset = prepared
    facts = dataset.statistics
    assert facts["rows_read"] == sum(inputs.rows.values()) == facts["rows_packed"] + facts["rows_rejected"]
    assert facts["rejected_by_reason"] == dict(sorted(inputs.rejects.items()))
    assert dataset.rejected().num_rows == sum(inputs.rejects.values())
    ids = [sample for number in range(len(dataset)) for sample in dataset.bin(number).sample_ids]
    assert len(ids) == len(set(ids)) == facts["rows_packed"]
    assert len(dataset.manifest["shards"]) == -(-facts["rows_read"] // 64)
    assert sorted(path.name for path in Path(dataset.path).iterdir()) == sorted(
        ["manifest.json", "rejected.parquet", *(shard["file"] for shard in dataset.manifest["shards"])]
    )


def test_prometheus_is_told_the_same_counts(prepared: tuple[Job, PreparedDataset]) -> None:
    """At the node's endpoint, summed over all actors, also after these are gone."""
    facts = prepared[1].statistics
    wait_until(lambda: ("train",) in scraped(measures.BINS_WRITTEN, job_name="prepared"))
    assert scraped(measures.ROWS_READ, job_name="prepared") == {("train",): facts["rows_read"]}
    assert scraped(measures.ROWS_PACKED, job_name="prepared") == {("train",): facts["rows_packed"]}
    assert scraped(measures.BINS_WRITTEN, job_name="prepared") == {("train",): len(prepared[1])}
    rejected = {("train", reason): rows for reason, rows in facts["rejected_by_reason"].items()}
    assert scraped(measures.ROWS_REJECTED, job_name="prepared") == rejected
    assert set(scraped(measures.STAGE_BUSY_SECONDS, job_name="prepared")) == {("encode",), ("pack",)}


def test_another_number_of_actors_and_a_continued_run_give_the_same_bytes(
    prepared: tuple[Job, PreparedDataset], inputs: Inputs, tmp_path: Path
) -> None:
    _, dataset = prepared
    job = Job.model_validate(inputs.job(tmp_path, resources__encode_actors=1))
    context = PrepareContext(job, "train")
    files = source_files(context.datasets)
    chunks = plan_chunks(files, window_rows=64, chunk_rows=64)
    writer = PreparedWriter(context.path)
    writer.begin(context.record(files))
    only = [chunk for chunk in chunks if chunk.window == 1]
    assert list(run_here(job, "train", writer.token, only, dealing=2)) == [chunks[1].num_rows]
    (first,) = Path(context.path).glob("bins-00001-*.parquet")
    written = first.stat().st_mtime_ns

    again, made = prepare(job, "train")  # as after a crash: one window is there, the others are not
    assert made
    assert first.stat().st_mtime_ns == written
    assert again.fingerprint == dataset.fingerprint
    assert bins_of(again.path) == bins_of(dataset.path)


def test_rows_are_verified_where_most_lines_are_blank(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (inputs.folder / "data" / "pages.jsonl").read_text().splitlines()[:3]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n" * 60 + "\n".join(lines))
    content = inputs.job(tmp_path)
    content["data"]["train"] = [  # type: ignore[index]
        {"files": str(rows), "kind": "pretrain", "image_root": str(inputs.folder / "data")}
    ]
    job = Job.model_validate(content)
    (chunk,) = plan_chunks(source_files(job.data.train), window_rows=64, chunk_rows=64)
    actor = EncodeChunk(job, "train")
    verified = []
    monkeypatch.setattr(actor.encoder, "_verify", lambda item, sample: verified.append(sample.source))
    actor({"chunk": [replace(chunk, verify=(5, 30, 62))]})
    assert verified == [f"{rows}:{line}" for line in (61, 62, 63)]


def test_a_second_run_does_nothing_and_other_settings_are_refused(
    prepared: tuple[Job, PreparedDataset], inputs: Inputs
) -> None:
    job, dataset = prepared
    before = {path: path.stat().st_mtime_ns for path in Path(dataset.path).iterdir()}
    again, made = prepare(job, "train")
    assert not made
    assert again.fingerprint == dataset.fingerprint
    assert {path: path.stat().st_mtime_ns for path in Path(dataset.path).iterdir()} == before

    other = Job.model_validate(inputs.job(Path(job.output.run).parent, packing__token_capacity=600))
    with pytest.raises(UserError, match=r"packing\.token_capacity: 512 -> 600"):
        prepare(other, "train")


def test_the_manifest_says_what_the_loss_comes_from(prepared: tuple[Job, PreparedDataset]) -> None:
    _, dataset = prepared
    assert dataset.manifest["loss_sources"] == ["all", "boundaries"]
    assert dataset.manifest["record"]["loss"] == "sampled"


def test_the_manifest_names_the_processor_and_the_model(prepared: tuple[Job, PreparedDataset], inputs: Inputs) -> None:
    _, dataset = prepared
    assert dataset.manifest["processor_source"] == str(inputs.folder / "processor")
    assert dataset.manifest["model_type"] == "qwen2_vl"


def test_a_loss_that_cannot_work_stops_before_anything_is_written_or_deleted(
    prepared: tuple[Job, PreparedDataset], inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the driver, from the first rows: no actor starts, and what --replace would delete is still there."""
    job, dataset = prepared
    monkeypatch.setattr("pipelines.prepare._run", lambda *_: pytest.fail("an actor was asked for"))
    wrong = {"roles": ["assistant"], "boundaries": [{"role": "assistant", "start": "<nowhere>"}]}
    never = r"data\.train\[1\] \(chat\): no turn of role 'assistant' begins .* Row .* begins "
    with pytest.raises(UserError, match=never):
        prepare(Job.model_validate(inputs.job(tmp_path, loss=wrong)), "train")
    assert not (tmp_path / "prepared").exists()
    before = bins_of(dataset.path)
    with pytest.raises(UserError, match=never):
        prepare(Job.model_validate(inputs.job(Path(job.output.run).parent, loss=wrong)), "train", replace=True)
    assert bins_of(dataset.path) == before
    assert PreparedDataset(dataset.path).fingerprint == dataset.fingerprint


def test_on_bad_row_error_stops_with_file_and_line(inputs: Inputs, tmp_path: Path) -> None:
    content = inputs.job(tmp_path)
    content["data"]["on_bad_row"] = "error"  # type: ignore[index]
    data = inputs.folder / "data"
    with pytest.raises(UserError, match=rf"{data}/(pages|chat)\.jsonl:\d+: (image_|placeholder|bad_json|too_long)"):
        prepare_here(Job.model_validate(content))
    assert not (tmp_path / "prepared" / "train" / "manifest.json").exists()
    assert json.loads((tmp_path / "prepared" / "train" / "plan.json").read_text())["fingerprint"]
