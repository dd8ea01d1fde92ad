"""Preparing and training without Ray, whose actors take 20 s of CPU time and more to start: for tests that need what
is prepared and do not ask how, and as what is compared with the same on Ray."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from jobs.run_plan import run_plan
from mmray.batches.plan import BatchMaker
from mmray.config.job import Job
from mmray.prepared import PreparedDataset
from mmray.prepared.driver import prepare
from mmray.run.checkpoints import newest_whole
from mmray.run.folder import RunFolder
from mmray.training.engine import TrainingEngine
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


def train_here(job: Job, workers: int = 1) -> list[dict[str, float]]:
    """The steps of a job that are left to do, from its newest checkpoint where there is one, on gloo ranks: the metrics
    of each, under the names of metrics.jsonl. Nothing is written."""
    return RankGroup(workers, _steps_here, job, Path.cwd()).results()[0]


def _steps_here(rank: int, world_size: int, job: Job, folder: Path) -> list[dict[str, float]]:
    os.chdir(folder)
    prepared = PreparedDataset(job.prepared_path("train"))
    plan, ranks = run_plan(job, {"train": prepared}, gpus=False), Ranks()
    checkpoint = newest_whole(RunFolder(job.output.run), ranks, lambda name, problem: pytest.fail(f"{name}: {problem}"))
    cursor = plan.place(checkpoint, prepared)
    batches = plan.batches("train", plan.schedule, world_size)
    steps = plan.total_steps(cursor)
    engine = TrainingEngine(
        job.model, job.training, total_steps=steps, grad_accumulation=batches.micro_batches, resume_from=checkpoint,
        ranks=ranks,
    )  # fmt: skip
    maker = BatchMaker(batches, tile_cache=job.resources.tile_cache)
    done = []
    for number, micro_batches in enumerate(maker.steps(rank, cursor.step, steps), start=cursor.step + 1):
        metrics = asdict(engine.step(micro_batches))
        bins = sum(ranks.every(sum(len(batch.bins) for batch in micro_batches)))
        epoch = round(number / plan.schedule.steps_per_epoch, 6)
        done.append({"step": number, "epoch": epoch, "bins": bins, "lr": metrics.pop("learning_rate")} | metrics)
    return done
