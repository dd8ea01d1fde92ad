"""LLaVA-OneVision: a SigLIP before a Qwen2."""

import functools
from itertools import product
from pathlib import Path

from transformers import PretrainedConfig

from mmray.synthetic.processors import Recipe, write_recipe
from tests.mmray.families.zoo.base import Member, Turns
from tests.mmray.families.zoo.llava import CLIP, VISION, small_config, unscale_vision

PINPOINTS = [[56 * rows, 56 * columns] for rows, columns in product(range(1, 4), repeat=2)]

TEMPLATE = """\
{%- for message in messages -%}
{%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string \
else message['content'] -%}
{{- '<|im_start|>' + message['role'] + ' ' -}}
{%- for part in parts if part['type'] == 'image' -%}
{{- '<image>' -}}
{%- endfor -%}
{%- for part in parts if part['type'] == 'text' -%}
{{- '\\n' + part['text'] -}}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

RECIPE = Recipe(
    special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
    eos="<|im_end|>",
    pad="<|endoftext|>",
    chat_template=TEMPLATE,
    processor_class="LlavaOnevisionProcessor",
    image_processor={
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": 56, "width": 56},
        "image_grid_pinpoints": PINPOINTS,
        **CLIP,
    },
    processor={
        "image_token": "<image>",
        "video_token": "<video>",
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_2",
    },
)


def config(folder: Path) -> PretrainedConfig:
    return small_config(
        "llava_onevision",
        folder,
        text={"model_type": "qwen2"},
        vision={"model_type": "siglip_vision_model", "vision_use_head": False},
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    )


MEMBERS = (
    Member(
        name="llava_onevision",
        model_type="llava_onevision",
        write_processor=functools.partial(write_recipe, recipe=RECIPE),
        config=config,
        vision=(*VISION, "image_newline"),
        unused=("post_layernorm",),
        prepare_model=functools.partial(unscale_vision, scale=3.0),
        turns=Turns(ends=dict.fromkeys(("system", "user", "assistant"), "<|im_end|>")),
        tiling={"preset": "ocr_pages", "tile_size": (50, 70), "overview": (56, 56), "labels": True},
        pixel_names=("pixel_values", "image_sizes", "batch_num_images"),
        scale=3.0,
        settings=(
            {"image_grid_pinpoints": [[112, 56], [168, 224]]},
            {"size": {"height": 42, "width": 42}},
        ),
    ),
)
