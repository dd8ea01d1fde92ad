"""LFM2-VL."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from mmray.synthetic.processors import Recipe, write_recipe
from tests.mmray.families.zoo.base import Member, Turns, begin_with

TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<image>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
"""

RECIPE = Recipe(
    special_tokens=(
        "<|pad|>", "<|startoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<|image_start|>", "<|image_end|>",
        "<|img_thumbnail|>", *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 7) for column in range(1, 7)),
    ),
    bos="<|startoftext|>",
    eos="<|im_end|>",
    pad="<|pad|>",
    chat_template=TEMPLATE,
    processor_class="Lfm2VlProcessor",
    image_processor={
        "image_processor_type": "Lfm2VlImageProcessor",
        "encoder_patch_size": 8,
        "downsample_factor": 2,
        "tile_size": 32,
        "max_tiles": 6,
        "min_image_tokens": 4,
        "max_image_tokens": 16,
    },
)  # fmt: skip


def write_processor(folder: Path) -> None:
    write_recipe(folder, RECIPE)
    begin_with(folder, "<|startoftext|>")


def config(folder: Path) -> PretrainedConfig:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = {
        "model_type": "lfm2", "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention", "conv"], "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "model_type": "siglip2_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_patches": 16, "patch_size": 8, "vision_use_head": False,
    }  # fmt: skip
    return AutoConfig.for_model(
        "lfm2_vl", text_config=text, vision_config=vision, projector_hidden_size=64, tie_word_embeddings=False,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip


def without_masks(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "attention_mask"} | {"use_cache": True}


def prepare_model(model: Any) -> None:
    """Convolutions multiply three projections: larger weights would magnify rounding, so logits are made large by the
    last layer alone. The embedding of the padding token begins at zero: convolutions would need no mask."""
    embeddings = model.get_input_embeddings()
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
        embeddings.weight[embeddings.padding_idx] = embeddings.weight[0]


MEMBERS = (
    Member(
        name="lfm2_vl",
        model_type="lfm2_vl",
        write_processor=write_processor,
        config=config,
        vision=("vision_tower", "multi_modal_projector"),
        turns=Turns(ends=dict.fromkeys(("system", "user", "assistant"), "<|im_end|>")),
        tiling={"preset": "ocr_pages", "tile_size": (64, 48), "overview": (48, 64), "labels": True},
        pixel_names=("pixel_values", "pixel_attention_mask", "spatial_shapes"),
        naive=without_masks,
        scale=2.0,
        prepare_model=prepare_model,
        needs=("torchvision",),
        settings=(
            {"do_image_splitting": False},
            {"use_thumbnail": False, "max_tiles": 4},
            {"tile_size": 64, "max_pixels_tolerance": 1.0, "min_image_tokens": 8},
        ),
    ),
)
