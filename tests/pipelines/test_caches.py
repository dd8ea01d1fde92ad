"""The caches on a real Ray: they save opening images and change nothing else."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmray.batches.micro_batch import Masked
from mmray.batches.plan import BatchMaker, BatchPlan
from mmray.config.job import Job
from mmray.config.resources import ResourceSettings, TileCacheSettings
from mmray.errors import RowError, UserError
from mmray.images import image_size
from mmray.images.size_cache import read_sizes
from mmray.prepared import PreparedDataset
from mmray.run.warnings import read_warnings
from mmray.schedule.schedule import Schedule
from pipelines.ingest import Ingest
from pipelines.prepare import prepare
from tests.conftest import Inputs, RayHead
from tests.here import prepare_here
from tests.mmray.preparing import blank_unseen


class Pages:
    """The inputs in a folder of their own, to be spoiled."""

    def __init__(self, inputs: Inputs, folder: Path) -> None:
        self.inputs, self.folder = inputs, folder
        shutil.copytree(inputs.folder / "data", folder / "data")

    def job(self, name: str, **data: object) -> Job:
        """A job with outputs of its own; data: settings of that part."""
        content: dict[str, Any] = self.inputs.job(self.folder / name)
        rows = self.folder / "data"
        content["data"] = {
            "train": [
                {"files": str(rows / "pages.jsonl"), "kind": "pretrain"},
                {"files": str(rows / "chat.jsonl"), "kind": "chat"},
            ],
            **data,
        }
        return Job.model_validate(content)

    @property
    def images(self) -> list[Path]:
        """The sound ones."""
        return sorted(self.folder.glob("data/**/train-*.*"))


@pytest.fixture
def pages(inputs: Inputs, tmp_path: Path) -> Pages:
    return Pages(inputs, tmp_path)


def content_of(dataset: PreparedDataset) -> dict[str, object]:
    files = {path.name: path.read_bytes() for path in sorted(Path(dataset.path).glob("*.parquet"))}
    return {**files, "fingerprint": dataset.fingerprint, "record": json.dumps(dataset.manifest["record"])}


def test_the_size_cache_changes_nothing_and_a_second_prepare_opens_no_image(ray_head: RayHead, pages: Pages) -> None:
    expected = content_of(prepare_here(pages.job("plain")))
    strict = str(pages.folder / "strict.parquet")
    with pytest.raises(UserError, match="on_bad_row"):
        prepare_here(pages.job("strict", size_cache=strict, on_bad_row="error"))
    assert 0 < len(read_sizes(strict)) <= len(pages.images), "what was measured by then is kept"

    cache, chats = pages.folder / "cache" / "sizes.parquet", pages.folder / "data" / "chat.jsonl"
    prepare_here(pages.job("chats", size_cache=str(cache), train=[{"files": str(chats), "kind": "chat"}]))
    known = [path for path in pages.images if path.name in chats.read_text()]
    assert len(read_sizes(str(cache))) == len(known) < len(pages.images)
    for path in known:
        blank_unseen(path)
    job = pages.job("cached", size_cache=str(cache))
    assert content_of(prepare(job, "train")[0]) == expected, "known sizes reach the actors"
    assert len(read_sizes(str(cache))) == len(pages.images), "and what they measure, the cache"

    for path in pages.images:
        blank_unseen(path)
        with pytest.raises(RowError):
            image_size(path)
    written = cache.stat().st_mtime_ns
    assert content_of(prepare_here(job, replace=True)) == expected, "no image was opened"
    assert cache.stat().st_mtime_ns == written


def test_batches_from_the_tile_cache_are_the_same_and_warnings_reach_the_run(ray_head: RayHead, pages: Pages) -> None:
    job = pages.job("ingest")
    dataset = prepare_here(job)
    plan = BatchPlan(
        model_type=None, prepared=dataset.path, processor=job.model.processor_source, trust_remote_code=False,
        loss=job.loss, schedule=Schedule(len(dataset), 2, seed=1, fingerprint=dataset.fingerprint), world_size=1,
        micro_batch_bins=1,
    )  # fmt: skip
    folder, warnings = pages.folder / "tiles", pages.folder / "warnings.log"
    cache = TileCacheSettings(folder=str(folder), max_gigabytes=1)
    steps = plan.order.steps_per_epoch
    expected = list(BatchMaker(plan, tile_cache=cache).steps(0, 0, steps))
    entries = list(folder.glob("*/*.tiles"))
    assert len(entries) == len(pages.images)
    sound = [entry.read_bytes() for entry in entries]
    entries[0].write_bytes(sound[0][:-1])
    entries[1].unlink()

    resources = ResourceSettings(tile_cache=cache)
    made = Ingest(BatchMaker(plan), resources, gpus=False, warnings=str(warnings))
    (shard,) = made.split(0, steps)
    for found, wanted in zip(made.receive(shard, 0, 0, steps), expected, strict=True):
        for ours, theirs in zip(found, wanted, strict=True):
            for field in fields(Masked):
                np.testing.assert_array_equal(getattr(ours.masked, field.name), getattr(theirs.masked, field.name))
    assert [entry.read_bytes() for entry in entries] == sound, "the actors filled the gaps"
    assert {str(entries[0]) in line for line in read_warnings(warnings)} == {True}
