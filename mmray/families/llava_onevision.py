"""LLaVA-OneVision: a picture that is alone in its sample is split as in LLaVA-NeXT; several are one frame each.

The model shrinks the features of a picture with many frames, so that they are never more than those of a few frames.
Under an mmray tiling policy a page's tiles have the frame's size, so each is one frame. A page that becomes one tile is
alone in its sample, and is encoded twice: whole, and as its own only part.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig

from mmray.families.base import Size, Tile, as_frame
from mmray.families.llava import check_known
from mmray.families.llava_next import LlavaNext
from mmray.images import TilingPolicy


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: inputs as LLaVA-NeXT, with `batch_num_images`, an entry for each sample with pictures."""

    model_types = ("llava_onevision",)
    processor_classes = ("LlavaOnevisionProcessor",)
    stop_tokens = ("<|im_end|>",)
    """The token that ends a turn, which the `{% generation %}` blocks of the published template leave out."""

    def _check_processor(self) -> None:
        check_known(self.processor, "num_image_tokens", "vision_feature_select_strategy")

    def process(self, text: str, tiles: Sequence[Image.Image], **options: Any) -> Any:
        """The processor's output. Pictures are passed as a list for each sample: in a flat list each would count as
        alone."""
        return self.processor(text=[text], images=[list(tiles)] if tiles else None, **options)

    def resolve_tiling(self, policy: TilingPolicy) -> TilingPolicy:
        if not policy.is_tiled:
            return policy
        width, height = self.frame_size
        if width != height or [height, width] not in self.images.image_grid_pinpoints:
            raise ValueError(
                f"LLaVA-OneVision would scale tiles of its frames' size, {width} x {height}: it is no square, or not "
                "among image_grid_pinpoints; remove the tiling"
            )
        return policy.with_fixed_tiles(self.frame_size)

    def _count(self, tile_size: Size, num_tiles: int) -> int:
        if num_tiles == 1:
            return super()._count(tile_size, num_tiles)
        return int(self.processor.num_image_tokens) + 1  # the end of the only row

    def frames(self, tile: Image.Image, num_tiles: int = 1) -> list[np.ndarray]:
        if self.tiled and num_tiles > 1 and tile.size == self.frame_size:
            return [as_frame(tile)]
        # Any second picture makes the first one of several.
        return self._frames([[tile] if num_tiles == 1 else [tile, Image.new("RGB", (1, 1))]])

    def pixel_inputs(self, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The arguments of LLaVA-NeXT, and `batch_num_images`, int64 [samples with pictures]: how many pictures each
        has."""
        inputs = super().pixel_inputs(tiles, frames, dtype)
        numbers = [len(list(sample_tiles)) for _, sample_tiles in groupby(tiles, key=lambda tile: tile.sample)]
        device = inputs["pixel_values"].device
        return inputs | {"batch_num_images": torch.tensor(numbers, dtype=torch.int64, device=device)}

    def feature_count(self, tile: Tile) -> int:
        return self.span(tile.size, num_tiles=1 if len(tile.frame_sizes) > 1 else 2).visual_tokens

    @property
    def _frame_features(self) -> int:
        dropped = int(self.processor.vision_feature_select_strategy == "default")
        return int(self.processor.num_image_tokens) - dropped

    def model_problem(self, config: PretrainedConfig) -> str | None:
        ours, theirs = self.processor.vision_aspect_ratio, config.vision_aspect_ratio
        if ours != theirs:
            return f"its vision_aspect_ratio is {theirs}, that of the processor {ours}; make them the same"
        return super().model_problem(config)
