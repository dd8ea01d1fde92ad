"""Learning rate, optimizer groups and gradient norm: pure functions, so that resuming needs no scheduler state."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from mmray.training.settings import TrainingSettings
from mmray.training.treatments import Stage, WeightGroup


def learning_rate(step: int, stage: Stage, settings: TrainingSettings, peak: float) -> float:
    """The learning rate of one optimizer step, for weights with this peak rate.

    step: optimizer steps done before this one, from 0, over the whole training.
    stage: the stage of the step, which goes through the whole schedule.

    The warm-up of w steps uses 1/w, 2/w, … 1 of the highest rate, so that no step is spent at zero. After it, `cosine`
    and `linear` fall towards `min_learning_rate_ratio`, which they would reach after the stage's last step; later steps
    stay there. `wsd` does so in the last `decay_steps` of the stage: with 10 steps and 4 of decay to zero, the last
    four rates are 1, 0.75, 0.5 and 0.25 of the highest.
    """
    step, total_steps = step - stage.first_step, stage.steps
    warmup = warmup_steps(total_steps, settings)
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "constant":
        return peak
    falls_from = total_steps - (settings.decay_steps or 0) if settings.schedule == "wsd" else warmup
    progress = min(1.0, max(0, step - falls_from) / max(1, total_steps - falls_from))
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


def decays_from(stage: Stage, settings: TrainingSettings) -> int | None:
    """With the wsd schedule: number of steps of the training that are done before the decay of a stage begins."""
    return None if settings.schedule != "wsd" else stage.stop_step - (settings.decay_steps or 0)


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


def optimizer_groups(model: torch.nn.Module, groups: Sequence[WeightGroup]) -> list[dict[str, Any]]:
    """The groups as torch's optimizers take them, with the weights themselves."""
    weights = dict(model.named_parameters())
    return [{"params": [weights[name] for name in group.names], "weight_decay": group.weight_decay} for group in groups]
