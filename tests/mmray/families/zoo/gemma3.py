"""Gemma 3, with images longer than its sliding window and samples much longer."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from mmray.synthetic.documents import sample_texts
from mmray.synthetic.processors import Recipe, write_recipe
from tests.mmray.families.zoo.base import Inputs, Member, Turns, begin_with

# As published: the system message at the head of the first user turn, contents trimmed, the assistant named model.
TEMPLATE = """\
{{- bos_token -}}
{%- set opening = '' -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] -%}
{%- set opening = (system if system is string else system[0]['text']) + '\\n\\n' -%}
{%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
{%- set name = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{- '<start_of_turn>' + name + '\\n' + (opening if loop.first else '') -}}
{%- if message['content'] is string -%}
{{- message['content'] | trim -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- 'IMAGE' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] | trim -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""
TURNS = Turns(ends=dict.fromkeys(("user", "assistant"), "<end_of_turn>"))
TEXT_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
# The feature's token comes last, so that its id is the largest (`naive`).
IMAGE_TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}

RECIPE = Recipe(
    special_tokens=(*TEXT_TOKENS, *IMAGE_TOKENS.values()),
    bos="<bos>",
    eos="<eos>",
    pad="<pad>",
    chat_template=TEMPLATE.replace("IMAGE", "<start_of_image>"),
    processor_class="Gemma3Processor",
    image_processor={
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 64, "width": 64},
        "resample": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pan_and_scan": False,
        "pan_and_scan_min_crop_size": 16,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    },
    processor={"image_seq_length": 16},
    tokenizer={"extra_special_tokens": IMAGE_TOKENS},
)


def write_processor(folder: Path, recipe: Recipe = RECIPE) -> None:
    """As in Gemma's vocabulary, up to four line breaks are one token: those around an image melt into the text's."""
    write_recipe(folder, recipe, [*sample_texts(), *["\n\n", "\n\n\n", "\n\n\n\n"] * 200])
    begin_with(folder, "<bos>")


def text_config(tokenizer: Any) -> dict[str, Any]:
    """One layer of each kind; a window of 12 tokens."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "max_position_embeddings": 32768,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 12,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def vision_config(image_size: int, patch_size: int) -> dict[str, Any]:
    """SigLIP, which Gemma 3 and PaliGemma see with."""
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch_size,
        "vision_use_head": False,
    }


def config(folder: Path) -> PretrainedConfig:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoConfig.for_model(
        "gemma3",
        text_config=text_config(tokenizer),
        vision_config=vision_config(64, 8),
        mm_tokens_per_image=16,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )


def project(model: Any) -> None:
    """The projection of image features starts at zero: nothing of an image would reach the text."""
    weight = model.model.multi_modal_projector.mm_input_projection_weight
    weight.normal_(std=0.1, generator=torch.Generator().manual_seed(7))


def naive(inputs: Inputs) -> Inputs:
    """What a user would pass who trusts the positions: the types of tokens, and no mask."""
    types = (inputs["input_ids"] == inputs["input_ids"].max()).long()
    return {name: value for name, value in inputs.items() if name != "attention_mask"} | {"token_type_ids": types}


MEMBERS = (
    Member(
        name="gemma3",
        by_sample=(),
        model_type="gemma3",
        write_processor=write_processor,
        config=config,
        vision=("vision_tower", "multi_modal_projector"),
        turns=TURNS,
        tiling={"preset": "ocr_pages", "tile_size": (64, 64), "overview": (64, 64), "labels": True},
        naive=naive,
        prepare_model=project,
        scale=2.5,
        settings=({"size": {"height": 48, "width": 80}}, {"do_pan_and_scan": True, "do_normalize": False}),
    ),
)
