"""Learning rate and parameter groups: pure functions, so that resuming needs no scheduler state."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mmray.training.settings import TrainingSettings


def learning_rate(step: int, total_steps: int, settings: TrainingSettings) -> float:
    """The learning rate of one optimizer step.

    step: optimizer steps done before this one, from 0.
    total_steps: steps of the whole training.

    The warm-up of w steps uses 1/w, 2/w, … 1 of the highest rate, so that no step is spent at zero. After it, `cosine`
    and `linear` fall towards `min_learning_rate_ratio`, which they would reach at `step == total_steps`; later steps
    stay there.
    """
    warmup = warmup_steps(total_steps, settings)
    peak = settings.learning_rate
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if settings.schedule == "cosine":
        height = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        height = 1.0 - progress
    lowest = settings.min_learning_rate_ratio
    return peak * (lowest + (1.0 - lowest) * height)


def warmup_steps(total_steps: int, settings: TrainingSettings) -> int:
    """Number of warm-up steps: as set, or the ratio of all steps rounded up; 0 where neither is set."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return math.ceil((settings.warmup_ratio or 0.0) * total_steps)


def gradient_norm(gradients: Sequence[torch.Tensor]) -> float:
    """The 2-norm of all gradients together, summed in fp64.

    In fp32 a sum over 16 million elements is off by 7e-4, and one of equal elements by 1e-2.
    """
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def clip_gradients(gradients: Sequence[torch.Tensor], norm: float, max_norm: float | None) -> None:
    """Scales gradients of this norm down to `max_norm`, in place; None leaves them as they are."""
    scale = 1.0 if max_norm is None else max_norm / (norm + 1e-6)  # as DeepSpeed at the other stages
    if scale < 1:
        torch._foreach_mul_(list(gradients), scale)


def parameter_groups(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices, which decay, and biases and norm scales, which do not.

    Under ZeRO-3 a parameter is an empty shard with its true shape beside it (`ds_shape`).
    """
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for parameter in parameters:
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) >= 2 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
