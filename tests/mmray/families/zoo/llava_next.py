"""LLaVA-NeXT on a Mistral with a sliding window, and Granite Vision: a SigLIP, several of whose layers are taken, and
turns of which only the assistant's have an end."""

import functools
from pathlib import Path

from transformers import PretrainedConfig

from mmray.synthetic.processors import Recipe, write_recipe
from tests.mmray.families.zoo.base import Member, Turns
from tests.mmray.families.zoo.llava import CLIP, VISION, small_config, unscale_vision, write_llama_recipe

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]

MISTRAL_TEMPLATE = """\
{%- for message in messages -%}
{%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string \
else message['content'] -%}
{%- if message['role'] == 'system' -%}
{{- '<<SYS>>\\n' + parts[0]['text'] + '\\n<</SYS>>\\n\\n' -}}
{%- elif message['role'] == 'user' -%}
{{- '[INST] ' -}}
{%- for part in parts if part['type'] == 'image' -%}
{{- '<image>\\n' -}}
{%- endfor -%}
{%- for part in parts if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endfor -%}
{{- ' [/INST]' -}}
{%- else -%}
{{- ' ' + parts[0]['text'] + '</s> ' -}}
{%- endif -%}
{%- endfor -%}
"""

GRANITE_TEMPLATE = """\
{%- for message in messages -%}
{%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string \
else message['content'] -%}
{{- '<|' + message['role'] + '|>\\n' -}}
{%- for part in parts -%}
{{- '<image>\\n' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{{- '<|end_of_text|>' if message['role'] == 'assistant' else '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>\\n' -}}
{%- endif -%}
"""


def recipe(
    special_tokens: tuple[str, ...], bos: str, eos: str, unk: str | None, pad: str, template: str, strategy: str
) -> Recipe:
    return Recipe(
        special_tokens=special_tokens,
        bos=bos,
        eos=eos,
        unk=unk,
        pad=pad,
        chat_template=template,
        processor_class="LlavaNextProcessor",
        image_processor={
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": 56},
            "crop_size": {"height": 56, "width": 56},
            "image_grid_pinpoints": PINPOINTS,
            **CLIP,
        },
        processor={
            "image_token": "<image>",
            "patch_size": 14,
            "num_additional_image_tokens": int(strategy == "default"),
            "vision_feature_select_strategy": strategy,
        },
    )


MISTRAL = recipe(
    ("<unk>", "<s>", "</s>", "<image>", "<pad>"), "<s>", "</s>", "<unk>", "<pad>", MISTRAL_TEMPLATE, "default"
)
GRANITE = recipe(
    ("<|end_of_text|>", "<image>"), "<|end_of_text|>", "<|end_of_text|>", None, "<|end_of_text|>", GRANITE_TEMPLATE,
    "full",
)  # fmt: skip


def mistral_config(folder: Path) -> PretrainedConfig:
    text = {"model_type": "mistral", "sliding_window": 20}
    return small_config(
        "llava_next", folder, text=text, vision={"num_hidden_layers": 3}, image_grid_pinpoints=PINPOINTS
    )


def granite_config(folder: Path) -> PretrainedConfig:
    return small_config(
        "llava_next",
        folder,
        text={"model_type": "granite"},
        vision={"model_type": "siglip_vision_model", "vision_use_head": False},
        vision_feature_layer=[-2, -1],
        vision_feature_select_strategy="full",
        image_grid_pinpoints=PINPOINTS,
    )


SETTINGS = (
    {"image_grid_pinpoints": [[56, 56], [168, 224]]},
    {"image_grid_pinpoints": [[100, 150]]},
    {"crop_size": {"height": 42, "width": 42}},
    {"size": {"height": 70, "width": 70}, "do_center_crop": False, "image_grid_pinpoints": [[70, 140], [210, 70]]},
)

MEMBERS = (
    Member(
        name="llava_next",
        model_type="llava_next",
        write_processor=functools.partial(write_llama_recipe, recipe=MISTRAL),
        config=mistral_config,
        vision=(*VISION, "image_newline"),
        unused=("post_layernorm", "encoder.layers.2"),
        turns=Turns(ends={"system": "", "user": "", "assistant": "</s>"}, reply=lambda content: f" {content}"),
        pixel_names=("pixel_values", "image_sizes"),
        scale=3.0,
        settings=SETTINGS,
    ),
    Member(
        name="llava_next (Granite Vision)",
        model_type="llava_next",
        write_processor=functools.partial(write_recipe, recipe=GRANITE),
        config=granite_config,
        vision=(*VISION, "image_newline"),
        unused=("post_layernorm",),
        prepare_model=functools.partial(unscale_vision, scale=3.0),
        turns=Turns(ends={"system": "", "user": "", "assistant": "<|end_of_text|>"}),
        pixel_names=("pixel_values", "image_sizes"),
        scale=3.0,
    ),
)
