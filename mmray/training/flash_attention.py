"""A check for models that flash attention cannot run, from a model without memory: on any machine, before a GPU is
used."""

import torch
from transformers import PreTrainedModel

from mmray.training.settings import ModelSettings

MAX_HEAD_SIZE = 256
"""Largest head dimension that the kernels of flash_attn 2 support."""


def flash_problem(model: PreTrainedModel, settings: ModelSettings) -> str | None:
    """The reason why `flash_attention_2` cannot run a model of these settings; None where it can."""
    if settings.dtype != "bf16":
        return f"its kernels take bf16, and model.dtype is {settings.dtype}"
    refusing = {
        type(part).__name__
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and not part._supports_flash_attn
    }
    if refusing:
        return f"transformers has none for {', '.join(sorted(refusing))}"
    too_large = {(type(part).__name__, size) for part in model.modules() if (size := head_size(part)) > MAX_HEAD_SIZE}
    if too_large:
        heads = ", ".join(f"{name} has {size}" for name, size in sorted(too_large))
        return f"its kernels take heads of up to {MAX_HEAD_SIZE} numbers, and {heads}"
    return None


def head_size(part: torch.nn.Module) -> int:
    """The head dimension of an attention layer; 0 for other modules."""
    size = getattr(part, "head_dim", 0)
    return size if isinstance(size, int) else 0
