"""Train on a prepared dataset: `python jobs/train.py JOB.yaml`, or the same words behind `ray job submit`.

The same command continues a run that was stopped, from its last checkpoint, with any number of workers.
"""

import logging
import math
import pickle
import posixpath
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jobs  # noqa: F401  (says what is missing)

# isort: split
import ray
import typer
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.common import check_outputs, connect, console, run_main
from jobs.elastic import check_elastic
from jobs.probe import check_nodes, check_own_memory, packages_of
from jobs.room import check_room, cluster_nodes, needs, train_pools, uses_gpus, worker_needs
from jobs.run_plan import RunPlan, run_plan
from jobs.run_watch import RunWatch
from jobs.trace import trace
from jobs.train_loop import train_worker
from mmray.config.compatibility import job_family
from mmray.config.job import Job, load_job
from mmray.doctor import Status, examine_settings
from mmray.errors import UserError
from mmray.loss.settings import label_maker
from mmray.prepared import PreparedDataset
from mmray.prepared.dataset import MANIFEST
from mmray.prepared.fingerprint import check_settings
from mmray.prepared.versions import check_labels, check_new_run, old_chats
from mmray.report import Run, run_table
from mmray.rows.encode import Encoder
from mmray.run.checkpoints import newest_looking_whole
from mmray.run.folder import RunFolder
from mmray.run.history import read_history
from mmray.storage import Folder, arrow_file_system

log = logging.getLogger("mmray")

NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
"""Environment of workers that train on CPUs, also on machines that have GPUs."""
RAY_TRAIN_MEMORY = "checkpoint_manager_snapshot.json"
"""What Ray Train remembers of a run's checkpoints. Torn or out of date it would not start; mmray asks the folder itself
(`mmray/run/checkpoints.py`)."""
LEFTOVER_DATA = {"RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "30"}
"""Seconds after which the resources that Ray Data asked for an interrupted data stream are free for the next one."""


def with_data(job: Job, prepared: str) -> Job:
    """The job with another output.prepared. Raises UserError for a folder that is no such."""
    path = prepared if "://" in prepared else str(Path.cwd() / prepared)
    if Folder(path).exists(MANIFEST):
        raise UserError(f"--continue-on {prepared}: give the folder that holds `train`, as in output.prepared")
    return job.model_copy(update={"output": job.output.model_copy(update={"prepared": path})})


def check_job(job: Job) -> None:
    """The cheap part of `mmray doctor`, before anything starts: a line for each check, UserError for a failed one."""
    for finding in examine_settings(job):
        if finding.status is Status.FAIL:
            raise UserError(f"{finding.check}: {finding.detail}")
        console.print(f"{finding.check}: {finding.detail}", markup=False, highlight=False, soft_wrap=True)
    job.tracking.check()


def open_prepared(job: Job) -> dict[str, PreparedDataset]:
    """The job's prepared datasets. Raises UserError when one is missing, empty, or made with other settings."""
    family = job_family(job)
    found = {}
    for split in ("train", "eval"):
        if not getattr(job.data, split):
            continue
        prepared = PreparedDataset(job.prepared_path(split))
        check_settings(
            prepared.path, prepared.manifest["record"], processor=family.processor,
            tiling=family.resolved_tiling(job.images), packing=job.packing, loss=job.loss,
        )  # fmt: skip
        check_labels(prepared, label_maker(job.loss, family))
        if not len(prepared):
            raise UserError(f"{prepared.path} has no bins: every row was rejected, see its rejected.parquet")
        found[split] = prepared
    return found


def check_old_chats(job: Job, split: str, prepared: PreparedDataset) -> None:
    """Raise UserError where a new run would begin on chats of an earlier version that train otherwise now."""
    if old_chats(prepared.manifest):
        family = job_family(job)
        lenient = job.data.model_copy(update={"on_bad_row": "reject"})
        encoder = Encoder(
            lenient, getattr(job.data, split), family, family.resolved_tiling(job.images), job.packing, loss=job.loss
        )
        check_new_run(prepared, encoder, label_maker(job.loss, family))


def train(job: Job, prepared: dict[str, PreparedDataset], *, continue_on: bool = False) -> RunPlan:
    """Run training to its end, resuming where a checkpoint is. Ray must be connected.

    continue_on: a checkpoint trained on other data than `prepared` is continued on it.
    """
    nodes = cluster_nodes()
    gpus = uses_gpus(job, nodes)
    plan = run_plan(job, prepared, gpus, continue_on)
    run = RunFolder(job.output.run)
    checkpoint = newest_looking_whole(run)
    if checkpoint is None or continue_on:
        for split, each in prepared.items():
            check_old_chats(job, split, each)
    cursor = plan.place(checkpoint, prepared["train"])  # a mistake is told before workers start
    if checkpoint is not None and cursor.step >= plan.total_steps(cursor) and _has_finished(run, cursor.step):
        console.print(f"{run} has finished its {cursor.step} steps; with more training.steps or epochs it goes on")
        return plan
    if not gpus:
        console.print("no GPU: labels and positions are computed on CPU actors, training runs on CPU")
    check_room(job, train_pools(job, gpus), "training", job.resources.train_labels, nodes)
    if job.resources.is_elastic:
        check_elastic(job, gpus)
    run.remove(RAY_TRAIN_MEMORY)
    system, place = arrow_file_system(job.output.run)
    training, resources = job.training, job.resources
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"plan": pickle.dumps(plan)},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=resources.workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=resources.resize_seconds,
            use_gpu=gpus,
            label_selector=resources.train_labels or None,
            resources_per_worker=worker_needs(job, gpus),
        ),
        run_config=RunConfig(
            worker_runtime_env={"env_vars": LEFTOVER_DATA | ({} if gpus else NO_GPU)},
            name=posixpath.basename(place),
            storage_path=posixpath.dirname(place),
            storage_filesystem=None if run.shared_path else system,
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=training.max_failures,
                max_preemption_failures=-1 if training.max_preemptions is None else training.max_preemptions,
            ),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    with RunWatch(job.name, run, plan.total_steps(cursor)):
        try:
            trainer.fit()
        except SystemExit as end:  # what Ray Train makes of Ctrl-C, after it has ended the workers
            raise KeyboardInterrupt from end
        except WorkerGroupError as error:
            mistakes = [each for each in error.worker_failures.values() if isinstance(each, UserError)]
            if not mistakes:
                raise
            raise UserError(str(mistakes[0])) from error
    return plan


