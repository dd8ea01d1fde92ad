"""Qwen3-VL and its mixture of experts."""

import functools
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from mmray.synthetic.processors import Recipe, write_recipe
from tests.mmray.families.zoo.base import Member, Turns

ROLES = ("system", "user", "assistant")
CHATML = Turns(ends=dict.fromkeys(ROLES, "<|im_end|>"))
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<think>", "</think>",
)  # fmt: skip
IMAGE = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 4 * 32 * 32, "longest_edge": 64 * 32 * 32},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
SETTINGS = (
    {"size": {"shortest_edge": 3136, "longest_edge": 5_000}},
    {"size": {"shortest_edge": 40_000, "longest_edge": 75_264}},
    {"patch_size": 8, "merge_size": 3},
)
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def recipe(chat_template: str) -> Recipe:
    return Recipe(
        special_tokens=SPECIAL,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        chat_template=chat_template,
        processor_class="Qwen3VLProcessor",
        image_processor=IMAGE,
    )


TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 32768,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
    },
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION = {
    "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64, "patch_size": 16,
    "num_position_embeddings": 64,
}  # fmt: skip


def config(model_type: str, text: dict[str, Any], vision: dict[str, Any], folder: Path) -> PretrainedConfig:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image": "<|image_pad|>",
            "video": "<|video_pad|>",
            "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
        }.items()
    }
    own = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return AutoConfig.for_model(model_type, text_config=text | own, vision_config=vision, **ids)


def write_processor(folder: Path) -> None:
    write_recipe(folder, recipe(TEMPLATE))


MEMBERS = tuple(
    Member(
        name=name,
        by_sample=("text", "vision"),
        model_type=name,
        write_processor=write_processor,
        config=functools.partial(config, name, text, VISION | {"deepstack_visual_indexes": [0, 1]}),
        vision=("visual",),
        turns=CHATML,
        tiling={"preset": "ocr_pages", "tile_size": (64, 64), "overview": (64, 64), "labels": True},
        pixel_names=("pixel_values", "image_grid_thw"),
        settings=SETTINGS,
    )
    for name, text in {"qwen3_vl": TEXT, "qwen3_vl_moe": TEXT | EXPERTS}.items()
)
