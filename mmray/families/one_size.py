"""The base of families whose processor resizes every picture to one size with a fixed number of features."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmray.errors import UserError
from mmray.families.base import Family, Size, Tile, as_frame, channels_first, normalised
from mmray.images import TilingPolicy


class OneSize(Family):
    """A family in which a picture is one frame of the processor's size. Tiles are cut to that size, and not
    resampled."""

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        """Binds the family to a processor. Raises UserError for an image processor without a height and a width."""
        super().__init__(processor, tiled)
        self.images = processor.image_processor
        size = self.images.size
        if not size.height or not size.width:
            raise UserError(
                f"{type(processor).__name__} takes pictures of one size, but the size of its image processor is "
                f"{dict(size)}; write height and width"
            )
        self.frame_size: Size = (int(size.width), int(size.height))
        self.tile_multiple = self.frame_size[0]
        self.features = int(processor.image_seq_length)

    def resolve_tiling(self, policy: TilingPolicy) -> TilingPolicy:
        return policy.with_fixed_tiles(self.frame_size)

    @property
    def processor_kwargs(self) -> dict[str, Any]:
        return {"do_resize": False} if self.tiled else {}

    @property
    def frame_kwargs(self) -> dict[str, Any]:
        """Settings with which the image processor, called alone, does what it does for the processor."""
        return {}

    def frames(self, tile: Image.Image, num_tiles: int = 1) -> list[np.ndarray]:
        if self.tiled and tile.size == self.frame_size:
            return [as_frame(tile)]
        options = {"do_rescale": False, "do_normalize": False, "return_tensors": None}
        output = self.images(tile, **options, **self.frame_kwargs, **self.processor_kwargs)
        (pixels,) = output["pixel_values"]
        return [np.ascontiguousarray(pixels.transpose(1, 2, 0))]

    def pixel_inputs(self, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        pixels = channels_first(frames)
        return {"pixel_values": normalised(pixels, self.images, dtype)}

    @property
    def dummy_size(self) -> Size:
        return self.frame_size

    def feature_count(self, tile: Tile) -> int:
        return self.features * len(tile.frame_sizes)
