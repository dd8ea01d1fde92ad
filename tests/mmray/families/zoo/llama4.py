"""Llama 4."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from mmray.synthetic.processors import Recipe, write_recipe
from tests.mmray.families.zoo.base import Member, Turns, begin_with

TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<|image|>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|eot|>' -}}
{%- endfor -%}
"""

RECIPE = Recipe(
    special_tokens=(
        "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad|>", "<|header_start|>", "<|header_end|>",
        "<|eot|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>",
        "<|patch|>",
    ),
    bos="<|begin_of_text|>",
    eos="<|eot|>",
    pad="<|finetune_right_pad|>",
    chat_template=TEMPLATE,
    processor_class="Llama4Processor",
    image_processor={
        "image_processor_type": "Llama4ImageProcessor",
        "size": {"height": 56, "width": 56},
        "max_patches": 4,
    },
    processor={"patch_size": 14, "pixel_shuffle_ratio": 0.5},
)  # fmt: skip


def write_processor(folder: Path) -> None:
    write_recipe(folder, RECIPE)
    begin_with(folder, "<|begin_of_text|>")


def config(folder: Path) -> PretrainedConfig:
    """Four layers: the last one is without rotary positions."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_local_experts": 2, "interleave_moe_layer_step": 2, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 56, "patch_size": 14, "vision_output_dim": 64, "projector_input_dim": 64,
        "projector_output_dim": 64,
    }  # fmt: skip
    ids = {
        f"{name}_token_index": tokenizer.convert_tokens_to_ids(token)
        for name, token in {"boi": "<|image_start|>", "eoi": "<|image_end|>", "image": "<|patch|>"}.items()
    }
    return AutoConfig.for_model("llama4", text_config=text, vision_config=vision, **ids)


def alone(inputs: dict[str, Any]) -> dict[str, Any]:
    """The processor's pixels are bfloat16, and a model takes its own dtype."""
    return inputs | {name: value.float() for name, value in inputs.items() if value.dtype == torch.bfloat16}


MEMBERS = (
    Member(
        name="llama4",
        by_sample=(),
        model_type="llama4",
        write_processor=write_processor,
        config=config,
        vision=("vision_model", "multi_modal_projector"),
        turns=Turns(ends=dict.fromkeys(("system", "user", "assistant"), "<|eot|>")),
        tiling={"preset": "ocr_pages", "tile_size": (56, 56), "overview": (56, 56), "labels": True},
        alone=alone,
        needs=("torchvision",),
        settings=({"max_patches": 6}, {"resize_to_max_canvas": True}, {"size": {"height": 28, "width": 28}}),
    ),
)
