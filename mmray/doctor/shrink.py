"""Makes a model's configuration small: equal classes, kinds of layers and special tokens, few weights.

- Layers: the first of each kind (sliding or full attention, linear, with or without rotary positions, …) and all that
  a list of layer numbers names.
- Width: fewer heads of equal size, so that settings of a head (M-RoPE sections, scales) still fit. Parts that must be
  as wide as the text model get its new width.
- The vision tower keeps its width and its grid, the vocabulary its size: token ids do not change.
"""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

LAYER_COUNTS = ("num_hidden_layers", "depth")
WIDTHS_OF_TEXT = ("out_hidden_size", "projection_dim")
"""Fields of other parts that must equal the text model's width."""

MAX_KEY_VALUE_HEADS, MAX_GROUP, MAX_EXPERTS = 2, 2, 4
MAX_NAMED_LAYERS = 8
"""Longest list of layer numbers whose layers are all kept: other parts depend on them. A longer list names a kind."""

Values = dict[str, Any]


def shrunken(config: PretrainedConfig) -> PretrainedConfig:
    """Make the configuration of a small model of the same kind, with the same attention implementation.

    Raises ValueError, or another error of the configuration's class, when its parts no longer fit together.
    """
    values = config.to_dict()
    text_name = next((name for name in ("text_config", "llm_config") if name in values), None)
    text: Values = values[text_name] if text_name else values
    old_width = int(text["hidden_size"])
    _shrink_width(text)
    for name, part in [("", values), *_parts(values)]:
        if name != text_name:
            _follow_text(part, old_width, int(text["hidden_size"]))
        _shrink_depth(part)
    model_type = values.pop("model_type")
    small = AutoConfig.for_model(model_type, **values)
    small._attn_implementation = config._attn_implementation
    return small


def _parts(values: Values) -> list[tuple[str, Values]]:
    return [(name, part) for name, part in values.items() if name.endswith("_config") and isinstance(part, dict)]


def _shrink_width(text: Values) -> None:
    """Reduce the number of heads, and the sizes that follow from it."""
    heads = int(text["num_attention_heads"])
    key_values = int(text.get("num_key_value_heads") or heads)
    head_size = int(text.get("head_dim") or text["hidden_size"] // heads)
    new_key_values = min(key_values, MAX_KEY_VALUE_HEADS)
    new_heads = new_key_values * min(heads // key_values, MAX_GROUP)
    width = new_heads * head_size
    text.update(hidden_size=width, num_attention_heads=new_heads)
    if text.get("num_key_value_heads"):
        text["num_key_value_heads"] = new_key_values
    for name in (
        "intermediate_size",
        "moe_intermediate_size",
        "intermediate_size_mlp",
        "shared_expert_intermediate_size",
    ):
        if name in text:
            size = text[name]
            text[name] = [2 * width] * len(size) if isinstance(size, list) else 2 * width
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if text.get(name):
            text[name] = min(int(text[name]), MAX_EXPERTS)
    if text.get("num_experts_per_tok"):
        text["num_experts_per_tok"] = min(int(text["num_experts_per_tok"]), MAX_EXPERTS // 2)


def _follow_text(part: Values, old_width: int, width: int) -> None:
    # A vision tower with an embed_dim of its own gives its output the width of hidden_size.
    names = [*WIDTHS_OF_TEXT, *(["hidden_size"] if "embed_dim" in part or _parts(part) else [])]
    for name in names:
        if part.get(name) == old_width:
            part[name] = width


def _shrink_depth(part: Values) -> None:
    name = next((name for name in LAYER_COUNTS if isinstance(part.get(name), int)), None)
    if name is None:
        return
    depth = part[name]
    numbers = {key: value for key, value in part.items() if isinstance(value, list) and _are_layers(value, depth)}
    per_layer = {
        key: value
        for key, value in part.items()
        if isinstance(value, list) and len(value) == depth and key not in numbers
    }
    kept = _layers_to_keep(depth, per_layer, numbers)
    part[name] = len(kept)
    part.update({key: [value[layer] for layer in kept] for key, value in per_layer.items()})
    part.update({key: [kept.index(layer) for layer in kept if layer in value] for key, value in numbers.items()})
    part.pop("per_layer_config", None)  # Gemma 4: follows from the kinds of layers
    if isinstance(part.get("num_kv_shared_layers"), int):
        part["num_kv_shared_layers"] = 0
    for other in ("max_window_layers", "num_global_layers"):
        if isinstance(part.get(other), int):
            part[other] = min(part[other], len(kept))


def _are_layers(value: list[Any], depth: int) -> bool:
    """True when a list holds numbers of layers."""
    return (
        bool(value)
        and all(type(entry) is int and 0 <= entry < depth for entry in value)
        and value == sorted(set(value))
    )


def _layers_to_keep(depth: int, per_layer: Mapping[str, list[Any]], numbers: Mapping[str, list[int]]) -> list[int]:
    """Numbers of the layers to keep: the first of each kind, and those in a short list; at least two."""
    named = {layer for value in numbers.values() if len(value) <= MAX_NAMED_LAYERS for layer in value}
    first: dict[Any, int] = {}
    for layer in range(depth):
        kind = [str(value[layer]) for value in per_layer.values()] + [str(layer in value) for value in numbers.values()]
        first.setdefault(tuple(kind), layer)
    kept = sorted(named | set(first.values()))
    return kept if len(kept) > 1 else sorted({*kept, *range(min(depth, 2))})
