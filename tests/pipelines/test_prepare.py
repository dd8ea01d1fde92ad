"""Preparing on a real Ray: what the library alone gives, to the byte, and what Prometheus is told."""

from pathlib import Path
from unittest.mock import ANY

import pytest

from jobs.preparing import prepare_splits
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.prepared import PreparedDataset
from pipelines import measures
from pipelines.prepare import prepare
from tests.conftest import Inputs, RayHead
from tests.here import prepare_here, prepare_without_ray
from tests.mmray.preparing import contents
from tests.scraping import wait_until_told


@pytest.fixture(scope="module")
def prepared(
    ray_head: RayHead, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Job, PreparedDataset]:
    folder = tmp_path_factory.mktemp("prepared")
    job = Job.model_validate(inputs.job(folder, name="prepared", resources__encode_actors=2))
    calls: list[tuple[int, int]] = []
    dataset, made = prepare(job, "train", on_progress=lambda done, total: calls.append((done, total)))
    assert made
    total = sum(inputs.rows.values())
    assert calls == [(0, total), (64, total), (total, total)]
    return job, dataset


def test_the_library_without_ray_gives_the_same_bytes(
    prepared: tuple[Job, PreparedDataset], inputs: Inputs, tmp_path: Path
) -> None:
    job, dataset = prepared
    assert contents(prepare_here(Job.model_validate(inputs.job(tmp_path))).path) == contents(dataset.path)
    assert not prepare(job, "train")[1], "there is nothing left to do"


def test_a_dataset_without_bins_is_a_mistake_for_the_command(ray_head: RayHead, inputs: Inputs, tmp_path: Path) -> None:
    """Each time that it runs."""
    job = Job.model_validate(inputs.job(tmp_path, packing__token_capacity=1))
    data = job.data.model_copy(update={"max_rejected_share": 1})
    job = job.model_copy(update={"data": data})
    assert len(prepare_here(job)) == 0
    with pytest.raises(UserError, match="prepared/train has no bins: every row was rejected, see its rejected"):
        prepare_splits(job)


def test_prometheus_is_told_the_same_counts(prepared: tuple[Job, PreparedDataset]) -> None:
    """At the node's endpoint, summed over all actors, also after these are gone."""
    facts = prepared[1].statistics
    expected: dict[measures.Measure, object] = {
        measures.ROWS_READ: {("train",): facts["rows_read"]},
        measures.ROWS_PACKED: {("train",): facts["rows_packed"]},
        measures.BINS_WRITTEN: {("train",): len(prepared[1])},
        measures.ROWS_REJECTED: {("train", reason): rows for reason, rows in facts["rejected_by_reason"].items()},
        measures.STAGE_BUSY_SECONDS: {("encode",): ANY, ("pack",): ANY},
    }
    wait_until_told(expected, job_name="prepared")


def test_one_actor_continues_a_killed_run_of_the_library_to_the_same_bytes(
    prepared: tuple[Job, PreparedDataset], inputs: Inputs, tmp_path: Path
) -> None:
    _, dataset = prepared
    job = Job.model_validate(inputs.job(tmp_path, resources__encode_actors=1))
    assert prepare_without_ray(job, tmp_path, kill=True).returncode == -9
    (first,) = Path(job.prepared_path("train")).glob("bins-*")
    written = first.stat().st_mtime_ns

    again, made = prepare(job, "train")
    assert made
    assert first.stat().st_mtime_ns == written
    assert contents(again.path) == contents(dataset.path)
