"""Llama 3.2 Vision."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from mmray.synthetic.processors import Recipe, write_recipe
from tests.mmray.families.zoo.base import Member, Turns

TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{%- if message['role'] == 'system' -%}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' -}}
{%- endif -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<|image|>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- endfor -%}
"""

# The tokenizer adds no beginning of text, the processor does. The image token lies beyond the text model's vocabulary:
# it is read, never written.
RECIPE = Recipe(
    special_tokens=(
        "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|eot_id|>", "<|python_tag|>", "<|image|>",
    ),
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    pad="<|finetune_right_pad_id|>",
    chat_template=TEMPLATE,
    processor_class="MllamaProcessor",
    image_processor={
        "image_processor_type": "MllamaImageProcessor",
        "size": {"height": 56, "width": 56},
        "max_image_tiles": 4,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
)  # fmt: skip


def write_processor(folder: Path) -> None:
    write_recipe(folder, RECIPE)


def config(folder: Path) -> PretrainedConfig:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = {
        "vocab_size": len(tokenizer) - 1, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1],
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "image_size": 56, "patch_size": 14, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_global_layers": 1, "attention_heads": 2, "intermediate_layers_indices": [0, 1], "vision_output_dim": 96,
    }  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("<|image|>")
    return AutoConfig.for_model("mllama", text_config=text, vision_config=vision, image_token_id=image_token)


def open_gates(model: Any) -> None:
    """Gates begin at zero: the model would be blind."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(0.5)


MEMBERS = (
    Member(
        name="mllama",
        by_sample=(),
        model_type="mllama",
        write_processor=write_processor,
        config=config,
        vision=("vision_model", "multi_modal_projector"),
        turns=Turns(ends=dict.fromkeys(("system", "user", "assistant"), "<|eot_id|>")),
        tiling={"preset": "ocr_pages", "tile_size": (112, 56), "overview": (56, 112), "labels": True},
        pixel_names=("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"),
        refuses="cross-attention",
        prepare_model=open_gates,
        settings=({"size": {"height": 28, "width": 28}}, {"max_image_tiles": 6}, {"resample": 3}),
    ),
)
