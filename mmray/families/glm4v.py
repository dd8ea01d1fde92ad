"""GLM-4.1V, GLM-4.5V, GLM-4.6V and GLM-OCR: one vision tower and M-RoPE before dense and expert text models.

Processors and models are published in every combination (GLM-4.6V is a `glm4v_moe` with the processor of GLM-4.6V,
GLM-4.6V-Flash a `glm4v` with the same), so they share one class.

Turns have no end of their own. The model stops with the token that opens the next turn, `<|user|>`, or
`<|observation|>` where it has called a tool.
"""

import functools
from typing import Any

from mmray.families.base import RoleMarkers, header_ends
from mmray.families.parts import Parts
from mmray.families.rotary import RotaryFamily

_ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>", "tool": "<|observation|>"}


class Glm4v(RotaryFamily):
    """GLM-4.1V, 4.5V, 4.6V and GLM-OCR (images; video is not read)."""

    model_types = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")
    processor_classes = ("Glm4vProcessor", "Glm46VProcessor")
    module_names = Parts(vision=("model.visual",), projector=("model.visual.merger",))
    placeholder = "<|image|>"
    placeholder_unit = "<|begin_of_image|><|image|><|end_of_image|>"
    stop_tokens = ("<|user|>", "<|observation|>")
    media_tokens = tuple(
        token
        for kind in ("image", "video", "audio")
        for token in (f"<|begin_of_{kind}|>", f"<|{kind}|>", f"<|end_of_{kind}|>")
    )

    @functools.cached_property
    def role_markers(self) -> tuple[RoleMarkers, ...]:
        return tuple(
            RoleMarkers(role, header + line_break, include_end=False, until_next=True)
            for line_break in header_ends()
            for role, header in _ROLES.items()
        )

    @property
    def resize_options(self) -> dict[str, Any]:
        return {"temporal_factor": self.images.temporal_patch_size}
