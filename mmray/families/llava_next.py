"""LLaVA-NeXT: a page becomes as many frames as suit its shape, and one more of the whole page.

From a list of resolutions the processor takes the one that suits the page, scales the page into it, pads it with black
and cuts it into frames. The model knows the page's size, drops the features of the padding, and adds one feature at the
end of each row of patches. It splits every page, at least in two: no mmray tile could be one frame, so tiling policies
are refused.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig

from mmray.families.base import Size, Span, Tile, channels_first, normalised
from mmray.families.llava import (
    channels_last,
    check_known,
    features_span,
    frame_size,
    vision_problem,
)
from mmray.families.parts import Parts
from mmray.families.text_models import OnTextModel
from mmray.images import TilingPolicy


class LlavaNext(OnTextModel):
    """LLaVA-NeXT (LLaVA 1.6) and Granite Vision: pages zero-padded to the row's most frames, with `image_sizes`; takes
    no tiles."""

    model_types = ("llava_next",)
    processor_classes = ("LlavaNextProcessor",)
    module_names = Parts(
        vision=("model.vision_tower",), projector=("model.multi_modal_projector", "model.image_newline")
    )

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        """Binds the family to a processor. Raises UserError for one that does not know its vision tower."""
        self.placeholder = self.placeholder_unit = str(processor.image_token)
        super().__init__(processor, tiled)
        self._check_processor()
        self.images = processor.image_processor
        self.image_token_id = self.placeholder_id
        self.frame_size = frame_size(self.images)
        self.tile_multiple = self.frame_size[0]

    def _check_processor(self) -> None:
        check_known(self.processor, "patch_size", "vision_feature_select_strategy")

    @functools.cached_property
    def media_token_ids(self) -> tuple[int, ...]:
        return tuple(self.known_token_ids([self.placeholder, "<video>"]))

    def resolve_tiling(self, policy: TilingPolicy) -> TilingPolicy:
        if policy.is_tiled:
            raise ValueError(
                "LLaVA-NeXT splits every picture itself, a tile too, and cannot be told not to; remove the tiling"
            )
        return policy

    def _measure_span(self, tile_size: Size, num_tiles: int) -> Span:
        dropped = int(self.processor.vision_feature_select_strategy == "default")
        return features_span(self, self._count(tile_size, num_tiles) - dropped)

    def _count(self, tile_size: Size, num_tiles: int) -> int:
        (width, height), (frame_width, frame_height) = tile_size, self.frame_size
        try:
            return int(self.processor._get_number_of_features(height, width, frame_height, frame_width))
        except ZeroDivisionError as error:
            raise ValueError(f"one of image_grid_pinpoints is smaller than a frame, {self.frame_size}") from error

    def frames(self, tile: Image.Image, num_tiles: int = 1) -> list[np.ndarray]:
        return self._frames([tile])

    def _frames(self, pictures: Any) -> list[np.ndarray]:
        """The frames of the first of some pictures."""
        output = self.images(pictures, do_rescale=False, do_normalize=False, return_tensors=None)
        return channels_last(output["pixel_values"][0])

    def pixel_inputs(self, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The arguments `pixel_values` and `image_sizes`.

        pixel_values: [tiles, most frames of a tile, 3, height, width], with frames of zeros after those of tiles that
        have fewer.
        image_sizes: int64 [tiles, 2], (height, width) of the pages.
        """
        pixels = normalised(channels_first(frames), self.images, dtype)
        counts = [len(tile.frame_sizes) for tile in tiles]
        sizes = torch.tensor([tile.size[::-1] for tile in tiles], dtype=torch.int64, device=pixels.device)
        return {"pixel_values": pad_sequence(pixels.split(counts), batch_first=True), "image_sizes": sizes}

    @property
    def dummy_size(self) -> Size:
        return self.frame_size

    @property
    def dummy_frames(self) -> list[np.ndarray]:
        return self.frames(Image.new("RGB", self.dummy_size, "white"))

    def feature_count(self, tile: Tile) -> int:
        return self.span(tile.size).visual_tokens

    @property
    def _frame_features(self) -> int:
        """Number of tokens that the processor writes for the page as a whole."""
        (width, height), patch = self.frame_size, self.processor.patch_size
        dropped = int(self.processor.vision_feature_select_strategy == "default")
        return int((height // patch) * (width // patch) + self.processor.num_additional_image_tokens) - dropped

    def model_problem(self, config: PretrainedConfig) -> str | None:
        ours, theirs = ([list(size) for size in settings.image_grid_pinpoints] for settings in (self.images, config))
        if ours != theirs:
            return f"its image_grid_pinpoints are {theirs}, those of the image processor {ours}; make them the same"
        return vision_problem(config, self.frame_size, self._frame_features)
