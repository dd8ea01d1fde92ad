"""The optimizers besides torch's AdamW: which one runs where, and how DeepSpeed is given it.

    adamw         torch's AdamW, inside DeepSpeed
    adamw_8bit    bitsandbytes' AdamW8bit, handed to DeepSpeed ready made
    muon          DeepSpeed's own Muon, with AdamW for what is no matrix of a layer

What an optimizer cannot do is refused before work starts (`check_optimizer`).
"""

import importlib.util
from typing import Any

import torch

from mmray.errors import UserError
from mmray.training.settings import TrainingSettings

UNCONVERTED = {
    "adamw_8bit": "its 8-bit states are quantised in blocks of each worker's shard, which cannot be cut anew",
    "muon": "DeepSpeed's conversion of shards knows the states of AdamW alone, and would lose Muon's momentum",
}
"""Why the shards of an optimizer cannot be converted for other groups or another number of workers."""

DEFAULT_MOMENTUM = 0.95


def check_optimizer(training: TrainingSettings, *, zero_stage: int, offloads: bool) -> None:
    """Raises UserError where the optimizer cannot run as it is set.

    zero_stage: the ZeRO stage that runs. offloads: whether DeepSpeed keeps the optimizer's states in the host's memory.
    """
    name = training.optimizer
    if name == "adamw":
        return
    if offloads:
        raise UserError(
            "training.deepspeed offloads the optimizer, whose step is then DeepSpeed's own Adam: set optimizer: adamw "
            f"instead of {name}, or leave offload_optimizer out"
        )
    if training.stages and zero_stage > 0:
        raise UserError(
            f"training.stages with optimizer {name} under ZeRO {zero_stage}: at the end of a stage the states move to "
            f"other groups, and {UNCONVERTED[name]}; set optimizer: adamw, or zero_stage: 0 and model.dtype: fp32"
        )
    if name == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("optimizer: adamw_8bit needs bitsandbytes: pip install 'mmray[bitsandbytes]'")
    if name == "muon" and zero_stage > 0 and training.max_grad_norm is not None:
        raise UserError(
            f"optimizer: muon under ZeRO {zero_stage}: there DeepSpeed clips Muon's updates, whose norm does not "
            "depend on the gradient, and so shrinks the learning rate; set training.max_grad_norm: null"
        )
    if name == "muon" and zero_stage == 3:
        raise UserError(
            "optimizer: muon under ZeRO 3 is not proven: set training.zero_stage to 0, 1 or 2, or optimizer: adamw"
        )


def optimizer_config(training: TrainingSettings) -> dict[str, Any]:
    """The part of DeepSpeed's configuration that makes the optimizer, or allows a ready-made one."""
    adam = {
        "lr": training.learning_rate,
        "betas": list(training.betas),
        "eps": training.eps,
        "weight_decay": training.weight_decay,
    }
    match training.optimizer:
        case "adamw_8bit":
            return {"zero_allow_untested_optimizer": True}
        case "muon":
            params = adam | {"torch_adam": True, "momentum": momentum(training)}
            return {"optimizer": {"type": "Muon", "params": params}}
    return {"optimizer": {"type": "AdamW", "params": {"torch_adam": True} | adam}}


def ready_made(training: TrainingSettings, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
    """The optimizer that DeepSpeed is handed; None where its configuration makes it."""
    if training.optimizer == "muon" and not torch.cuda.is_available():
        # Muon's iteration would be compiled by a C++ compiler, 20 s for each shape of a matrix.
        torch.compiler.set_stance("force_eager")
    if training.optimizer != "adamw_8bit":
        return None
    import bitsandbytes

    options = {"lr": training.learning_rate, "betas": training.betas, "eps": training.eps}
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, **options)
    return optimizer


def momentum(training: TrainingSettings) -> float:
    """Decay rate of Muon's running mean of the gradient."""
    return DEFAULT_MOMENTUM if training.muon_momentum is None else training.muon_momentum


def peak_factor(training: TrainingSettings) -> float:
    """Rate of the matrices that Muon trains, relative to that of AdamW."""
    assert training.muon_learning_rate is not None
    return training.muon_learning_rate / training.learning_rate
