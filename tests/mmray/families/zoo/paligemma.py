"""PaliGemma, and PaliGemma 2 with a sliding window that is longer than its packed samples, and a shorter one."""

import functools
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from mmray.families import load_processor
from mmray.synthetic.processors import Recipe, write_recipe
from tests.mmray.families.zoo.base import Inputs, Member
from tests.mmray.families.zoo.gemma3 import vision_config

RECIPE = Recipe(
    special_tokens=("<pad>", "<eos>", "<bos>", "<image>"),
    bos="<bos>",
    eos="<eos>",
    pad="<pad>",
    chat_template=None,
    processor_class="PaliGemmaProcessor",
    image_processor={
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": 16,
        "size": {"height": 32, "width": 32},
        "resample": 3,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    tokenizer={"extra_special_tokens": {"image_token": "<image>"}},
)


def config(folder: Path, text_type: str = "gemma", **text: Any) -> PretrainedConfig:
    tokenizer = load_processor(folder).tokenizer  # with the 1,152 tokens that the processor adds
    small = {
        "model_type": text_type,
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 32768,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return AutoConfig.for_model(
        "paligemma",
        text_config=small | text,
        vision_config=vision_config(32, 8) | {"projection_dim": 64},
        projection_dim=64,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )


def paligemma2(window: int) -> Any:
    return functools.partial(
        config,
        text_type="gemma2",
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=window,
    )


def alone(inputs: Inputs) -> Inputs:
    """The types of tokens say what the prompt is; labels would only make the model compute a loss of its own."""
    return {name: value for name, value in inputs.items() if name != "labels"}


def naive(inputs: Inputs) -> Inputs:
    """Positions, and the types of tokens: a prompt's see each other, whatever their sample."""
    types = (inputs["attention_mask"][:, 0, 0] != inputs["attention_mask"][:, 0, -1]).long()
    return {name: value for name, value in inputs.items() if name != "attention_mask"} | {"token_type_ids": types}


def member(name: str, make_config: Any, **fields: Any) -> Member:
    return Member(
        name=name,
        by_sample=(),
        model_type="paligemma",
        write_processor=functools.partial(write_recipe, recipe=RECIPE),
        config=make_config,
        vision=("vision_tower", "multi_modal_projector"),
        turns=None,
        tiling={"preset": "ocr_pages", "tile_size": (32, 32), "overview": (32, 32), "labels": True},
        alone=alone,
        settings=({"size": {"height": 48, "width": 40}, "do_normalize": False},),
        scale=2.0,
        **fields,
    )


MEMBERS = (
    member("paligemma", config, naive=naive),
    member("paligemma2", paligemma2(512), naive=naive, attentions=("eager",)),
    member(
        "paligemma2, long samples",
        paligemma2(12),
        refuses="sliding window of its layers, 12 tokens",
        attentions=("eager",),
    ),
)
