"""Learning rate and parameter groups: pure functions, so that resuming needs no scheduler state."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from mmray.training.settings import TrainingSettings


def learning_rate(step: int, total_steps: int, settings: TrainingSettings) -> float:
    """The learning rate of one optimizer step.

    step: optimizer steps done before this one, from 0. total_steps: steps of the whole training.

    The warm-up of w steps uses 1/w, 2/w, … 1 of the highest rate, so that no step is spent at zero. After it,
    `cosine` and `linear` fall towards `min_learning_rate_ratio`, which they would reach at `step ==
    total_steps`; later steps stay there.
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
    """Steps of the warm-up: as given, or the ratio of all steps rounded up; 0 where neither is set."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return math.ceil((settings.warmup_ratio or 0.0) * total_steps)


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
