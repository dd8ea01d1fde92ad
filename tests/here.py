"""Preparing and training without Ray, whose actors take 20 s of CPU time and more to start: for tests that need what
is prepared and do not ask how, and as what is compared with the same on Ray."""

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import pipelines.prepare
from mmray.batches.plan import BatchMaker
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.images.size_cache import SizeCache
from mmray.prepared import PreparedDataset
from mmray.rows.files import Chunk
from mmray.run.callback import Callback
from mmray.run.callbacks import standard_callbacks
from mmray.run.folder import RunFolder
from mmray.run.folder_checkpoints import FolderCheckpoints
from mmray.run.loop import TrainingLoop
from mmray.run.metrics import METRICS_FILE, read_metrics
from mmray.run.plan import run_plan
from mmray.run.state import open_run
from mmray.training.ranks import Ranks
from pipelines.dataset import ERROR
from pipelines.prepare import EncodeChunk, KeptSizes, PackWindow, _from_buffer, prepare
from tests.mmray.training.ranks import RankGroup


def prepare_here(job: Job, split: str = "train", **options: Any) -> PreparedDataset:
    """All of `prepare` but its graph: the work of its actors is done in this process, chunk by chunk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.prepare, "_run", run_here)
        return prepare(job, split, **options)[0]


def train_here(job: Job, *callbacks: Callback, ranks: int = 1) -> list[dict[str, Any]]:
    """Train a job as `jobs/train.py` does, from its newest checkpoint, but without Ray: the lines of metrics.jsonl."""
    RankGroup(ranks, _train_rank, job, callbacks).results()
    return read_metrics(Path(job.output.run) / METRICS_FILE)


def _train_rank(_rank: int, _world_size: int, job: Job, own_callbacks: tuple[Callback, ...]) -> None:
    prepared = {
        split: PreparedDataset(job.prepared_path(split)) for split in ("train", "eval") if getattr(job.data, split)
    }
    plan, folder, ranks = run_plan(job, prepared, gpus=False), RunFolder(job.output.run), Ranks()
    run = open_run(plan, folder, ranks, scratch=folder.path)
    checkpoints = FolderCheckpoints(folder.path, ranks, job.training.keep_checkpoints)
    callbacks = standard_callbacks(run, asking=own_callbacks)
    TrainingLoop(run, callbacks, checkpoints).train(partial(BatchMaker(run.batches).steps, ranks.rank))


def run_here(job: Job, split: str, token: str, chunks: list[Chunk], sizes: KeptSizes | None = None) -> Iterator[int]:
    """As `pipelines.prepare._run`, which it stands for."""
    encode, pack = EncodeChunk(job, split), PackWindow(job, split, token)
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
