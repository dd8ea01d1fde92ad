"""Gemma 3n with its own kind of vision tower, MobileNetV5 in three blocks, and shared keys."""

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from mmray.synthetic.processors import Recipe
from tests.mmray.families.zoo.base import Inputs, Member
from tests.mmray.families.zoo.gemma3 import TEMPLATE, TEXT_TOKENS, TURNS, text_config, write_processor

# The order of the vocabulary is the model's: text, from the end of images on tokens of images, then those of audio.
MEDIA_TOKENS = {
    "boi_token": "<start_of_image>",
    "boa_token": "<start_of_audio>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
    "eoa_token": "<end_of_audio>",
    "audio_token": "<audio_soft_token>",
}

RECIPE = Recipe(
    special_tokens=(*TEXT_TOKENS, *MEDIA_TOKENS.values()),
    bos="<bos>",
    eos="<eos>",
    pad="<pad>",
    chat_template=TEMPLATE.replace("IMAGE", "<image_soft_token>"),
    processor_class="Gemma3nProcessor",
    image_processor={
        "image_processor_type": "SiglipImageProcessor",
        "feature_extractor_type": "Gemma3nAudioFeatureExtractor",
        "size": {"height": 64, "width": 64},
        "resample": 2,
        "do_normalize": False,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    processor={"image_seq_length": 16},
    tokenizer={"extra_special_tokens": MEDIA_TOKENS},
)


def config(folder: Path) -> PretrainedConfig:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = {kind: tokenizer.convert_tokens_to_ids(MEDIA_TOKENS[f"eo{kind[0]}_token"]) for kind in ("image", "audio")}
    text = {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": first["image"],
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    }
    return AutoConfig.for_model(
        "gemma3n",
        text_config=text_config(tokenizer) | text,
        vision_config={
            "label_names": [],
            "model_args": {"block_args": _blocks(), "stem_size": 16, "msfa_output_resolution": 4},
            "vocab_size": first["audio"] - first["image"],
            "vocab_offset": first["image"],
        },
        audio_config={
            "hidden_size": 32,
            "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 2,
            "vocab_size": len(tokenizer) - first["audio"],
            "vocab_offset": first["audio"],
        },
        vision_soft_tokens_per_image=16,
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in MEDIA_TOKENS.items()},
    )


def _blocks() -> list[Any]:
    """One block of each kind that the published tower has, the last with attention."""
    from timm.models._efficientnet_builder import decode_arch_def

    stages = [
        ["er_r1_k3_s2_e4_c16"],
        ["uir_r1_a3_k3_s2_e2_c24"],
        ["uir_r1_a3_k0_s2_e2_c24", "mqa_r1_k3_h2_s1_d8_c24", "uir_r1_a0_k0_s1_e1_c24"],
    ]
    return decode_arch_def(stages)


def fill(model: Any) -> None:
    """transformers leaves the norms of timm and the scales of its branches as the memory was."""
    for name, parameter in model.model.vision_tower.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def with_mask(inputs: Inputs) -> Inputs:
    """The processor's default: with a mask of ones transformers does not look for samples."""
    return inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}


MEMBERS = (
    Member(
        name="gemma3n",
        model_type="gemma3n",
        write_processor=functools.partial(write_processor, recipe=RECIPE),
        config=config,
        vision=("vision_tower",),  # what joins it to the text model runs for text, too
        turns=TURNS,
        tiling={"preset": "ocr_pages", "tile_size": (64, 64), "overview": (64, 64), "labels": True},
        naive=with_mask,
        prepare_model=fill,
        unused=("audio_tower", "embed_audio.soft_embedding_norm"),
        model_needs=("timm",),
        settings=({"size": {"height": 48, "width": 80}, "do_normalize": True},),
    ),
)
