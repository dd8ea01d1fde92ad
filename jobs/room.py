"""Whether a training fits: its bytes against the memory of its devices, and its checkpoints against free disk space.

It is told in a plan, and checked before work starts. Refused is only what cannot be: weights, gradients and optimizer
that are more than a device has, a checkpoint that is more than a disk has free. Activations are an estimate.
"""

import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jobs.probe import Machine
from mmray.base.words import file_size
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.run.folder import RunFolder
from mmray.training.deepspeed_config import with_zero_stage
from mmray.training.footprint import Footprint, Sizes, footprint, remedies
from mmray.training.settings import ModelSettings, TrainingSettings


class UnknownModel(UserError):
    """The model cannot be built from here, so that its bytes are not known; workers may reach it."""


@dataclass(frozen=True)
class Need:
    """The bytes of a training on a number of ranks, beside what there is for them."""

    bytes: Footprint
    ranks: int
    stage: int
    device: int | None
    """Bytes of the smallest device of a rank: a GPU, or a rank's part of its host's memory; None where unknown."""
    host: int | None
    """Bytes of the host's memory for each rank; None where unknown."""


@lru_cache(maxsize=4)
def _sizes(model: str, training: str, tokens: int, visual_tokens: int) -> Sizes:
    settings = ModelSettings.model_validate_json(model), TrainingSettings.model_validate_json(training)
    try:
        return Sizes.of(*settings, tokens, visual_tokens)
    except UserError as error:
        raise UnknownModel(str(error)) from error


def _sizes_of(job: Job) -> Sizes:
    """The sizes of a job's model and micro-batches. Raises UnknownModel where the model cannot be built here."""
    bins = job.training.micro_batch_bins
    tokens, visual_tokens = job.packing.token_capacity * bins, job.packing.visual_capacity * bins
    return _sizes(job.model.model_dump_json(), job.training.model_dump_json(), tokens, visual_tokens)


def need_of(job: Job, gpus: bool, machines: Sequence[Machine], saved_stage: int | None = None) -> Need:
    """Computes the bytes that a job needs of each rank, with the fewest workers that it may have, beside those that
    machines have.

    saved_stage: the ZeRO stage of the checkpoint it continues from. Raises UnknownModel where the model cannot be
    built here.
    """
    training, resources = job.training, job.resources
    ranks = resources.min_workers
    micro_batches = math.ceil(training.global_batch_bins / training.micro_batch_bins / ranks)
    training = with_zero_stage(training, micro_batches, saved_stage)
    sizes = _sizes_of(job)
    hosts = [machine.memory for machine in machines if machine.memory]
    on_each = math.ceil(ranks / max(1, len(machines)))
    host = min(hosts) // on_each if hosts else None
    devices = [size for machine in machines for size in machine.gpu_memory]
    device = (min(devices) if devices else None) if gpus else host
    bytes_needed = footprint(sizes, job.model, training, ranks)
    return Need(bytes_needed, ranks, training.zero_stage or 0, device, host)


def check_memory(job: Job, gpus: bool, machines: Sequence[Machine], saved_stage: int | None = None) -> None:
    """Raises UserError where the memory of each rank cannot be enough, with the settings that would be."""
    need = need_of(job, gpus, machines, saved_stage)
    lacks = need.device is not None and need.bytes.certain > need.device
    lacks_host = need.host is not None and need.bytes.host > need.host
    if not (lacks or lacks_host):
        return
    sizes = _sizes_of(job)
    training = job.training.model_copy(update={"zero_stage": need.stage})
    fitting = remedies(sizes, job.model, training, need.ranks, need.device or sys.maxsize, need.host or 0)
    if not gpus:  # more workers on one machine share its memory
        fitting = [text for text in fitting if "resources.workers" not in text and "offload" not in text]
    remedy = f"set {' or '.join(fitting)}" if fitting else "take a smaller model, or larger machines"
    raise UserError(f"training does not fit: {memory_words(need, gpus)}. It would fit with another setting: {remedy}")


def memory_words(need: Need, gpus: bool) -> str:
    """The bytes of each rank, in words."""
    bytes_needed = need.bytes
    what = "GPU" if gpus else "worker's part of the memory"
    has = "unknown" if need.device is None else file_size(need.device)
    host = f", {file_size(bytes_needed.host)} in the host's memory" if bytes_needed.host else ""
    return (
        f"each of {need.ranks} takes {file_size(bytes_needed.certain)}: weights {file_size(bytes_needed.weights)}, "
        f"gradients {file_size(bytes_needed.gradients)}, optimizer {file_size(bytes_needed.optimizer)} (ZeRO "
        f"{need.stage}){host}; activations about {file_size(bytes_needed.activations)}. A {what} has {has}"
    )


def check_disk(job: Job, gpus: bool, machines: Sequence[Machine], saved_stage: int | None = None) -> str:
    """The room that checkpoints take, in words. Raises UserError where there is not enough."""
    need = need_of(job, gpus, machines, saved_stage)
    size, run = need.bytes.checkpoint, RunFolder(job.output.run)
    words = [f"a checkpoint has about {file_size(size)}"]
    if run.shared_path is not None:
        most = job.training.keep_checkpoints + (2 if job.keep_best else 1)  # the next one is written before one goes
        free = shutil.disk_usage(_nearest(run.shared_path)).free + sum(_checkpoint_sizes(run.shared_path))
        words.append(f"up to {most} at once are in {run}, which has {file_size(free)} for them")
        if free < most * size:
            raise UserError(
                f"{'; '.join(words)}: free some room, lower training.keep_checkpoints, or set output.run to another "
                "folder"
            )
    part = size * math.ceil(need.ranks / max(1, len(machines))) // need.ranks
    part += size if run.shared_path is None else 0  # a resume copies a whole one
    for machine in machines:
        if machine.free_disk is not None and machine.free_disk < part:
            raise UserError(
                f"{machine.address} has {file_size(machine.free_disk)} free in its TMPDIR, and holds "
                f"{file_size(part)} of a checkpoint there: set TMPDIR to a larger disk where its Ray is started"
            )
    if known := [machine.free_disk for machine in machines if machine.free_disk is not None]:
        words.append(f"{file_size(part)} pass through TMPDIR, which has {file_size(min(known))}")
    return "; ".join(words)


def _nearest(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())


def _checkpoint_sizes(run: Path) -> Iterator[int]:
    """The bytes of the checkpoints in a run's folder, which are deleted as new ones come."""
    for folder in run.glob("checkpoint_*"):
        yield sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
