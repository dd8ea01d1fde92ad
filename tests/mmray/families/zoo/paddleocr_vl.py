"""PaddleOCR-VL."""

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from mmray.synthetic.processors import Recipe, write_recipe
from tests.mmray.families.zoo.base import Member, Turns

# Images come before the text of a user's turn. The published template reads lists of parts alone, and writes the
# beginning of an answer where it is not told whether to.
TEMPLATE = """\
{%- set add_generation_prompt = add_generation_prompt if add_generation_prompt is defined else true -%}
{{- '<|begin_of_sentence|>' -}}
{%- for message in messages -%}
{%- set text = message['content'] if message['content'] is string else none -%}
{%- set parts = message['content'] if text is none else [{'type': 'text', 'text': text}] -%}
{%- if message['role'] != 'system' -%}
{{- message['role'] | capitalize + ': ' -}}
{%- endif -%}
{%- for part in parts if part['type'] == 'image' -%}
{{- '<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' -}}
{%- endfor -%}
{%- for part in parts if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endfor -%}
{{- eos_token if message['role'] == 'assistant' else '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant: ' -}}
{%- endif -%}
"""

RECIPE = Recipe(
    special_tokens=(
        "<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_END|>",
        "<|video_pad|>",
    ),
    bos="<s>",
    eos="</s>",
    pad="<unk>",
    unk="<unk>",
    chat_template=TEMPLATE,
    processor_class="PaddleOCRVLProcessor",
    image_processor={
        "image_processor_type": "PaddleOCRVLImageProcessor",
        "size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28},
        "patch_size": 14,
        "temporal_patch_size": 1,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    tokenizer={"image_token": "<|IMAGE_PLACEHOLDER|>"},
)  # fmt: skip


def write_processor(folder: Path) -> None:
    write_recipe(folder, RECIPE)


def config(folder: Path) -> PretrainedConfig:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = {
        "image": "<|IMAGE_PLACEHOLDER|>", "video": "<|video_pad|>", "vision_start": "<|IMAGE_START|>",
        "vision_end": "<|IMAGE_END|>",
    }  # fmt: skip
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 112,
        "patch_size": 14,
    }  # fmt: skip
    return AutoConfig.for_model("paddleocr_vl", text_config=text, vision_config=vision, **ids)


MEMBERS = (
    Member(
        name="paddleocr_vl",
        by_sample=("text", "vision"),
        model_type="paddleocr_vl",
        write_processor=write_processor,
        config=config,
        vision=("visual", "projector"),
        turns=Turns(ends={"system": "", "user": "", "assistant": "</s>"}, reply=lambda content: f" {content}"),
        tiling={"preset": "ocr_pages", "tile_size": (56, 56), "overview": (56, 56), "labels": True},
        pixel_names=("pixel_values", "image_grid_thw"),
        settings=(
            {"size": {"shortest_edge": 3136, "longest_edge": 5_000}},
            {"size": {"shortest_edge": 40_000, "longest_edge": 75_264}},
            {"patch_size": 8, "merge_size": 3},
            {"temporal_patch_size": 2},
        ),
    ),
)
