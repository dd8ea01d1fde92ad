"""Qwen2-VL and Qwen2.5-VL."""

import functools

from mmray.synthetic.models import small_config
from mmray.synthetic.processors import write_processor
from tests.mmray.families.zoo.base import Member, Turns

CHATML = Turns(ends=dict.fromkeys(("system", "user", "assistant"), "<|im_end|>"))

MEMBERS = tuple(
    Member(
        name=name,
        by_sample=("text", "vision"),
        model_type=name,
        write_processor=functools.partial(write_processor, model_type=name),
        config=functools.partial(small_config, name),
        vision=("visual",),
        turns=CHATML,
        tiling={"preset": "ocr_pages", "tile_size": (56, 56), "overview": (56, 56), "labels": True},
        pixel_names=("pixel_values", "image_grid_thw"),
        settings=(
            {"size": {"shortest_edge": 3136, "longest_edge": 5_000}},
            {"size": {"shortest_edge": 40_000, "longest_edge": 75_264}},
            {"patch_size": 8, "merge_size": 3},
        ),
    )
    for name in ("qwen2_vl", "qwen2_5_vl")
)
