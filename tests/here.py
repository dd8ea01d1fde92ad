"""Preparing and training without Ray, whose actors take 20 s of CPU time and more to start: for tests that need what
is prepared and do not ask how, and as what is compared with the same on Ray."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmray.batches.micro_batch import MicroBatch
from mmray.batches.plan import BatchMaker
from mmray.config.job import Job
from mmray.prepared import PreparedDataset
from mmray.prepared.driver import prepare
from mmray.run.callback import Callback
from mmray.run.callbacks import standard_callbacks
from mmray.run.checkpoints import newest_looking_whole
from mmray.run.data import open_data
from mmray.run.evaluation.callback import Evaluate
from mmray.run.evaluation.in_training import BatchesHere, EvaluationPlans
from mmray.run.folder import RunFolder
from mmray.run.folder_checkpoints import FolderCheckpoints
from mmray.run.loop import TrainingLoop
from mmray.run.metrics import METRICS_FILE, read_metrics
from mmray.run.plan import run_plan
from mmray.run.state import open_run
from mmray.training.ranks import Ranks
from tests.conftest import ROOT
from tests.mmray.training.ranks import RankGroup


def prepare_here(job: Job, split: str = "train", **options: Any) -> PreparedDataset:
    """The dataset of `driver.prepare`."""
    return prepare(job, split, **options)[0]


NO_RAY = """
import logging, os, signal, sys

sys.modules |= dict.fromkeys(("ray", "pipelines", "jobs"))  # importing them raises ModuleNotFoundError
from mmray.config.job import load_job
from mmray.prepared.driver import prepare

def kill(done, total):
    if done and sys.argv[2:] == ["kill"]:
        os.kill(os.getpid(), signal.SIGKILL)

logging.basicConfig(level=logging.INFO, format="%(message)s")
prepare(load_job(sys.argv[1]), on_progress=kill)
"""


def prepare_without_ray(job: Job, folder: Path, *, kill: bool = False) -> "subprocess.CompletedProcess[str]":
    """Prepare a job's training rows in a process that cannot import Ray. folder: for the job file; kill: when the first
    window is committed, by `kill -9`."""
    job_file = folder / "without_ray.yaml"
    job_file.write_text(job.model_dump_json(exclude_defaults=True))
    command = [sys.executable, "-c", NO_RAY, str(job_file), *(["kill"] if kill else [])]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=folder, capture_output=True, text=True, check=False
    )


def train_here(job: Job, *callbacks: Callback, ranks: int = 1, continue_on: bool = False) -> list[dict[str, Any]]:
    """Train a job as `jobs/train.py` does, from its newest checkpoint, but without Ray: the lines of metrics.jsonl."""
    RankGroup(ranks, _train_rank, job, callbacks, Path.cwd(), continue_on).results()
    return read_metrics(Path(job.output.run) / METRICS_FILE)


def _train_rank(
    _rank: int, _world_size: int, job: Job, own_callbacks: tuple[Callback, ...], current_folder: Path,
    continue_on: bool,
) -> None:  # fmt: skip
    os.chdir(current_folder)
    prepared = {split: open_data(job, split) for split in job.data.splits}
    folder, ranks = RunFolder(job.output.run), Ranks()
    plan = run_plan(job, prepared, gpus=False, continue_on=continue_on, checkpoint=newest_looking_whole(folder))
    run = open_run(plan, folder, ranks, scratch=folder.path)
    checkpoints = FolderCheckpoints(folder.path, ranks, job.training.keep_checkpoints)
    evaluation = EvaluationPlans.of(plan, ranks.size, run.total_steps)
    source = evaluation and BatchesHere(evaluation, ranks.rank, job.resources.tile_cache)
    callbacks = standard_callbacks(run, evaluating=[Evaluate(run, evaluation, source)], asking=own_callbacks)
    maker = BatchMaker(run.batches, tile_cache=job.resources.tile_cache)

    def batches(start: int, stop: int) -> Iterator[list[MicroBatch]]:
        stage = run.engine.stage
        yield from maker.steps(ranks.rank, start, stop)
        assert run.engine.stage is stage, "no thread may make batches ahead while a stage builds its model"

    TrainingLoop(run, callbacks, checkpoints).train(batches)
