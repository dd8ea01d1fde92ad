"""Training a job on the cluster that this process is connected to, and what `jobs/train.py` does around it."""

import logging
import os
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import typer
from ray.train import ControllerError, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.capacity import train_cpus, uses_gpus, worker_needs
from jobs.checks import check_job_settings, cluster_checks, job_checks, open_prepared, require
from jobs.command_line import Stopped
from jobs.common import connect, console
from jobs.dry_run import plan_train
from jobs.mistakes import EndAtMistakes
from jobs.run_watch import RunWatch
from jobs.stopping import run_until_stopped
from jobs.trace import trace
from jobs.train_loop import train_worker, worker_config
from mmray.base.words import counted
from mmray.config.compatibility import job_family
from mmray.config.job import Job
from mmray.errors import PassingError, UserError
from mmray.prepared import PreparedDataset
from mmray.prepared.dataset import MANIFEST
from mmray.prepared.schema import FORMAT_VERSION
from mmray.prepared.versions import check_new_run
from mmray.report import Run, run_table
from mmray.rows.encode import Encoder
from mmray.run.attention import attention_note, with_attention
from mmray.run.callback import Callback
from mmray.run.checkpoints import newest_looking_whole
from mmray.run.data import RunData
from mmray.run.evaluation.warnings import evaluation_warnings
from mmray.run.export import export_finished
from mmray.run.folder import RunFolder
from mmray.run.history import read_history
from mmray.run.plan import RunPlan, run_plan
from mmray.storage import Folder, arrow_file_system
from mmray.training.checkpoint import read_state
from mmray.training.part_report import check_resumed
from mmray.training.treatments import stages_of
from pipelines.nodes import alive_nodes

log = logging.getLogger("mmray")

MIXTURE = "mixture"
"""Value of `--continue-on` that stands for the job file's own mixture."""
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
"""Environment of workers that train on CPUs, also on machines that have GPUs."""
RAY_TRAIN_MEMORY = "checkpoint_manager_snapshot.json"
"""Ray Train's memory of a run's checkpoints. Torn or out of date it would keep Ray Train from starting; mmray asks the
folder itself (`mmray/run/checkpoints.py`)."""
LEFTOVER_DATA = {"RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "30"}
"""Seconds after which the resources that Ray Data asked for an interrupted data stream are free for the next one."""


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables with settings of torch's allocator of GPU memory: its name, and the one that it had before torch 2.9."""


def gpu_memory() -> dict[str, str]:
    """The environment with which workers allocate GPU memory: in segments that grow, unless this process's environment
    says otherwise.

    Packed rows differ in their lengths and pictures, and segments of fixed sizes would be left unused between them.
    """
    stated = {name: os.environ[name] for name in ALLOCATOR if name in os.environ}
    return stated or {ALLOCATOR[0]: "expandable_segments:True"}


def with_data(job: Job, prepared: str) -> Job:
    """The job with another output.prepared, or with the mixture that it has. Raises UserError for neither.

    prepared: what `--continue-on` is given: a folder, or the word `mixture`.
    """
    if prepared == MIXTURE:
        if not job.mixture:
            raise UserError("--continue-on mixture: the job has none; write mixture into the job file")
        return job
    path = prepared if "://" in prepared else str(Path.cwd() / prepared)
    if Folder(path).exists(MANIFEST):
        raise UserError(f"--continue-on {prepared}: give the folder that holds `train`, as in output.prepared")
    output = job.output.model_copy(update={"prepared": path})
    return job.model_copy(update={"output": output, "mixture": (), "stages": ()})


def check_old_chats(job: Job, split: str, prepared: RunData) -> None:
    """Raise UserError where a new run would begin on chats of an earlier version that train otherwise now."""
    if isinstance(prepared, PreparedDataset) and prepared.manifest["format_version"] < FORMAT_VERSION:
        family = job_family(job)
        encoder = Encoder(
            job.data.lenient,
            job.data.splits[split],
            family,
            family.resolved_tiling(job.images),
            job.packing,
            loss=job.loss,
        )
        check_new_run(prepared, encoder, job.loss)


def train(
    job: Job,
    prepared: dict[str, RunData],
    *,
    continue_on: bool = False,
    joined: bool = False,
    callbacks: Sequence[Callback] = (),
) -> int | None:
    """Run training to its end, resuming where a checkpoint is. Ray must be connected.

    Args:
        continue_on: a checkpoint trained on other data than `prepared` is continued on it.
        joined: whether Ray is a cluster that others started, whose nodes are then asked first.
        callbacks: of this run alone, beside the standard ones; they are pickled, and every rank has its copy.

    Returns the step after which the run was asked to stop; None where it has done its last.
    """
    nodes = alive_nodes()
    gpus = uses_gpus(job, nodes)
    run = RunFolder(job.output.run)
    checkpoint = newest_looking_whole(run)
    plan = run_plan(job, prepared, gpus, continue_on, checkpoint=checkpoint)
    job = plan.job
    if checkpoint is None or continue_on:
        for split, dataset in prepared.items():
            check_old_chats(job, split, dataset)
    cursor = plan.place(checkpoint, prepared["train"])  # a mistake is told before workers start
    total_steps = plan.total_steps(cursor)
    if checkpoint is None:
        stages_of(job.training, total_steps)
    else:
        check_resumed(checkpoint, job.model, job.training, total_steps)
    if job.balance and job.balance.across_batches is None and cursor.balance is not None:
        console.print(f"{run} began with batches of bins of like cost and goes on so (balance.across_batches)")
    if checkpoint is not None and (note := _end_note(job, _last_event(run), cursor.step, total_steps)):
        console.print(f"{run} {note}")
        export_at_end(job)
        return None
    if not gpus:
        console.print("no GPU: labels and positions are computed on CPU actors, training runs on CPU")
    for warning in evaluation_warnings(job, total_steps):
        log.warning("%s", warning)
    saved_stage = None if checkpoint is None else read_state(checkpoint).zero_stage
    require(cluster_checks(job, nodes, trains=True, gpus=gpus, joined=joined, saved_stage=saved_stage))
    run.remove(RAY_TRAIN_MEMORY)
    run.forget_stop()
    trainer = _trainer(plan, run, gpus, callbacks)
    with RunWatch(job.name, run, total_steps) as watch:
        _fit(trainer, run, watch, job.training.stop_seconds)
    last = _last_event(run)
    if last.get("event") == "stop":
        return last["step"]
    export_at_end(job)
    return None


def _end_note(job: Job, last: dict[str, Any], step: int, total_steps: int) -> str | None:
    """The note on a run that has ended and with these settings does not go on; None for one that goes on.

    Args:
        last: the last event of its history.
        step: of its checkpoint.
    """
    if (last.get("event"), last.get("step")) != ("finish", step):
        return None
    steps = counted(step, "step")
    early_stopping = job.early_stopping and job.early_stopping.model_dump()
    if early_stopping is not None and last.get("early_stopping") == early_stopping:
        return (
            f"has ended after {steps} ({last['reason']}); with more early_stopping.patience, or without "
            "early_stopping, it goes on"
        )
    return f"has finished its {steps}; with more training.steps or epochs it goes on" if step >= total_steps else None


def _trainer(plan: RunPlan, run: RunFolder, gpus: bool, callbacks: Sequence[Callback]) -> TorchTrainer:
    """Ray Train's trainer of a run."""
    job, (system, place) = plan.job, arrow_file_system(plan.job.output.run)
    training, resources = job.training, job.resources
    return TorchTrainer(
        train_worker,
        train_loop_config=worker_config(plan, callbacks),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=resources.workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=resources.resize_seconds,
            use_gpu=gpus,
            label_selector=resources.train_labels or None,
            resources_per_worker=worker_needs(job, gpus),
        ),
        run_config=RunConfig(
            worker_runtime_env={"env_vars": LEFTOVER_DATA | (gpu_memory() if gpus else NO_GPU)},
            name=posixpath.basename(place),
            storage_path=posixpath.dirname(place),
            storage_filesystem=None if run.shared_path else system,
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=training.max_failures,
                max_preemption_failures=-1 if training.max_preemptions is None else training.max_preemptions,
            ),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[EndAtMistakes()],  # type: ignore[list-item]
        ),
    )


