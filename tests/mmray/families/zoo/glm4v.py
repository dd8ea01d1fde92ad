"""GLM-4.1V, GLM-4.5V, GLM-4.6V and GLM-OCR."""

import functools
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from mmray.synthetic.processors import Recipe, write_recipe
from tests.mmray.families.zoo.base import Member, Turns

SPECIAL = (
    "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<think>", "</think>",
    "<|image|>", "<|video|>",
)  # fmt: skip

# A turn is a header, a line break and the text; the later models write the assistant's thoughts first.
TEMPLATE = """\
[gMASK]<sop>
{%- for message in messages -%}
{{- '<|' + ('observation' if message['role'] == 'tool' else message['role']) + '|>\\n' -}}
{%- if message['role'] == 'assistant' -%}
THOUGHTS
{%- endif -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<|begin_of_image|><|image|><|end_of_image|>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>\\n' -}}
{%- endif -%}
"""
NO_THOUGHTS = "<think></think>\n"


def recipe(name: str, thinks: bool) -> Recipe:
    """name: as in the names of the classes."""
    return Recipe(
        special_tokens=SPECIAL,
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        chat_template=TEMPLATE.replace("THOUGHTS\n", "{{- '<think></think>\\n' -}}\n" if thinks else ""),
        processor_class=f"{name}Processor",
        image_processor={
            "image_processor_type": f"{name}ImageProcessor",
            "size": {"shortest_edge": 2 * 4 * 28 * 28, "longest_edge": 2 * 64 * 28 * 28},
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )


TEXT = {
    "model_type": "glm4v_text", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
    },
}  # fmt: skip
EXPERTS = TEXT | {
    "model_type": "glm4v_moe_text", "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "head_dim": 16,
}  # fmt: skip
OCR = TEXT | {"model_type": "glm_ocr_text", "head_dim": 16}
VISION = {
    "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64, "patch_size": 14,
    "image_size": 112,
}  # fmt: skip


def config(model_type: str, text: dict[str, Any], folder: Path) -> PretrainedConfig:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = {
        "image": "<|image|>", "video": "<|video|>", "image_start": "<|begin_of_image|>",
        "image_end": "<|end_of_image|>", "video_start": "<|begin_of_video|>", "video_end": "<|end_of_video|>",
    }  # fmt: skip
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    text = text | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    vision = VISION | {"model_type": "glm4v_vision" if model_type == "glm46v" else f"{model_type}_vision"}
    return AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **ids)


def write_processor(name: str, thinks: bool, folder: Path) -> None:
    write_recipe(folder, recipe(name, thinks))


def member(name: str, processor: str, text: dict[str, Any], *, thinks: bool) -> Member:
    return Member(
        name=name,
        by_sample=("text", "vision"),
        model_type=name,
        write_processor=functools.partial(write_processor, processor, thinks),
        config=functools.partial(config, name, text),
        vision=("visual",),
        turns=Turns(
            ends=dict.fromkeys(("system", "user", "assistant"), ""),
            reply=(lambda content: NO_THOUGHTS + content) if thinks else (lambda content: content),
            stop="<|user|>",
        ),
        tiling={"preset": "ocr_pages", "tile_size": (56, 56), "overview": (56, 56), "labels": True},
        pixel_names=("pixel_values", "image_grid_thw"),
        settings=(
            {"size": {"shortest_edge": 3136, "longest_edge": 15_000}},
            {"size": {"shortest_edge": 90_000, "longest_edge": 160_000}},
            {"patch_size": 8, "merge_size": 3},
            {"temporal_patch_size": 1},
        ),
    )


MEMBERS = (
    member("glm4v", "Glm4v", TEXT, thinks=False),
    member("glm4v_moe", "Glm4v", EXPERTS, thinks=True),
    member("glm46v", "Glm46V", TEXT, thinks=True),
    member("glm_ocr", "Glm46V", OCR, thinks=True),
)
