"""The DeepSpeed configuration of a run, and DeepSpeed itself, imported so that it compiles nothing.

DeepSpeed is an optional dependency and slow to import, so it is reached only through `import_deepspeed`.
Three of its defaults are replaced: its CPU backend compiles a shared-memory all-reduce at start-up wherever a
C++ compiler is found, on every rank at once; its FusedAdam needs nvcc on every node, where torch's AdamW needs
nothing; its bf16 mode accumulates gradients in bf16.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from mmray.errors import UserError
from mmray.training.optimizers import check_optimizer, optimizer_config
from mmray.training.settings import ModelSettings, TrainingSettings, load_deepspeed_overrides, offloads_optimizer

UNUSED = "mlflow"
"""A package that DeepSpeed imports for its autotuner where it is installed: 2.3 of the 4 s of DeepSpeed's own
import."""


def import_deepspeed() -> ModuleType:
    """The deepspeed module. Raises UserError where it is not installed."""
    try:
        with _absent(UNUSED):
            import deepspeed
            import deepspeed.ops
    except ImportError as error:
        raise UserError(f"training needs deepspeed: pip install 'mmray[cluster]' ({error})") from error
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch 2.13 renamed the collectives that DeepSpeed calls, and says so at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


@contextmanager
def _absent(package: str) -> Iterator[None]:
    """Makes importing the package fail inside the block, unless it is imported already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


@contextmanager
def buffers_kept(model: torch.nn.Module) -> Iterator[None]:
    """Raises UserError where the block, DeepSpeed's initialisation, changes the types of the model's buffers.

    DeepSpeed before 0.19.2 made rotary frequencies bf16: at position 1,500 their cosine is then off by 0.27.
    """
    before = {name: buffer.dtype for name, buffer in model.named_buffers()}
    yield
    changed = [
        f"{name} from {before[name]} to {buffer.dtype}"
        for name, buffer in model.named_buffers()
        if name in before and buffer.dtype != before[name]
    ]
    if changed:
        raise UserError(
            f"DeepSpeed changed the type of {len(changed)} buffers of the model, {changed[0]}, which makes positions "
            "wrong: install deepspeed 0.19.8 or later"
        )


MANY_MICRO_BATCHES = 4
"""Micro-batches of a worker's step from which on stage 1 is the default."""


def with_zero_stage(training: TrainingSettings, grad_accumulation: int, saved_stage: int | None) -> TrainingSettings:
    """The settings with a ZeRO stage where they leave it open.

    Stage 2 exchanges the gradients of every micro-batch, stage 1 those of a step. grad_accumulation: micro-batches of
    each worker in a step; saved_stage: that of the checkpoint a run continues from, which it keeps; None: a new run.
    """
    if training.zero_stage is not None:
        return training
    stage = saved_stage if saved_stage is not None else 1 if grad_accumulation >= MANY_MICRO_BATCHES else 2
    return training.model_copy(update={"zero_stage": stage})


def effective_zero_stage(model: ModelSettings, training: TrainingSettings) -> int:
    """The ZeRO stage that runs: 0 becomes 1 with bf16, because DeepSpeed has no fp32 accumulation for stage 0.

    2 where the settings leave it open (`with_zero_stage`).
    """
    stage = 2 if training.zero_stage is None else training.zero_stage
    return max(1, stage) if model.dtype == "bf16" else stage


def deepspeed_config(
    model: ModelSettings,
    training: TrainingSettings,
    *,
    world_size: int,
    grad_accumulation: int,
    load_universal: bool,
) -> dict[str, Any]:
    """DeepSpeed's configuration: mmray's, overridden by the user's.

    Gradient scaling is not left to DeepSpeed: the batch sizes here only tell it when a step is complete.
    load_universal: whether the checkpoint to resume was converted for another number of workers.

    Raises UserError where the optimizer cannot run like this.
    """
    stage = effective_zero_stage(model, training)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch_bins,
        "gradient_accumulation_steps": grad_accumulation,
        "train_batch_size": training.micro_batch_bins * grad_accumulation * world_size,
        "gradient_clipping": (training.max_grad_norm or 0.0) if stage else 0.0,  # at stage 0 the engine clips
        "zero_optimization": {"stage": stage} | ({"overlap_comm": True} if stage and torch.cuda.is_available() else {}),
        "checkpoint": {"load_universal": load_universal},
        "steps_per_print": None,
        **optimizer_config(training),
    }
    if model.dtype == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    config = _merge(config, load_deepspeed_overrides(training.deepspeed))
    offloads = offloads_optimizer(config)
    check_optimizer(training, zero_stage=stage, offloads=offloads)
    if offloads:
        # DeepSpeed's own Adam for the host, which it compiles on first use; offloading is slow without it.
        del config["optimizer"]["params"]["torch_adam"]
    return config


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
