"""Qwen2-VL and Qwen2.5-VL: the tokens and the ChatML template that later Qwen models took over."""

import functools
from typing import ClassVar

from mmray.families.base import RoleMarkers, header_ends
from mmray.families.parts import Parts
from mmray.families.rotary import RotaryFamily


class Qwen2VL(RotaryFamily):
    """Qwen2-VL and Qwen2.5-VL (images; video is not read)."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl")
    processor_classes: ClassVar[tuple[str, ...]] = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor")
    module_names: ClassVar[Parts] = Parts(vision=("model.visual",), projector=("model.visual.merger",))
    placeholder = "<|image_pad|>"
    placeholder_unit = "<|vision_start|><|image_pad|><|vision_end|>"
    media_tokens = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")

    @functools.cached_property
    def role_markers(self) -> tuple[RoleMarkers, ...]:
        return tuple(
            RoleMarkers(role, f"<|im_start|>{role}{line_break}", "<|im_end|>")
            for line_break in header_ends()
            for role in ("system", "user", "assistant", "tool")
        )