def _has_finished(run: RunFolder, step: int) -> bool:
    history = read_history(run.fetch())
    return bool(history) and history[-1]["event"] == "finish" and history[-1]["step"] == step


def train_cpus(job: Job) -> int:
    """Logical CPUs that training takes where it has no GPU."""
    return math.ceil(needs(train_pools(job, gpus=False))["CPU"])


def check_train_nodes(job: Job) -> None:
    """Raise UserError where a node of the cluster cannot train."""
    nodes, outputs = cluster_nodes(), {"output.prepared": job.output.prepared, "output.run": job.output.run}
    modules, gpus = packages_of(job, trains=True), uses_gpus(job, nodes)
    check_nodes(nodes, job.resources.train_labels, outputs, modules=modules, gpus=gpus)


def main(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    overrides: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")] = [],  # noqa: B006
    other_data: Annotated[
        str | None,
        typer.Option(
            "--continue-on",
            metavar="PREPARED",
            help="Train on with other data: another job's output.prepared. The run's weights and steps are kept, "
            "the first epoch of that data begins.",
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option("--trace", metavar="STEP", help="Only list the samples of a step, or of several: 100:105."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --trace: a line of JSON for each sample.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only show the plan, and what mmray doctor finds in the job.")] = False,
    verbose: Annotated[bool, typer.Option(help="Show what workers and libraries print, too.")] = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else this machine.")] = None,
) -> None:
    """Train on the job's prepared dataset; continues from the last checkpoint where there is one."""
    job = load_job(job_file, overrides)
    if other_data is not None:
        job = with_data(job, other_data)
    if steps is not None:
        trace(job, steps, continue_on=other_data is not None, as_json=as_json)
        return
    if dry_run:
        from jobs.dry_run import plan_train

        raise typer.Exit(plan_train(job, address, continue_on=other_data is not None, verbose=verbose))
    check_outputs(job)
    check_job(job)
    prepared = open_prepared(job)
    if connect(address, cpus=train_cpus(job), verbose=verbose):
        check_train_nodes(job)
    else:
        check_own_memory(cluster_nodes())
    train(job, prepared, continue_on=other_data is not None)
    console.print(run_table(Run(job.output.run)))
    ray.shutdown()


if __name__ == "__main__":
    run_main(main)
