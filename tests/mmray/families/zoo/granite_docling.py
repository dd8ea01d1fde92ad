"""Granite for Docling, by its coarse and by its fine path."""

import functools
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from mmray.synthetic.documents import sample_texts
from mmray.synthetic.processors import Recipe, write_recipe
from tests.mmray.families.zoo.base import Member, Turns

TEMPLATE = """\
{%- for message in messages -%}
{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<image>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|end_of_text|>\\n' -}}
{%- endfor -%}
"""
ROLES = ("system", "user", "assistant")


def recipe(*, fine: bool) -> Recipe:
    return Recipe(
        special_tokens=(
            "<|pad|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<fake_token_around_image>",
            "<image>", "<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
        ),
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        pad="<|pad|>",
        chat_template=TEMPLATE,
        processor_class="GraniteDoclingProcessor",
        image_processor={
            "image_processor_type": "GraniteDoclingImageProcessor",
            "size": {"height": 64, "width": 64},
            "max_patches": 6,
            "fine_route": fine,
        },
        processor={"image_seq_len": 4},
    )  # fmt: skip


def write_processor(folder: Path, fine: bool) -> None:
    """With one token for two line breaks: the one after a page of one square melts into those of the text."""
    write_recipe(folder, recipe(fine=fine), [*sample_texts(), *["Page:\n\n\nas printed"] * 20])


def config(folder: Path) -> PretrainedConfig:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": tokenizer.pad_token_id,
        "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 0.25,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 64, "patch_size": 8, "scale_factor": 4, "out_hidden_size": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return AutoConfig.for_model(
        "granite_docling", text_config=text, vision_config=vision, tie_word_embeddings=False,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


MEMBERS = tuple(
    Member(
        name=f"granite_docling{' (fine)' if fine else ''}",
        model_type="granite_docling",
        write_processor=functools.partial(write_processor, fine=fine),
        config=config,
        vision=("vision_model",),
        unused=("connector.coarse",) if fine else ("connector.fine",),
        turns=Turns(ends=dict.fromkeys(ROLES, "<|end_of_text|>")),
        tiling={"preset": "ocr_pages", "tile_size": (64, 64), "overview": (64, 64), "labels": True},
        pixel_names=("pixel_values", "pixel_attention_mask", *(["tile_fine_mask"] if fine else [])),
        settings=(
            {"crop_to_patches": False},
            {"max_patches": 9, "min_patches": 2},
            {"size": {"height": 32, "width": 32}},
            {"max_patches": 4, "dense_max_patches": 12, "dense_min_aspect": 1.2},
        ),
    )
    for fine in (False, True)
)
