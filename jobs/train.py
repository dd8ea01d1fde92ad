"""Train on a prepared dataset: `python jobs/train.py JOB.yaml`, or the same words behind `ray job submit`.

The same command continues a run that was stopped, from its last checkpoint, with any number of workers.
"""

import json
import logging
import sys
import threading
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ray
import typer
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.common import check_cluster, check_outputs, connect, console, run_main, train_needs, uses_gpus
from jobs.train_loop import RunPlan, run_plan, train_worker
from mmray.config import Job, load_job
from mmray.doctor import Status, examine_settings
from mmray.errors import UserError
from mmray.kept_warnings import WARNINGS_FILE, read_warnings
from mmray.prepared import PreparedDataset
from mmray.prepared.fingerprint import check_settings
from mmray.progress import ProgressBar
from mmray.report import run_table
from mmray.training.compatibility import job_family
from mmray.training.metrics import METRICS_FILE

log = logging.getLogger("mmray")

POLL_SECONDS = 0.5
TAIL_BYTES = 4096
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
"""Environment of workers that train on CPUs, also on machines that have GPUs."""


def check_job(job: Job) -> None:
    """The cheap part of `mmray doctor`, before anything starts: a line for each check, UserError for a failed one."""
    for finding in examine_settings(job):
        if finding.status is Status.FAIL:
            raise UserError(f"{finding.check}: {finding.detail}")
        console.print(f"{finding.check}: {finding.detail}", markup=False, highlight=False)


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
        if not len(prepared):
            raise UserError(f"{prepared.path} has no bins: every row was rejected, see its rejected.parquet")
        found[split] = prepared
    return found


def train(job: Job, prepared: dict[str, PreparedDataset]) -> RunPlan:
    """Run training to its end, resuming where a checkpoint is. Ray must be connected."""
    gpus = uses_gpus(job)
    if not gpus:
        console.print("no GPU: labels and positions are computed on CPU actors, training runs on CPU")
    check_cluster(job, train_needs(job, gpus), "training")
    plan = run_plan(job, prepared, gpus)
    run = Path(job.output.run).absolute()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=job.resources.workers,
            use_gpu=gpus,
            label_selector=job.resources.train_labels or None,
            resources_per_worker={"CPU": job.resources.cpus_per_worker}
            | ({"GPU": 1 - job.resources.gpu_share} if gpus else {}),
        ),
        run_config=RunConfig(
            worker_runtime_env={} if gpus else {"env_vars": NO_GPU},
            name=run.name,
            storage_path=str(run.parent),
            failure_config=FailureConfig(max_failures=job.training.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
            checkpoint_config=CheckpointConfig(num_to_keep=job.training.keep_checkpoints),
        ),
    )
    with _Watch(job.name, run, plan.total_steps):
        try:
            trainer.fit()
        except WorkerGroupError as error:
            mistakes = [each for each in error.worker_failures.values() if isinstance(each, UserError)]
            if not mistakes:
                raise
            raise UserError(str(mistakes[0])) from error
    return plan


class _Watch:
    """Shows the run's metrics as they are written: the driver reads what rank 0 appends. And how many warnings of
    workers and actors there are; at the end, the last of them."""

    def __init__(self, name: str, run: Path, total_steps: int) -> None:
        self._name, self._path, self._total = name, run / METRICS_FILE, total_steps
        self._warnings = run / WARNINGS_FILE
        self._old_warnings = self._warnings.stat().st_size if self._warnings.exists() else 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if found := read_warnings(self._warnings, self._old_warnings):
            log.warning("%s: %d warnings, the last: %s", self._warnings, len(found), found[-1])

    def _show(self) -> None:
        with ProgressBar(f"{self._name}: training", "steps") as bar:
            finished = False
            while not finished:
                finished = self._stop.wait(POLL_SECONDS)
                if self._path.exists():
                    self._update(bar)

    def _update(self, bar: ProgressBar) -> None:
        with self._path.open("rb") as file:
            file.seek(max(0, self._path.stat().st_size - TAIL_BYTES))
            lines = [json.loads(line) for line in file.read().split(b"\n")[:-1] if line.startswith(b"{")]
        lines = [line for line in lines if line.get("loss") is not None]
        if lines:
            last = lines[-1]
            note = f"loss {last['loss']:.4f}  {last['tokens'] / max(last['step_seconds'], 1e-9):,.0f} tokens/s"
            if found := read_warnings(self._warnings, self._old_warnings):
                note += f"  warnings: {len(found)}"
            bar.update(last["step"], self._total, note)


def main(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    overrides: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")] = [],  # noqa: B006
    verbose: Annotated[bool, typer.Option(help="Show what workers and libraries print, too.")] = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else this machine.")] = None,
) -> None:
    """Train on the job's prepared dataset; continues from the last checkpoint where there is one."""
    job = load_job(job_file, overrides)
    check_outputs(job)
    check_job(job)
    if "://" in job.output.run:
        raise UserError(f"output.run {job.output.run!r}: give a folder that all nodes share, such as an NFS path")
    prepared = open_prepared(job)
    connect(address, cpus=int(train_needs(job, gpus=False)["CPU"] + 0.5), verbose=verbose)
    train(job, prepared)
    console.print(run_table(Path(job.output.run)))
    ray.shutdown()


if __name__ == "__main__":
    run_main(main)
