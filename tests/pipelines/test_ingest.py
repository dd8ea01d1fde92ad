"""Batches through Ray Data equal those of the plain loader, in order, for every rank."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmray.batch import Masked, MicroBatch
from mmray.config import Job, ResourceSettings
from mmray.errors import UserError
from mmray.loader import BatchMaker, BatchPlan
from mmray.prepared import PreparedDataset
from mmray.schedule import Schedule
from pipelines import ingest
from pipelines.prepare import prepare
from tests.conftest import Inputs, RayHead

RESOURCES = ResourceSettings(render_actors=2, mask_actors=1)


@pytest.fixture(scope="module")
def plan(ray_head: RayHead, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> BatchPlan:
    job = Job.model_validate(inputs.job(tmp_path_factory.mktemp("ingest")))
    dataset, _ = prepare(job, "train")
    return plan_of(job, dataset)


def plan_of(job: Job, dataset: PreparedDataset) -> BatchPlan:
    return BatchPlan(
        prepared=dataset.path,
        processor=job.model.processor_source,
        trust_remote_code=False,
        masking=job.masking,
        schedule=Schedule(len(dataset), global_batch_bins=3, seed=1, fingerprint=dataset.fingerprint),
        world_size=2,
        micro_batch_bins=1,
    )


def received(plan: BatchPlan, start: int, stop: int) -> dict[int, list[list[MicroBatch]]]:
    """What each rank receives, all reading at once as workers do."""
    family = BatchMaker(plan).family
    result: dict[int, list[list[MicroBatch]]] = {rank: [] for rank in range(plan.world_size)}
    for first, last in ingest.segments(plan, start, stop):
        shards = ingest.split(plan, first, last, RESOURCES, gpus=False)

        def read(rank: int, shards: list[Any] = shards, first: int = first, last: int = last) -> list[list[MicroBatch]]:
            return list(ingest.receive(shards[rank], plan, family, rank, first, last))

        with ThreadPoolExecutor(plan.world_size) as ranks:  # a split waits until all of its readers have begun
            for rank, steps in enumerate(ranks.map(read, range(plan.world_size))):
                result[rank] += steps
    return result


def test_each_rank_receives_its_batches_in_schedule_order(plan: BatchPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    epoch = plan.schedule.steps_per_epoch
    monkeypatch.setattr(ingest, "SEGMENT_MICRO_BATCHES", 4 * (epoch - 3))
    start, stop = 1, epoch + 2  # two segments, the second over the end of the epoch
    found = received(plan, start, stop)
    maker = BatchMaker(plan)
    seen: list[int] = []
    for rank in range(2):
        for step, batches in enumerate(found[rank], start=start):
            for batch, expected in zip(batches, maker.steps(rank, step, step + 1).__next__(), strict=True):
                assert batch.place == expected.place
                for field in fields(Masked):
                    ours, theirs = getattr(batch.masked, field.name), getattr(expected.masked, field.name)
                    assert ours.dtype == theirs.dtype, field.name
                    np.testing.assert_array_equal(ours, theirs, err_msg=field.name)
                if step < epoch:
                    seen += batch.bins
    first_step = {number for number in plan.schedule.bins(0) if number is not None}
    assert sorted(seen) == sorted(set(range(plan.schedule.num_bins)) - first_step)


def test_a_batch_that_is_not_the_scheduled_one_is_an_error(plan: BatchPlan) -> None:
    plan = replace(plan, world_size=1)
    shards = ingest.split(plan, 0, 1, RESOURCES, gpus=False)
    other = replace(plan, schedule=replace(plan.schedule, seed=2))
    with pytest.raises(RuntimeError, match=r"expected Place\(step=0, rank=0, micro=\d\) with bins .* received"):
        next(ingest.receive(shards[0], other, BatchMaker(plan).family, 0, 0, 1))


def test_an_image_that_vanished_names_its_row(ray_head: RayHead, inputs: Inputs, tmp_path: Path) -> None:
    data = shutil.copytree(inputs.folder / "data", tmp_path / "data")
    content = inputs.job(tmp_path)
    content["data"]["train"] = [{"files": str(data / "pages.jsonl"), "kind": "pretrain"}]  # type: ignore[index]
    job = Job.model_validate(content)
    dataset, _ = prepare(job, "train")
    for image in (data / "pages").iterdir():
        image.unlink()
    plan = replace(plan_of(job, dataset), world_size=1)
    shards = ingest.split(plan, 0, 1, RESOURCES, gpus=False)
    with pytest.raises(UserError, match=r"row '.*pages\.jsonl:\d+\): image_missing"):
        next(ingest.receive(shards[0], plan, BatchMaker(plan).family, 0, 0, 1))
