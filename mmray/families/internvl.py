"""InternVL: square frames with a fixed number of tokens each, and one pair of markers around all frames of a page.

Untiled, the processor cuts a page into the grid of frames nearest to its shape and adds the whole page as a last one.
Under an mmray tiling policy every tile is one frame, so cutting is turned off.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig

from mmray.families.base import Size, Span, Tile, as_frame, channels_first, normalised
from mmray.families.llava import channels_last, frame_size
from mmray.families.parts import Parts
from mmray.families.text_models import OnTextModel
from mmray.images import TilingPolicy


class InternVL(OnTextModel):
    """InternVL 2.5, 3 and 3.5 as transformers has them: nothing beside the positions."""

    model_types = ("internvl",)
    processor_classes = ("InternVLProcessor",)
    module_names = Parts(vision=("model.vision_tower",), projector=("model.multi_modal_projector",))

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        self.placeholder = self.placeholder_unit = str(processor.image_token)
        super().__init__(processor, tiled)
        self.images = processor.image_processor
        self.image_token_id = self.placeholder_id
        self.frame_size = frame_size(self.images)
        self.tile_multiple = self.frame_size[0]
        self._markers = self.token_id(processor.start_image_token), self.token_id(processor.end_image_token)
        self._settings = processor._merge_kwargs(**self.processor_kwargs)["images_kwargs"]

    @functools.cached_property
    def media_token_ids(self) -> tuple[int, ...]:
        video = self.known_token_ids([self.processor.video_token])
        return (self.image_token_id, *self._markers, *video)

    def resolve_tiling(self, policy: TilingPolicy) -> TilingPolicy:
        return policy.with_fixed_tiles(self.frame_size) if policy.is_tiled else policy

    @property
    def processor_kwargs(self) -> dict[str, Any]:
        return {"crop_to_patches": False} if self.tiled else {}

    def _measure_span(self, tile_size: Size, num_tiles: int) -> Span:
        width, height = tile_size
        frames = self.images.get_number_of_image_patches(height, width, self._settings)
        count = int(self.processor.image_seq_length * frames)
        start, end = self._markers
        return Span(np.asarray([start, *[self.image_token_id] * count, end], dtype=np.int32), count)

    def frames(self, tile: Image.Image, num_tiles: int = 1) -> list[np.ndarray]:
        if self.tiled and tile.size == self.frame_size:
            return [as_frame(tile)]
        output = self.images(tile, **self._settings, do_rescale=False, do_normalize=False, return_tensors=None)
        return channels_last(output["pixel_values"])

    def pixel_inputs(self, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        return {"pixel_values": normalised(channels_first(frames), self.images, dtype)}

    @property
    def dummy_size(self) -> Size:
        return self.frame_size

    def feature_count(self, tile: Tile) -> int:
        return int(self.processor.image_seq_length) * len(tile.frame_sizes)

    def model_problem(self, config: PretrainedConfig) -> str | None:
        (height, width), (frame_width, frame_height) = config.vision_config.patch_size, self.frame_size
        num_features = int((frame_height // height) * (frame_width // width) * config.downsample_ratio**2)
        if num_features == self.processor.image_seq_length:
            return None
        return (
            f"its vision tower makes {num_features} features of a frame of {frame_width} x {frame_height} pixels, and "
            f"the processor writes {self.processor.image_seq_length} tokens for them; take both from one revision"
        )
