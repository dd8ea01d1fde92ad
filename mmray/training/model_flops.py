"""The floating-point operations that a model needs for a batch: a count by its weights, not a measurement.

| part | operations forward |
| --- | --- |
| matrices | two for each weight and each position that the part sees |
| attention of the text | four for each layer, each value of a token's queries and each pair of tokens |

Backward, a matrix takes as many again for the gradient of its input, where it or anything before it is trained, and as
many for that of its weights, where they are. So a model that is trained as a whole takes six for each weight and
position (Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, appendix B). Only samples count, not
what fills gaps; what gradient checkpointing computes again does not, nor do tables of embeddings, norms, and attention
inside the vision tower.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from mmray.errors import UserError
from mmray.families import model_parts

PARTS = ("vision", "projector", "language", "head")
"""The parts in the order in which they run."""

BF16_PEAKS = {
    "GB200": 2.5e15, "B200": 2.25e15, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "L4": 121e12,
}  # fmt: skip
"""bf16 operations a second of GPUs with dense matrices, by a part of their name, from their data sheets."""

_EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "top_k_experts")
_WITH_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class Load:
    """The samples that operations are counted for."""

    lengths: np.ndarray
    """Number of tokens of each sample."""
    trained_tokens: int
    visual_tokens: int
    pixels: int
    """Number of pixels of all frames that the vision tower takes."""


class ModelFlops:
    """Counts the operations of a model in training."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Reads the model's weights, and which of them are trained.

        Raises UserError where its parts, or the patches of its vision tower, are not known.
        """
        self._patch_pixels = _patch_pixels(model.config)
        matrices, upstream = _matrices(model), False
        self._operations: dict[str, float] = {}
        for part in PARTS:
            upstream = upstream or any(trained for _, trained in matrices[part])
            self._operations[part] = sum(
                weights * (2 + 2 * upstream + 2 * trained) for weights, trained in matrices[part]
            )
            if part == "language":
                self._attention = _attention(model.config.get_text_config(), backward=upstream)

    def of(self, load: Load) -> int:
        """Number of operations, forward and backward."""
        return round(self.in_matrices(load) + self._attention.of(load.lengths))

    def in_matrices(self, load: Load) -> float:
        """The operations in matrices, without attention."""
        positions = {
            "vision": load.pixels / self._patch_pixels, "projector": load.visual_tokens,
            "language": float(load.lengths.sum()), "head": load.trained_tokens,
        }  # fmt: skip
        return sum(self._operations[part] * positions[part] for part in PARTS)


class _Attention:
    """Counts the operations of a language model's attention."""

    def __init__(self, config: Any, *, backward: bool) -> None:
        """Reads a text configuration. backward: gradients pass through it."""
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        layers = getattr(config, "per_layer_config", None) or [config] * len(kinds)
        self._factor = 4 * (3 if backward else 1)
        self._layers = [
            (_query_width(layer), layer.sliding_window if kind == "sliding_attention" else None)
            for kind, layer in zip(kinds, layers, strict=True)
            if kind in _WITH_ATTENTION
        ]

    def of(self, lengths: np.ndarray) -> float:
        """Number of operations for samples of these lengths, of which each token sees itself and those before it."""
        whole = lengths.astype(np.float64)
        products = 0.0
        for width, window in self._layers:
            unseen = np.maximum(whole - window, 0) if window else np.zeros_like(whole)
            products += width * float((whole**2 - unseen**2).sum()) / 2
        return self._factor * products


def _attention(config: Any, *, backward: bool) -> _Attention:
    """The attention of a text configuration. Raises UserError where it names its layers in a way of its own."""
    try:
        return _Attention(config, backward=backward)
    except AttributeError as error:
        raise UserError(f"the attention of {type(config).__name__} is not known: {error}") from error


def bf16_peak(device: str) -> float | None:
    """bf16 operations a second of a GPU, by its name; None where they are not known."""
    return next((peak for name, peak in BF16_PEAKS.items() if name in device), None)


def _matrices(model: PreTrainedModel) -> dict[str, list[tuple[float, bool]]]:
    """The matrices of each part: how many weights of each a position sees, and whether they are trained."""
    parts, head, share = model_parts(model), model.get_output_embeddings(), _share_of_experts(model.config)
    matrices: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for prefix, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        for name, weight in module.named_parameters(prefix, recurse=False):
            part = "head" if module is head else parts.part_of(name)
            shape = getattr(weight, "ds_shape", weight.shape)
            if len(shape) < 2 or part not in PARTS:
                continue
            is_linear = hasattr(module, "in_features") and name.endswith(".weight")
            count = module.in_features * module.out_features if is_linear else float(np.prod(shape))
            count *= share if ".experts." in name and part == "language" else 1.0
            matrices[part].append((count, weight.requires_grad))
    return matrices


def _query_width(config: Any) -> int:
    """Number of values of a token's queries in a layer."""
    heads: int = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def _share_of_experts(config: Any) -> float:
    """The share of its experts that a mixture sends a token to; 1 without experts."""
    text = config.get_text_config()

    def first(*names: str) -> int | None:
        return next((count for name in names if (count := getattr(text, name, None))), None)

    experts, used = first("num_experts", "num_local_experts", "n_routed_experts"), first(*_EXPERTS_OF_A_TOKEN)
    return used / experts if experts and used else 1.0


def _patch_pixels(config: Any) -> int:
    """Number of pixels of a patch of the vision tower."""
    size = getattr(getattr(config, "vision_config", None), "patch_size", None)
    if size is None:
        raise UserError(f"a {config.model_type} names no size of patches")
    return int(np.prod(size)) if isinstance(size, list | tuple) else int(size) ** 2
