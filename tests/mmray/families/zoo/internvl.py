"""InternVL: its own vision tower before a Qwen3."""

import functools
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from mmray.synthetic.processors import Recipe, write_recipe
from tests.mmray.families.zoo.base import Member, Turns
from tests.mmray.families.zoo.llava import VISION, text_config

TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<IMG_CONTEXT>\\n' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

MEDIA = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

RECIPE = Recipe(
    special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *MEDIA.values()),
    eos="<|im_end|>",
    pad="<|endoftext|>",
    chat_template=TEMPLATE,
    processor_class="InternVLProcessor",
    image_processor={
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": 56, "width": 56},
        "max_patches": 6,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
    processor={"image_seq_length": 4},
    tokenizer={"extra_special_tokens": MEDIA},
)


def config(folder: Path) -> PretrainedConfig:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": [56, 56], "patch_size": [14, 14],
    }  # fmt: skip
    return AutoConfig.for_model(
        "internvl",
        text_config=text_config(folder, model_type="qwen3", head_dim=16),
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )


MEMBERS = (
    Member(
        name="internvl",
        model_type="internvl",
        write_processor=functools.partial(write_recipe, recipe=RECIPE),
        config=config,
        vision=VISION,
        turns=Turns(ends=dict.fromkeys(("system", "user", "assistant"), "<|im_end|>")),
        tiling={"preset": "ocr_pages", "tile_size": (50, 70), "overview": (56, 56), "labels": True},
        scale=4.0,
        settings=(
            {"max_patches": 1},
            {"min_patches": 2, "max_patches": 4},
            {"size": {"height": 30, "width": 44}},
        ),
    ),
)
