"""Batches through Ray Data equal those of the plain loader, in order, for every rank."""

import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from mmray.batches.micro_batch import Layout, Masked, MicroBatch, Place, to_table
from mmray.batches.plan import BatchMaker, BatchPlan
from mmray.config.job import Job
from mmray.config.resources import ResourceSettings
from mmray.errors import UserError
from mmray.prepared import PreparedDataset
from mmray.schedule.schedule import Schedule
from pipelines import ingest
from pipelines.dataset import MaskActor
from pipelines.ingest import Feed, Ingest, Mask, Shares, joined, layouts_of
from tests.conftest import Inputs, RayHead
from tests.here import prepare_here

RESOURCES = ResourceSettings(render_actors=1, mask_actors=1)


@pytest.fixture(scope="module")
def plan(ray_head: RayHead, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> BatchPlan:
    job = Job.model_validate(inputs.job(tmp_path_factory.mktemp("ingest")))
    return plan_of(job, prepare_here(job))


def plan_of(job: Job, dataset: PreparedDataset) -> BatchPlan:
    return BatchPlan(
        model_type=None,
        prepared=dataset.path,
        processor=job.model.processor_source,
        trust_remote_code=False,
        loss=job.loss,
        schedule=Schedule(len(dataset), global_batch_bins=3, seed=1, fingerprint=dataset.fingerprint),
        world_size=2,
        micro_batch_bins=1,
    )


def ingest_of(plan: BatchPlan, per_share: int = 1, resources: ResourceSettings = RESOURCES) -> Ingest:
    made = Ingest(BatchMaker(plan), resources, gpus=False)
    made.per_share = per_share
    return made


def received(made: Ingest, start: int, stop: int) -> dict[int, list[list[MicroBatch]]]:
    """What each rank receives, all reading at once as workers do."""
    world_size = made.plan.world_size
    result: dict[int, list[list[MicroBatch]]] = {rank: [] for rank in range(world_size)}
    for first, last in made.segments(start, stop):
        shards = made.split(first, last)

        def read(rank: int, shards: list[Any] = shards, first: int = first, last: int = last) -> list[list[MicroBatch]]:
            return list(made.receive(shards[rank], rank, first, last))

        with ThreadPoolExecutor(world_size) as ranks:  # a split waits until all of its readers have begun
            for rank, steps in enumerate(ranks.map(read, range(world_size))):
                result[rank] += steps
    return result


def check_equal(batch: MicroBatch, expected: MicroBatch) -> None:
    assert batch.place == expected.place
    for field in fields(Masked):
        ours, theirs = getattr(batch.masked, field.name), getattr(expected.masked, field.name)
        assert ours.dtype == theirs.dtype, field.name
        np.testing.assert_array_equal(ours, theirs, err_msg=field.name)


def test_each_rank_receives_its_batches_in_schedule_order(plan: BatchPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    epoch, per_share = plan.schedule.steps_per_epoch, 3
    made = ingest_of(plan, per_share, RESOURCES.model_copy(update={"render_actors": 2}))
    monkeypatch.setattr(ingest, "SEGMENT_SHARES", -(-4 * (epoch - 1) // per_share))
    start, stop = 1, epoch + 2  # resumed in the middle; of two segments, the second goes over the end of the epoch
    assert len(list(made.segments(start, stop))) == 2
    found = received(made, start, stop)
    seen: list[int] = []
    for rank in range(2):
        assert len(found[rank]) == stop - start
        for step, batches in enumerate(found[rank], start=start):
            for batch, expected in zip(batches, next(made.maker.steps(rank, step, step + 1)), strict=True):
                check_equal(batch, expected)
                if step < epoch:
                    seen += batch.bins
    first_step = {number for number in plan.schedule.bins(0) if number is not None}
    assert sorted(seen) == sorted(set(range(plan.schedule.num_bins)) - first_step)


def test_a_run_begins_at_any_step(ray_head: RayHead, plan: BatchPlan) -> None:
    """A share for each micro-batch. What deals them imports nothing of mmray's batches, and so no torch, which would
    delay every start."""
    made = ingest_of(plan, per_share=1)
    start, few = 1_000_001, 15
    shards = made.split(start, start + 10_000)
    streams = [made.receive(shard, rank, start, start + 10_000) for rank, shard in enumerate(shards)]
    with ThreadPoolExecutor(2) as ranks:
        for rank, steps in enumerate(ranks.map(lambda stream: list(islice(stream, few)), streams)):
            for batches, step in zip(steps, made.maker.steps(rank, start, start + few), strict=True):
                for batch, expected in zip(batches, step, strict=True):
                    check_equal(batch, expected)
    processes = psutil.Process(ray_head.pid).children(recursive=True)
    coordinators = [process for process in processes if "SplitCoordinator" in str(process.cmdline())]
    coordinator = max(coordinators, key=psutil.Process.create_time)
    mapped = [each.path for each in coordinator.memory_maps()]  # in forked workers torch lies from the beginning
    for stream in streams:
        stream.close()
    assert any("/ray/" in path for path in mapped)
    assert not any("llvmlite" in path for path in mapped)


@given(
    world_size=st.integers(1, 5), micro_batches=st.integers(1, 5), per_share=st.integers(1, 40),
    start=st.integers(0, 10), steps=st.integers(1, 12), segment=st.integers(1, 60),
)  # fmt: skip
def test_shares_deal_each_rank_its_micro_batches_in_order(
    world_size: int, micro_batches: int, per_share: int, start: int, steps: int, segment: int
) -> None:
    """Round robin over all shares of all segments, every micro-batch once, no two ranks out of step."""
    schedule = Schedule(1000, global_batch_bins=world_size * micro_batches, seed=0, fingerprint="")
    plan = BatchPlan("", "", None, False, "sampled", schedule, world_size, 1)
    made = ingest_of(plan, per_share)
    stop = start + steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "SEGMENT_SHARES", segment)
        segments = list(made.segments(start, stop))
    assert [first for first, _ in segments] == [start, *(last for _, last in segments[:-1])]
    assert segments[-1][1] == stop
    dealt: dict[int, list[Place]] = {rank: [] for rank in range(world_size)}
    for first, last in segments:
        shares = Shares(plan, first, last, per_share)
        assert len(shares) <= max(segment, -(-micro_batches // per_share) * world_size) + world_size
        for number in range(len(shares)):
            places = shares.places(number)
            assert 0 < len(places) <= per_share
            assert {place.rank for place in places} == {number % world_size}
            dealt[number % world_size] += places
    for rank, places in dealt.items():
        assert places == [Place(step, rank, micro) for step in range(start, stop) for micro in range(micro_batches)]


def test_small_micro_batches_travel_together_and_large_ones_alone(plan: BatchPlan) -> None:
    made = Ingest(BatchMaker(plan), RESOURCES, gpus=False)
    expected = [to_table(batch.masked).nbytes for step in made.maker.steps(0, 0, 8) for batch in step]
    together = made.per_share * np.mean(expected)
    assert 1 < made.per_share < ingest.MOST_PER_SHARE
    assert ingest.SHARE_BYTES / 4 < together < 2 * ingest.SHARE_BYTES
    # many ranks get few shares a second
    for ranks, per_share in ((2, 1), (15, 1), (16, 2), (64, 8), (256, 32), (4096, 32)):
        large = Ingest(BatchMaker(replace(plan, micro_batch_bins=100, world_size=ranks)), RESOURCES, gpus=False)
        assert large.per_share == per_share


class Shard:
    """A rank's iterator that gives these shares."""

    def __init__(self, *shares: pa.Table) -> None:
        self.shares = shares

    def iter_batches(self, **_: object) -> Iterator[pa.Table]:
        return iter(self.shares)


def feed_of(made: Ingest, *shares: pa.Table) -> Feed:
    """What a rank reads these shares from; labels are computed by the real actor's class."""
    label_actor = ray.remote(MaskActor).options(num_cpus=0).remote(pickle.dumps(partial(Mask, made.plan, "cpu", "")))
    return Feed(Shard(*shares), label_actor)


def rendered_share(made: Ingest) -> pa.Table:
    """The share of rank 0's first step as a render actor makes it."""
    plan = made.plan
    return joined([to_table(made.maker.render(Place(0, 0, micro))) for micro in range(plan.micro_batches)])


def test_pictures_do_not_pass_through_the_label_actor(plan: BatchPlan) -> None:
    made = ingest_of(plan)
    share = rendered_share(made)
    layouts = layouts_of(share)
    assert {label.split(".")[1] for label in layouts.column_names} == {field.name for field in fields(Layout)}
    assert not {label for label in layouts.column_names if "pixels" in label}
    sent = len(pickle.dumps(layouts, protocol=5))
    assert share.nbytes > 100_000
    assert sent < 0.1 * share.nbytes


def test_a_batch_that_is_not_the_scheduled_one_is_an_error(ray_head: RayHead, plan: BatchPlan) -> None:
    made = ingest_of(plan)
    step = next(made.maker.steps(0, 0, 1))
    share = rendered_share(made)
    feed = feed_of(made, share)
    for batch, expected in zip(next(made.receive(feed, 0, 0, 1)), step, strict=True):
        check_equal(batch, expected)
    other = ingest_of(replace(plan, schedule=replace(plan.schedule, seed=2)))
    with pytest.raises(RuntimeError, match=r"expected Place\(step=0, rank=0, micro=\d\) with bins .* received"):
        next(other.receive(feed, 0, 0, 1))
    with pytest.raises(RuntimeError, match=r"expected Place\(step=0, rank=1, micro=0\) with bins .* received"):
        next(made.receive(feed, 1, 0, 1))
    with pytest.raises(RuntimeError, match="step 0: the data stream gave no more batches"):
        next(made.receive(Feed(Shard(), feed.labels), 0, 0, 1))


def test_an_image_that_vanished_names_its_row(ray_head: RayHead, inputs: Inputs, tmp_path: Path) -> None:
    data = shutil.copytree(inputs.folder / "data", tmp_path / "data")
    content = inputs.job(tmp_path)
    content["data"]["train"] = [{"files": str(data / "pages.jsonl"), "kind": "pretrain"}]  # type: ignore[index]
    job = Job.model_validate(content)
    dataset = prepare_here(job)
    for image in (data / "pages").iterdir():
        image.unlink()
    plan = replace(plan_of(job, dataset), world_size=1)
    made = ingest_of(plan)
    shards = made.split(0, 1)
    with pytest.raises(UserError, match=r"row '.*pages\.jsonl:\d+\): image_missing"):
        next(made.receive(shards[0], 0, 0, 1))