def _fit(trainer: TorchTrainer, run: RunFolder, watch: RunWatch, stop_seconds: float) -> None:
    """Train until the end or a stop. Raises UserError of a worker's mistake, and of storage that stays away."""
    try:
        run_until_stopped(trainer.fit, run, lambda: watch.has_begun, stop_seconds)
    except ControllerError as error:
        if isinstance(error.controller_failure, UserError):
            raise UserError(str(error.controller_failure)) from error
        raise
    except WorkerGroupError as error:  # storage that did not come back in all tries
        passing = [failure for failure in error.worker_failures.values() if isinstance(failure, PassingError)]
        if not passing:
            raise
        raise UserError(str(passing[0])) from error


def _with_attention(job: Job) -> Job:
    """The job with its attention decided by the run that it continues, of which a person is told."""
    checkpoint = newest_looking_whole(RunFolder(job.output.run))
    if checkpoint is not None and (note := attention_note(job, checkpoint)):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    return with_attention(job, checkpoint)


def export_at_end(job: Job) -> None:
    """Write the model of a finished run, where the job says so, and tell where it is."""
    if job.output.export.at_end:
        console.print(
            f"{job.name}: finished, the model is in {export_finished(job.output.run, job.model)}", soft_wrap=True
        )


def _last_event(run: RunFolder) -> dict[str, Any]:
    history = read_history(run.fetch())
    return history[-1] if history else {}


def run(
    job: Job, *, other_data: str | None, steps: str | None, as_json: bool, dry_run: bool, step_seconds: str | None,
    verbose: bool, address: str | None,
) -> None:  # fmt: skip
    """Do what the command line of `jobs/train.py` asks for; its arguments, with `steps` for `--trace`."""
    if other_data is not None:
        job = with_data(job, other_data)
    if steps is not None:
        trace(job, steps, continue_on=other_data is not None, as_json=as_json)
        return
    if dry_run:
        code = plan_train(job, address, continue_on=other_data is not None, verbose=verbose, step_seconds=step_seconds)
        raise typer.Exit(code)
    if step_seconds is not None:
        raise UserError("--step-seconds tells the time of a run in a plan: give --dry-run too")
    require(job_checks(job, trains=True))
    job = _with_attention(job)
    check_job_settings(job)
    prepared = open_prepared(job)
    joined = connect(address, cpus=train_cpus(job), verbose=verbose)
    stopped = train(job, prepared, continue_on=other_data is not None, joined=joined)
    if stopped is not None:
        raise Stopped(f"stopped after step {stopped}, which is saved; the same command continues")
    console.print(run_table(Run(job.output.run)))
    ray.shutdown()
