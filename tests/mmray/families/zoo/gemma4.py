"""Gemma 4: a causal one with what its smallest sizes have, and a mixture of experts that sees images whole."""

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from mmray.synthetic.processors import Recipe
from tests.mmray.families.zoo.base import Inputs, Member, Turns
from tests.mmray.families.zoo.gemma3 import write_processor

# As published: contents trimmed, the assistant named model.
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- set name = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{- '<|turn>' + name + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] | trim -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<|image|>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] | trim -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|turn>model\\n' -}}
{%- endif -%}
"""
MEDIA_TOKENS = {
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "boa_token": "<|audio>",
    "audio_token": "<|audio|>",
    "eoa_token": "<audio|>",
    "image_token": "<|image|>",
}
POOLING = 2

RECIPE = Recipe(
    special_tokens=("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|video|>", *MEDIA_TOKENS.values()),
    bos="<bos>",
    eos="<eos>",
    pad="<pad>",
    chat_template=TEMPLATE,
    processor_class="Gemma4Processor",
    image_processor={
        "image_processor_type": "Gemma4ImageProcessor",
        "feature_extractor_type": "Gemma4AudioFeatureExtractor",
        "patch_size": 4,
        "pooling_kernel_size": POOLING,
        "max_soft_tokens": 70,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "do_normalize": False,
    },
    processor={"image_seq_length": 70},
    tokenizer={"extra_special_tokens": MEDIA_TOKENS},
)


def config(folder: Path, **text: Any) -> PretrainedConfig:
    """Sliding layers see 16 tokens, less than an image has."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    small = {
        "vocab_size": len(tokenizer),
        "vocab_size_per_layer_input": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 16,
        "max_position_embeddings": 32768,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in MEDIA_TOKENS.items()}
    return AutoConfig.for_model(
        "gemma4",
        text_config=small | text,
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "patch_size": 4,
            "pooling_kernel_size": POOLING,
            "position_embedding_size": 512,
        },
        audio_config=None,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        eoa_token_index=tokenizer.convert_tokens_to_ids("<audio|>"),
        **ids,
    )


def naive(inputs: Inputs) -> Inputs:
    """What a user would pass who trusts the positions: the types of tokens, and no mask. The image's token is the last
    of the vocabulary."""
    types = (inputs["input_ids"] == inputs["input_ids"].max()).long()
    return {name: value for name, value in inputs.items() if name != "attention_mask"} | {"mm_token_type_ids": types}


def soften(model: Any) -> None:
    """The table of patch positions starts with ones throughout: patches would hardly differ, nor would their places.
    Scores of attention start so large that rounding grows a hundredfold in the gradients; smaller, it does not."""
    table = model.model.vision_tower.patch_embedder.position_embedding_table
    table.normal_(std=0.5, generator=torch.Generator().manual_seed(7))
    for name, parameter in model.named_parameters():
        if name.endswith("q_norm.weight"):
            parameter.mul_(0.25)


def with_mask(inputs: Inputs) -> Inputs:
    """The processor's default: with a mask of ones transformers does not look for samples."""
    return inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}


def member(name: str, text: dict[str, Any], **fields: Any) -> Member:
    return Member(
        name=name,
        model_type="gemma4",
        write_processor=functools.partial(write_processor, recipe=RECIPE),
        config=functools.partial(config, **text),
        vision=("vision_tower", "embed_vision"),
        turns=Turns(ends=dict.fromkeys(("system", "user", "assistant"), "<turn|>")),
        tiling={"preset": "ocr_pages", "tile_size": (32, 24), "overview": (24, 40), "labels": True},
        pixel_names=("pixel_values", "image_position_ids"),
        prepare_model=soften,
        settings=(
            {"max_soft_tokens": 140, "patch_size": 5},
            {"pooling_kernel_size": 3, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3},
        ),
        **fields,
    )


MEMBERS = (
    member(
        "gemma4",
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "num_kv_shared_layers": 1,
            "hidden_size_per_layer_input": 8,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 30.0,
        },
        naive=with_mask,
        scale=2.0,
    ),
    member(
        "gemma4, images seen whole",
        {
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision",
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        naive=naive,
        by_sample=(),
        scale=2.0,
    ),
)
