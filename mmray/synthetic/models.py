"""Configs of small models of the real classes, fitted to a processor folder.

Everything that must agree with the processor is read from its folder: the vocabulary, the special ids, the
patch grid or the tile's size and its number of visual tokens. Everything else is small. So a small config
works with a folder of `write_processor` as well as with a published model's processor (then the vocabulary is
the largest part of the model). Weights come from `AutoModelForImageTextToText.from_config(config)`, after
`torch.manual_seed`.
"""

import json
from math import isqrt
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}

Settings = dict[str, Any]


def small_config(model_type: str, processor_folder: str | Path, **overrides: Any) -> PretrainedConfig:
    """The config of a model of 2 text and 2 vision layers, 64 wide, that takes this processor's outputs.

    model_type: "qwen2_vl", "qwen2_5_vl", "idefics3" or "smolvlm"; must be the processor's family.
    overrides: fields of the config; `text_config={...}` and `vision_config={...}` change single fields of
        those parts, and what follows from them (M-RoPE sections, the width of the vision's output) fits.

    Raises ValueError for another model type, and for a tile whose visual tokens form no square.
    """
    if model_type not in _PARTS:
        raise ValueError(f"model_type must be one of {', '.join(_PARTS)}, got {model_type!r}")
    folder = Path(processor_folder)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    text = (
        _TEXT
        | {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        | overrides.pop("text_config", {})
    )
    parts = _PARTS[model_type](folder, tokenizer, text, overrides.pop("vision_config", {}))
    return AutoConfig.for_model(model_type, **parts | overrides)


def _qwen(folder: Path, tokenizer: PreTrainedTokenizerBase, text: Settings, vision: Settings) -> Settings:
    """The parts that Qwen2-VL and Qwen2.5-VL share; `vision` lacks only the image processor's grid."""
    images = _read_json(folder / "preprocessor_config.json")
    grid = {
        "patch_size": images["patch_size"],
        "temporal_patch_size": images["temporal_patch_size"],
        "spatial_merge_size": images["merge_size"],
    }
    rotary_pairs = text["hidden_size"] // text["num_attention_heads"] // 2
    side = rotary_pairs * 3 // 8  # of 64 pairs: 16, 24, 24, as in published models
    sections = [rotary_pairs - 2 * side, side, side]
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": sections}
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image": "<|image_pad|>",
            "video": "<|video_pad|>",
            "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
        }.items()
    }
    return {"text_config": {"rope_parameters": rope} | text, "vision_config": grid | vision, **ids}


def _qwen2_vl(folder: Path, tokenizer: PreTrainedTokenizerBase, text: Settings, vision: Settings) -> Settings:
    small = {"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 2, "hidden_size": text["hidden_size"]}
    return _qwen(folder, tokenizer, text, small | vision)


def _qwen2_5_vl(folder: Path, tokenizer: PreTrainedTokenizerBase, text: Settings, vision: Settings) -> Settings:
    """The config of a Qwen2.5-VL with one vision layer of windows and one of full attention, so that both kinds run."""
    small = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [1],
    }
    return _qwen(folder, tokenizer, text, small | vision)


def _tiled(folder: Path, tokenizer: PreTrainedTokenizerBase, text: Settings, vision: Settings) -> Settings:
    """The config of an Idefics3 or SmolVLM: a tile of S pixels gives (S / patch_size / scale_factor) ** 2 visual
    tokens."""
    image_size = _read_json(folder / "preprocessor_config.json")["max_image_size"]["longest_edge"]
    visual_tokens = _read_json(folder / "processor_config.json")["image_seq_len"]
    scale_factor, side = 2, isqrt(visual_tokens)
    if side * side != visual_tokens or image_size % (side * scale_factor):
        raise ValueError(
            f"{folder}: a tile of {image_size} pixels cannot give {visual_tokens} visual tokens; "
            f"image_seq_len must be a square number whose root, times {scale_factor}, divides the tile"
        )
    small = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": image_size // (side * scale_factor),
    }
    return {
        "text_config": {"model_type": "llama"} | text,
        "vision_config": small | vision,
        "scale_factor": scale_factor,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "pad_token_id": text["pad_token_id"],
    }


_PARTS = {"qwen2_vl": _qwen2_vl, "qwen2_5_vl": _qwen2_5_vl, "idefics3": _tiled, "smolvlm": _tiled}


def _read_json(path: Path) -> Settings:
    settings: Settings = json.loads(path.read_text(encoding="utf-8"))
    return settings
