"""Preparing and training without Ray, whose actors take 20 s of CPU time and more to start: for tests that need what
is prepared and do not ask how, and as what is compared with the same on Ray."""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from typing import Any

import pyarrow as pa
import pytest

import pipelines.prepare
from jobs.run_plan import run_plan
from mmray.batches.plan import BatchMaker
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.images.size_cache import SizeCache
from mmray.prepared import PreparedDataset
from mmray.rows.files import Chunk
from mmray.schedule.cursor import Cursor
from mmray.training.engine import TrainingEngine
from pipelines.dataset import ERROR
from pipelines.prepare import EncodeChunk, KeptSizes, PackWindow, _from_buffer, prepare
from tests.mmray.training.ranks import RankGroup


def prepare_here(job: Job, split: str = "train", **options: Any) -> PreparedDataset:
    """All of `prepare` but its graph: the work of its actors is done in this process, chunk by chunk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.prepare, "_run", run_here)
        return prepare(job, split, **options)[0]


def train_here(job: Job) -> list[dict[str, float]]:
    """All steps of a job on one rank: the metrics of each, under the names of metrics.jsonl."""
    return RankGroup(1, _steps_here, job).results()[0]


def _steps_here(_rank: int, world_size: int, job: Job) -> list[dict[str, float]]:
    plan = run_plan(job, {"train": PreparedDataset(job.prepared_path("train"))}, gpus=False)
    batches = plan.batches("train", plan.schedule, world_size)
    steps = plan.total_steps(Cursor.at(plan.schedule, prepared=batches.prepared))
    engine = TrainingEngine(job.model, job.training, total_steps=steps, grad_accumulation=batches.micro_batches)
    found = []
    for number, micro_batches in enumerate(BatchMaker(batches).steps(0, 0, steps), start=1):
        metrics = asdict(engine.step(micro_batches))
        bins = sum(len(batch.bins) for batch in micro_batches)
        epoch = round(number / plan.schedule.steps_per_epoch, 6)
        found.append({"step": number, "epoch": epoch, "bins": bins, "lr": metrics.pop("learning_rate")} | metrics)
    return found


def run_here(
    job: Job, split: str, token: str, chunks: list[Chunk], sizes: KeptSizes | None = None, dealing: int = 1
) -> Iterator[int]:
    """As `pipelines.prepare._run`, which it stands for."""
    encode, pack = EncodeChunk(job, split), PackWindow(job, split, token, dealing)
    if sizes:
        encode.sizes = SizeCache(sizes.known)
    for _, each in groupby(chunks, key=lambda chunk: chunk.window):
        window = list(each)
        packed = pack(pa.concat_tables(pa.table(encode({"chunk": [chunk]})) for chunk in window))
        if sizes:
            sizes.measured += map(_from_buffer, packed["sizes"][0].as_py())
        if packed[ERROR][0]:
            raise UserError(packed[ERROR][0])
        yield sum(chunk.num_rows for chunk in window)
