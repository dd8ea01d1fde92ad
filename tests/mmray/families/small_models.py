"""Small models of the real classes with random weights."""

import functools
from pathlib import Path
from typing import Any

import torch

from mmray.training.model import build_model
from mmray.training.settings import ModelSettings
from tests.mmray.families.zoo import ZOO


@functools.cache
def small_model(name: str, folder: Path, attention: str = "sdpa") -> Any:
    """The model of a member of the zoo that takes the processor of `folder`. fp32, training mode.

    As initialised, logits are about 0.01 and attention is nearly even: no mistake in a mask would show.
    """
    member = ZOO[name]
    config = member.config(folder).to_dict()
    model = build_model(ModelSettings(config=config, dtype="fp32", attention=attention, seed=7))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(member.scale)
        member.prepare_model(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in member.unused))
    return model
