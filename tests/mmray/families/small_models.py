"""Small models of the real classes with random weights."""

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from mmray.synthetic.models import small_config

VISION = {"qwen2_vl": "visual", "qwen2_5_vl": "visual", "idefics3": "vision_model", "smolvlm": "vision_model"}
"""What the names of the vision tower's parameters hold."""


@functools.cache
def small_model(model_type: str, folder: Path, attention: str = "sdpa") -> Any:
    """A model that takes the processor of `folder`. fp32, training mode, logits of scale 1 and more.

    As initialised, logits are about 0.01 and attention is nearly even: no mistake in a mask would show.
    """
    torch.manual_seed(7)
    config = small_config(model_type, folder, attn_implementation=attention)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model.train()
