"""PaddleOCR-VL: patches in reading order over the whole picture, which the model merges itself, and turns marked by
words.

"User:" and "Assistant:" are no tokens of their own; the tokenizer writes them alike at the beginning of a text, after a
special token and after a line break, which it never joins with other text. Published templates write a space or a line
break after "Assistant:".
"""

import functools

from torch import Tensor

from mmray.families.base import RoleMarkers
from mmray.families.parts import Parts
from mmray.families.rotary import RotaryFamily


class PaddleOCRVL(RotaryFamily):
    """PaddleOCR-VL 0.9B and 1.5."""

    model_types = ("paddleocr_vl",)
    leaf_modules = ("PaddleOCRProjector",)  # once a picture
    processor_classes = ("PaddleOCRVLProcessor",)
    module_names = Parts(vision=("model.visual",), projector=("model.projector",))
    placeholder = "<|IMAGE_PLACEHOLDER|>"
    placeholder_unit = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    media_tokens = (
        "<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_END|>",
        "<|VIDEO_START|>", "<|video_pad|>", "<|VIDEO_END|>",
    )  # fmt: skip

    @functools.cached_property
    def role_markers(self) -> tuple[RoleMarkers, ...]:
        # A system's text follows the first token without a marker. The user's ends where a line begins with the
        # assistant's word, which may stand elsewhere in it.
        spaces = ("\n", " ", "")
        return (
            RoleMarkers("system", "<|begin_of_sentence|>", "User:", include_end=False),
            *(RoleMarkers("user", f"User:{space}", "\nAssistant:", include_end=False) for space in spaces),
            *(RoleMarkers("assistant", f"Assistant:{space}", self.tokenizer.eos_token) for space in spaces),
        )

    def patches(self, frame: Tensor) -> Tensor:
        """The patches of a frame in reading order over the whole picture, [patches, 3, side, side]."""
        size = self.images.patch_size
        cells = frame.reshape(frame.shape[0] // size, size, frame.shape[1] // size, size, 3)
        return cells.permute(0, 2, 4, 1, 3).reshape(-1, 3, size, size)

    def timed(self, patches: Tensor) -> Tensor:
        """The patches unchanged, [n, 3, side, side], because an image has one time."""
        return patches.repeat_interleave(self.images.temporal_patch_size, dim=1)
