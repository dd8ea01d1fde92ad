"""Idefics3 and SmolVLM."""

import functools

from mmray.synthetic.models import small_config
from mmray.synthetic.processors import write_processor
from tests.mmray.families.zoo.base import Member, Turns

ROLES = ("system", "user", "assistant")
TURNS = {
    "idefics3": Turns(ends=dict.fromkeys(ROLES, "<|end_of_text|>")),
    "smolvlm": Turns(ends=dict.fromkeys(ROLES, "<end_of_utterance>"), reply=lambda content: f" {content}"),
}

MEMBERS = tuple(
    Member(
        name=name,
        model_type=name,
        write_processor=functools.partial(write_processor, model_type=name),
        config=functools.partial(small_config, name),
        vision=("vision_model", "connector"),
        turns=turns,
        tiling={"preset": "ocr_pages", "tile_size": (64, 64), "overview": (64, 64), "labels": True},
        pixel_names=("pixel_values", "pixel_attention_mask"),
        settings=(
            {"do_image_splitting": False},
            {"size": {"longest_edge": 192}},
            {"max_image_size": {"longest_edge": 48}},
        ),
    )
    for name, turns in TURNS.items()
)
