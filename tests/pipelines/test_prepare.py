"""Preparing on a real Ray: the accounting, equality to the byte, continuing, refusing."""

import json
from pathlib import Path

import pytest

from mmray.config import Job
from mmray.errors import UserError
from mmray.prepared import PreparedDataset, PreparedWriter
from mmray.rows.files import plan_chunks, source_files
from pipelines.prepare import PrepareContext, _run, prepare
from tests.conftest import Inputs, RayHead


@pytest.fixture(scope="module")
def prepared(
    ray_head: RayHead, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Job, PreparedDataset]:
    job = Job.model_validate(inputs.job(tmp_path_factory.mktemp("prepared")))
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
    assert list(_run(job, "train", [chunk for chunk in chunks if chunk.window == 1])) == [chunks[1].num_rows]
    first = Path(context.path) / "bins-00001.parquet"
    written = first.stat().st_mtime_ns

    again, made = prepare(job, "train")  # as after a crash: one window is there, the others are not
    assert made
    assert first.stat().st_mtime_ns == written
    assert again.fingerprint == dataset.fingerprint
    assert bins_of(again.path) == bins_of(dataset.path)


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


def test_on_bad_row_error_stops_with_file_and_line(ray_head: RayHead, inputs: Inputs, tmp_path: Path) -> None:
    content = inputs.job(tmp_path)
    content["data"]["on_bad_row"] = "error"  # type: ignore[index]
    data = inputs.folder / "data"
    with pytest.raises(UserError, match=rf"{data}/(pages|chat)\.jsonl:\d+: (image_|placeholder|bad_json|too_long)"):
        prepare(Job.model_validate(content), "train")
    assert not (tmp_path / "prepared" / "train" / "manifest.json").exists()
    assert json.loads((tmp_path / "prepared" / "train" / "plan.json").read_text())["fingerprint"]
