"""The model that is evaluated: the job's base model, an exported folder, or a checkpoint of the run."""

import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import torch
from transformers import PreTrainedModel

from mmray.config.job import Job
from mmray.errors import UserError
from mmray.run.export import export_model, read_sidecar
from mmray.run.export.sidecar import SIDECAR
from mmray.run.export.source import SourceCheckpoint
from mmray.run.folder import MODEL_FOLDER
from mmray.storage import Folder
from mmray.training.model import build_model

BASE = "base"
"""Name of the evaluation of the job's own model, before any training."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that can be loaded on any machine.

    name: name of its folder of results.
    kind: `base` for the job's `model`; `folder` for a local folder; `checkpoint` for one of the run.
    path: of the folder, or of the checkpoint by path or URI.
    """

    name: str
    kind: Literal["base", "folder", "checkpoint"]
    path: str = ""
    step: int | None = None

    @classmethod
    def find(cls, job: Job, *, folder: str | None = None, checkpoint: str | None = None) -> "EvaluatedModel":
        """The model that `--model` or `--checkpoint` names; without either the run's newest checkpoint.

        folder: a local folder that transformers loads, or `base`. checkpoint: a step, `best` or `last`.

        Raises UserError where there is none.
        """
        if folder is not None and checkpoint is not None:
            raise UserError("give --model or --checkpoint, not both")
        if folder == BASE or (folder is not None and job.model.path is not None and _same(folder, job.model.path)):
            return cls(BASE, "base")
        if folder is not None and "://" in folder:
            raise UserError(f"--model {folder}: only a local folder can be loaded; copy it here")
        if folder is not None:
            if Path(folder, "adapter_config.json").exists():
                raise UserError(
                    f"--model {folder}: an adapter without its base; export it with --merge, or give --checkpoint"
                )
            if not Path(folder, "config.json").exists():
                raise UserError(f"--model {folder}: no folder of a model, it holds no config.json")
            step = read_sidecar(folder).step if Path(folder, SIDECAR).exists() else None
            return cls(PurePosixPath(Path(folder).absolute()).name, "folder", str(Path(folder).absolute()), step)
        if checkpoint not in (None, "last", "best") and not str(checkpoint).isdecimal():
            raise UserError(f"--checkpoint {checkpoint}: give a step, best or last")
        if checkpoint is None and not _has_checkpoint(job.output.run):
            raise UserError(f"{job.output.run} holds no checkpoint yet; give --model base for the job's own model")
        if checkpoint == "best":
            source = SourceCheckpoint.best(job.output.run)
        else:
            source = SourceCheckpoint.find(
                job.output.run, None if checkpoint in (None, "last") else int(str(checkpoint))
            )
        return cls(f"{source.state.step:08d}", "checkpoint", str(source), source.state.step)

    def load(self, job: Job, device: torch.device) -> PreTrainedModel:
        """The model in evaluation mode on a device, in the dtype of the job. Raises the errors of `build_model`."""
        settings = job.model.model_copy(update={"gradient_checkpointing": False})
        if settings.attention == "flash_attention_2" and device.type == "cpu":
            settings = settings.model_copy(update={"attention": "sdpa"})
        if self.kind == "base":
            return _on(device, build_model(settings))
        with tempfile.TemporaryDirectory(prefix="mmray-evaluate-") as scratch:
            folder = self.path
            if self.kind == "checkpoint":
                folder = self._exported(job) or export_model(self.path, f"{scratch}/model", settings=job.model).folder
            loaded = settings.model_copy(
                update={
                    "path": folder, "config": None, "allow_missing": (), "processor": job.model.processor_source,
                    "quantize": None,
                }
            )  # fmt: skip
            return _on(device, build_model(loaded))

    def files(self, job: Job) -> list[str]:
        """The files of a local folder of weights with their sizes and times, by which others are noticed. A checkpoint
        is named by its folder, which never changes."""
        folder = {"base": job.model.path or "", "folder": self.path, "checkpoint": ""}[self.kind]
        if not folder or not Path(folder).is_dir():
            return []
        return [f"{name} {state.size} {state.version}" for name, state in Folder(folder).files().items()]

    def _exported(self, job: Job) -> str | None:
        """The local folder into which the run has exported this checkpoint; None where it has not."""
        folder = f"{job.output.run.rstrip('/')}/{MODEL_FOLDER}"
        if "://" in folder or not Folder(folder).exists(SIDECAR):
            return None
        sidecar = read_sidecar(folder)
        return folder if (sidecar.step, sidecar.dtype) == (self.step, job.model.dtype) else None


def _on(device: torch.device, model: PreTrainedModel) -> PreTrainedModel:
    torch.nn.Module.to(model, device)
    return model.eval()


def _has_checkpoint(run: str) -> bool:
    try:
        SourceCheckpoint.find(run)
    except UserError:
        return False
    return True


def _same(first: str, second: str) -> bool:
    return Path(first).absolute() == Path(second).absolute()
