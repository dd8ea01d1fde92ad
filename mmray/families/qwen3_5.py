"""Qwen3.5 and its mixture of experts: three of four layers are linear attention, which carries a state along the row.

Positions alone do not keep samples apart there: the state, and the convolution before it, continue into the next
sample, and logits are off by their own size. The kernels of two packages accept the beginnings of samples,
flash-linear-attention as cumulative lengths and causal-conv1d as a number for each token. They always get both, because
one alone is silently wrong and because transformers refuses both on its plain torch implementation. So rows of several
samples need both packages.

Tests show that transformers passes these inputs to the two functions, and that packed equals unpacked with stand-ins of
plain torch that do what the packages document. The kernels themselves, which need a GPU, were not run.
"""

import importlib
import inspect
from typing import Any

import torch
from transformers import PretrainedConfig

from mmray.families.base import PackedRow, sample_bounds
from mmray.families.packed_attention import PACKED_FLASH
from mmray.families.qwen2_vl import Qwen2VL

_KERNELS = {
    "flash-linear-attention": (("fla", "fla.ops.gated_delta_rule"), "chunk_gated_delta_rule", "cu_seqlens"),
    "causal-conv1d": (("causal_conv1d",), "causal_conv1d_fn", "seq_idx"),
}
"""For each distribution: the modules in which linear attention looks for a function, that function, and the argument
that keeps samples apart."""


class Qwen35(Qwen2VL):
    """Qwen3.5, dense and with experts (images; video is not read). Packs only where the kernels of
    flash-linear-attention and causal-conv1d are installed, which tests have tried with stand-ins alone."""

    model_types = ("qwen3_5", "qwen3_5_moe")
    processor_classes = ("Qwen3VLProcessor",)

    @classmethod
    def by_sample_problem(cls, config: PretrainedConfig) -> str | None:
        return _linear_problem(config)

    def packing_problem(self, config: PretrainedConfig, *, sample_tokens: int, row_tokens: int) -> str | None:
        if problem := _linear_problem(config):
            return problem
        return super().packing_problem(config, sample_tokens=sample_tokens, row_tokens=row_tokens)

    def attention_inputs(self, row: PackedRow, dtype: torch.dtype, config: PretrainedConfig) -> dict[str, Any]:
        """The beginnings of the samples, in each form that some layer reads.

        None for a single sample without packed attention: a picture added after it changes nothing before it, and
        transformers refuses these inputs where the kernels are missing.
        """
        if int(row.segment_ids.max()) < 1 and config._attn_implementation != PACKED_FLASH:
            return {}
        number = torch.arange(len(row.lengths), dtype=torch.int32, device=row.lengths.device)
        number = torch.repeat_interleave(number, row.lengths, output_size=len(row.input_ids))
        return sample_bounds(row) | {"seq_idx": number[None]}


def _linear_problem(config: PretrainedConfig) -> str | None:
    """The reason why the linear attention of a model cannot keep samples apart here; None where it can."""
    missing = missing_kernels() if "linear_attention" in config.get_text_config().layer_types else []
    if not missing:
        return None
    return f"its linear attention keeps samples apart only with {' and '.join(missing)}, which cannot be imported"


def missing_kernels() -> list[str]:
    """The distributions that linear attention needs to keep samples apart and that are not installed here.

    They are found as transformers finds them, by importing. An old version, whose function has no such argument, is
    missing too: transformers leaves out arguments that a function does not name.
    """
    return [name for name, kernel in _KERNELS.items() if not _keeps_apart(*kernel)]


def _keeps_apart(modules: tuple[str, ...], function: str, argument: str) -> bool:
    try:
        kernels = [getattr(importlib.import_module(module), function, None) for module in modules]
    except Exception:  # noqa: BLE001  A package may raise anything where it finds no GPU; transformers does without it.
        return False
    return any(kernel is not None and argument in inspect.signature(kernel).parameters for kernel in kernels)
