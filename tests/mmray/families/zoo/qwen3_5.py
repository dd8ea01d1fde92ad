"""Qwen3.5 and its mixture of experts, without the kernels that would let it pack."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

from mmray.synthetic.processors import write_recipe
from tests.mmray.families.zoo.base import Member
from tests.mmray.families.zoo.qwen3_vl import CHATML, EXPERTS, SETTINGS, TEMPLATE, TEXT, VISION, config, recipe

# The published template writes thoughts into the last answer, if only empty ones; earlier answers go without.
THINKING = TEMPLATE.replace(
    "{%- if message['content'] is string -%}",
    "{%- if message['role'] == 'assistant' and loop.last -%}\n"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}\n"
    "{%- endif -%}\n"
    "{%- if message['content'] is string -%}",
)
assert THINKING != TEMPLATE

LINEAR = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": TEXT["rope_parameters"] | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
}
TEXTS = {
    "qwen3_5": TEXT | LINEAR,
    "qwen3_5_moe": TEXT | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 32},
}


def remember(model: Any) -> None:
    """Let states fade slowly, as those of a long context do: drawn at random they are gone after a token or two, which
    would hide what leaks from one sample to the next. It also keeps the sums of decays in a chunk exact."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.copy_(torch.linspace(0.02, 0.1, len(parameter)).log())


def write_processor(folder: Path) -> None:
    write_recipe(folder, recipe(THINKING))


MEMBERS = tuple(
    Member(
        name=name,
        by_sample=("vision",),
        model_type=name,
        write_processor=write_processor,
        config=functools.partial(config, name, text, VISION),
        vision=("visual",),
        turns=dataclasses.replace(CHATML, final_reply=lambda content: f"<think>\n\n</think>\n\n{content}"),
        tiling={"preset": "ocr_pages", "tile_size": (64, 64), "overview": (64, 64), "labels": True},
        pixel_names=("pixel_values", "image_grid_thw"),
        prepare_model=remember,
        scale=3.0,
        refuses="flash-linear-attention and causal-conv1d",
        settings=SETTINGS,
    )
    for name, text in TEXTS.items()
)
