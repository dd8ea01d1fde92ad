"""Pixtral, Mistral 3 and LightOnOCR."""

import functools
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from mmray.synthetic.processors import Recipe, write_recipe
from tests.mmray.families.zoo.base import Member, Turns, begin_with

# A system message stands before the last user turn, and only where the chat ends with it: in a chat to train on, never.
PIXTRAL_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set system, turns = messages[0]['content'], messages[1:] -%}
{%- else -%}
{%- set turns = messages -%}
{%- endif -%}
{{- bos_token -}}
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{{- '[INST]' -}}
{{- system + '\\n\\n' if loop.last and system is defined -}}
{%- endif -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '[IMG]' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '[/INST]' if message['role'] == 'user' else eos_token -}}
{%- endfor -%}
"""

V7_TEKKEN_TEMPLATE = """\
{{- bos_token -}}
{%- if messages[0]['role'] != 'system' -%}
{{- '[SYSTEM_PROMPT]You are Mistral Small 3.[/SYSTEM_PROMPT]' -}}
{%- endif -%}
{%- for message in messages -%}
{{- {'system': '[SYSTEM_PROMPT]', 'user': '[INST]', 'tool': '[TOOL_RESULTS]'}.get(message['role'], '') -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '[IMG]' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- {'system': '[/SYSTEM_PROMPT]', 'user': '[/INST]', 'tool': '[/TOOL_RESULTS]'}.get(message['role'], eos_token) -}}
{%- endfor -%}
"""

# A turn of parts ends with a line break, a turn of one text does not.
LIGHTON_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>system<|im_end|>\\n' if loop.first and message['role'] != 'system' -}}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<|image_pad|>' if part['type'] == 'image' else part['text'] + '\\n' -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
"""

MISTRAL_TOKENS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
)  # fmt: skip
LIGHTON_PICTURE = {
    "image_token": "<|image_pad|>",
    "image_break_token": "<|vision_pad|>",
    "image_end_token": "<|vision_end|>",
}
V7_TOKENS = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")


def images(patch: int) -> dict[str, Any]:
    """preprocessor_config.json, with the limit of published ones made small."""
    return {
        "image_processor_type": "PixtralImageProcessor",
        "size": {"longest_edge": 112},
        "patch_size": patch,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def mistral(template: str, tokens: tuple[str, ...], merge: int) -> Recipe:
    return Recipe(
        special_tokens=tokens,
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        unk="<unk>",
        chat_template=template,
        processor_class="PixtralProcessor",
        image_processor=images(14),
        processor={"patch_size": 14, "spatial_merge_size": merge},
    )


LIGHTON = Recipe(
    special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *LIGHTON_PICTURE.values()),
    eos="<|im_end|>",
    pad="<|endoftext|>",
    chat_template=LIGHTON_TEMPLATE,
    processor_class="LightOnOcrProcessor",
    image_processor=images(14),
    processor={"patch_size": 14, "spatial_merge_size": 2},
    tokenizer=LIGHTON_PICTURE,
)

TEXT = {
    "head_dim": 16, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "sliding_window": None,
}  # fmt: skip
VISION = {
    "model_type": "pixtral", "patch_size": 14, "image_size": 112, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
MERGED = {"spatial_merge_size": 2, "tie_word_embeddings": False}

# Queries grow with their place in the sample, here from the 40th token on.
GROWING_QUERIES = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 40,
    "llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def write_processor(folder: Path, recipe: Recipe) -> None:
    write_recipe(folder, recipe)
    if recipe.bos:
        begin_with(folder, recipe.bos)


def config(folder: Path, model_type: str, text: dict[str, Any], **settings: Any) -> PretrainedConfig:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoConfig.for_model(
        model_type,
        text_config=TEXT | text | {"vocab_size": len(tokenizer)},
        vision_config=VISION,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>" if model_type == "lighton_ocr" else "[IMG]"),
        **settings,
    )


def member(
    name: str, model_type: str, recipe: Recipe, turns: Turns, settings: tuple[dict[str, Any], ...], **model: Any
) -> Member:
    return Member(
        name=name,
        by_sample=("text", "vision"),
        model_type=model_type,
        processor=recipe.processor_class,
        write_processor=functools.partial(write_processor, recipe=recipe),
        config=functools.partial(config, model_type=model_type, **model),
        vision=("vision_tower", "vision_encoder", "multi_modal_projector", "vision_projection"),
        turns=turns,
        tiling={"preset": "ocr_pages", "native_resolution": True, "overview": (56, 84), "labels": True},
        pixel_names=("pixel_values", "image_sizes"),
        settings=settings,
    )


PIXTRAL = mistral(PIXTRAL_TEMPLATE, MISTRAL_TOKENS, 1)
V7_TEKKEN = mistral(V7_TEKKEN_TEMPLATE, (*MISTRAL_TOKENS, *V7_TOKENS), 2)
PIXTRAL_TURNS = Turns(ends={"user": "", "assistant": "</s>"}, has_system=False)
V7_TURNS = Turns(ends={"system": "[/SYSTEM_PROMPT]", "user": "", "assistant": "</s>"})
CHATML_TURNS = Turns(ends=dict.fromkeys(("system", "user", "assistant"), "<|im_end|>"))
SMALLER = ({"size": {"longest_edge": 50}}, {"size": {"height": 60, "width": 200}, "resample": 2})
# A strip that is one patch wide would have no token.
NOT_TOO_NARROW = ({"size": {"longest_edge": 190}}, {"size": {"height": 190, "width": 210}, "resample": 2})

MEMBERS = (
    member(
        "pixtral", "llava", PIXTRAL, PIXTRAL_TURNS, (*SMALLER, {"do_resize": False}),
        text={"model_type": "mistral"}, vision_feature_layer=-1, vision_feature_select_strategy="full",
    ),
    member("mistral3", "mistral3", V7_TEKKEN, V7_TURNS, SMALLER, text={"model_type": "mistral"}, **MERGED),
    member(
        "mistral3 (ministral3)", "mistral3", V7_TEKKEN, V7_TURNS, (),
        text={"model_type": "ministral3", "rope_parameters": GROWING_QUERIES}, **MERGED,
    ),
    member(
        "lighton_ocr", "lighton_ocr", LIGHTON, CHATML_TURNS, (*NOT_TOO_NARROW, {"patch_size": 28}),
        text={"model_type": "qwen3"}, **MERGED,
    ),
)  # fmt: skip
