"""LLaVA 1.5: each picture is one frame of the vision tower's size, each patch of it one token.

The whole page is scaled into the frame, and what its shape leaves over is cut off; under an mmray tiling policy the
tiles have the frame's size, and scaling is turned off.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig

from mmray.errors import UserError
from mmray.families.base import Family, Size, Span, Tile, as_frame, channels_first, normalised
from mmray.families.parts import Parts
from mmray.families.text_models import OnTextModel
from mmray.images import TilingPolicy

_TOWER_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Tokens that a vision tower makes in addition to those of the patches, by its model_type."""


class Llava(OnTextModel):
    """LLaVA 1.5 and others with a vision tower of one size, CLIP or SigLIP: nothing beside the positions."""

    model_types = ("llava",)
    processor_classes = ("LlavaProcessor",)
    module_names = Parts(vision=("model.vision_tower",), projector=("model.multi_modal_projector",))

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        """Binds the family to a processor. Raises UserError for one that does not know its vision tower."""
        self.placeholder = self.placeholder_unit = str(processor.image_token)
        super().__init__(processor, tiled)
        check_known(processor, "patch_size", "vision_feature_select_strategy")
        self.images = processor.image_processor
        self.image_token_id = self.placeholder_id
        self.frame_size = frame_size(self.images)
        self.tile_multiple = self.frame_size[0]

    @functools.cached_property
    def media_token_ids(self) -> tuple[int, ...]:
        return tuple(self.known_token_ids([self.placeholder, "<video>"]))

    def resolve_tiling(self, policy: TilingPolicy) -> TilingPolicy:
        return policy.with_fixed_tiles(self.frame_size) if policy.is_tiled else policy

    @property
    def processor_kwargs(self) -> dict[str, Any]:
        return {"do_resize": False, "do_pad": False} if self.tiled else {}

    def _measure_span(self, tile_size: Size, num_tiles: int) -> Span:
        return features_span(self, self._features(tile_size if self.tiled else self._output_size(tile_size)))

    def _output_size(self, tile_size: Size) -> Size:
        """The size that the image processor turns a picture into.

        It is asked of a blank picture where the shape matters; published processors cut all pictures to one size.
        """
        images = self.images
        if images.do_center_crop or (images.do_resize and images.size.height and images.size.width):
            return self.frame_size
        (frame,) = self.frames(Image.new("RGB", tile_size))
        return frame.shape[1], frame.shape[0]

    def _features(self, frame_size: Size) -> int:
        """Number of patches of a frame, with the tower's other tokens that the model keeps."""
        width, height = frame_size
        patch = self.processor.patch_size
        dropped = int(self.processor.vision_feature_select_strategy == "default")
        return (height // patch) * (width // patch) + self.processor.num_additional_image_tokens - dropped

    def frames(self, tile: Image.Image, num_tiles: int = 1) -> list[np.ndarray]:
        if self.tiled and tile.size == self.frame_size:
            return [as_frame(tile)]
        output = self.images(tile, do_rescale=False, do_normalize=False, return_tensors=None, **self.processor_kwargs)
        return channels_last(output["pixel_values"])

    def pixel_inputs(self, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        return {"pixel_values": normalised(channels_first(frames), self.images, dtype)}

    @property
    def dummy_size(self) -> Size:
        return self.frame_size

    def feature_count(self, tile: Tile) -> int:
        return sum(map(self._features, tile.frame_sizes))

    def model_problem(self, config: PretrainedConfig) -> str | None:
        return vision_problem(config, self.frame_size, self._features(self.frame_size))


def features_span(family: Family, count: int) -> Span:
    """The span of a picture that becomes image tokens alone. Raises ValueError where it becomes none."""
    if count < 1:
        raise ValueError(
            f"{type(family.processor).__name__} makes nothing of it: its patches are larger than its frames"
        )
    return Span(np.full(count, family.image_token_id, dtype=np.int32), count)


def vision_problem(config: PretrainedConfig, frame_size: Size, features: int) -> str | None:
    """The reason why the vision tower of a LLaVA makes another number of features than its processor writes tokens for.

    None where they agree, or where the tower is not known here. features: the tokens that the processor writes for the
    patches of a frame.

    Where the two disagree the model stops, which may be at the first page of some shape, far into the training.
    """
    vision = config.vision_config
    if vision.model_type not in _TOWER_TOKENS:
        return None
    side, (width, height) = vision.image_size, frame_size
    if frame_size != (side, side):
        return f"its vision tower takes frames of {side} x {side} pixels, the processor makes {width} x {height}"
    dropped = int(config.vision_feature_select_strategy == "default")
    num_features = (side // vision.patch_size) ** 2 + _TOWER_TOKENS[vision.model_type] - dropped
    if num_features == features:
        return None
    return (
        f"its vision tower makes {num_features} features of a frame, and the processor writes {features} tokens for "
        "them; take both from one revision"
    )


def check_known(processor: Any, *names: str) -> None:
    """Raises UserError where a processor lacks one of its settings.

    Revisions of LLaVA from before 2025 did not have them, and their lengths cannot be known.
    """
    for name in names:
        if getattr(processor, name) is None:
            raise UserError(
                f"the {type(processor).__name__} has no {name}; take a newer revision of the model's files, or set "
                f"{name} in processor_config.json to that of the model's vision tower"
            )


def frame_size(images: Any) -> Size:
    """The (width, height) of the frames that an image processor makes for the vision tower.

    Raises UserError for an image processor whose frames have no fixed size.
    """
    size = images.crop_size if images.do_center_crop else images.size
    if size.height and size.width:
        return int(size.width), int(size.height)
    if size.shortest_edge and not size.longest_edge:
        return int(size.shortest_edge), int(size.shortest_edge)
    raise UserError(
        f"the {type(images).__name__} scales pictures to {dict(size)}, but the vision tower takes one size; set "
        "crop_size and do_center_crop, or size to a height and width, in preprocessor_config.json"
    )


def channels_last(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Turns frames of [3, height, width] each into the layout of `Family.frames`."""
    return [np.ascontiguousarray(frame.transpose(1, 2, 0)) for frame in frames]
