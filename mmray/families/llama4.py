"""Llama 4: a page becomes up to 16 squares and an overview, each with the same number of tokens.

There is no PIL image processor for this model: pictures are resized by torchvision, which must be installed.

Rows pack up to a length: from `floor_scale` tokens on, the layers without rotary positions scale queries by the token's
place in the row, not in its sample. The other layers attend within chunks, which transformers counts from a sample's
beginning.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig

from mmray.families.base import Family, RoleMarkers, Size, Span, Tile, as_frame, channels_first, header_ends, normalised
from mmray.families.parts import Parts
from mmray.images import TilingPolicy

HEADERS = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}
"""The name that the chat template writes for each role."""


class Llama4(Family):
    """Llama 4 (Scout and Maverick): squares of one size; packs in rows shorter than `floor_scale` (8,192 tokens)."""

    model_types = ("llama4",)
    processor_classes = ("Llama4Processor",)
    module_names = Parts(
        vision=("vision_model",),
        projector=("multi_modal_projector",),
        language=("language_model",),
        embeddings=("language_model.model.embed_tokens", "language_model.lm_head"),
    )

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        # Needs torchvision, and a processor of this kind cannot exist without.
        from transformers.models.llama4 import image_processing_llama4

        self._rule = image_processing_llama4
        self.placeholder = self.placeholder_unit = processor.image_token
        super().__init__(processor, tiled)
        self.images = processor.image_processor
        self.image_token_id = self.token_id(processor.img_patch_token)
        self.square = int(self.images.size.height)
        self.tile_multiple = self.square
        self.square_tokens = (self.square // processor.patch_size) ** 2 // processor.downsample_ratio

    @functools.cached_property
    def media_token_ids(self) -> tuple[int, ...]:
        processor = self.processor
        edges = [processor.start_of_img_token, processor.end_of_img_token]
        separators = [processor.tile_token, processor.tile_global_token]
        return tuple(self.known_token_ids([self.placeholder, processor.img_patch_token, *edges, *separators]))

    @functools.cached_property
    def role_markers(self) -> tuple[RoleMarkers, ...]:
        return tuple(
            RoleMarkers(role, f"<|header_start|>{header}<|header_end|>{line_breaks}", "<|eot|>")
            for line_breaks in header_ends("\n\n")
            for role, header in HEADERS.items()
        )

    def resolve_tiling(self, policy: TilingPolicy) -> TilingPolicy:
        return policy.with_fixed_tiles((self.square, self.square)) if policy.is_tiled else policy

    @property
    def processor_kwargs(self) -> dict[str, Any]:
        return {"resize_to_max_canvas": False} if self.tiled else {}

    def _grid(self, tile_size: Size) -> tuple[int, int]:
        """The (rows, columns) of squares of a page."""
        width, height = tile_size
        canvases = self._rule.find_supported_resolutions(self.images.max_patches, self.images.size)
        to_largest = self.images.resize_to_max_canvas and not self.tiled
        canvas: Any = self._rule.get_best_fit((height, width), torch.tensor(canvases), to_largest)
        rows, columns = (canvas // self.square).tolist()
        return rows, columns

    def _measure_span(self, tile_size: Size, num_tiles: int) -> Span:
        text = self.processor._prompt_split_image(self._grid(tile_size), self.square_tokens)
        ids = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
        return Span(ids, int((ids == self.image_token_id).sum()))

    def frames(self, tile: Image.Image, num_tiles: int = 1) -> list[np.ndarray]:
        if self.tiled and tile.size == (self.square, self.square):
            return [as_frame(tile)]
        output = self.images(tile, do_rescale=False, do_normalize=False, return_tensors=None, **self.processor_kwargs)
        return list(output["pixel_values"][0].permute(0, 2, 3, 1).contiguous().numpy())

    def pixel_inputs(self, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        pixels = channels_first(frames)
        images = self.images
        if not (images.do_rescale and images.do_normalize):
            return {"pixel_values": normalised(pixels, images, dtype)}
        # Its processor, as the original, computes in bfloat16.
        values = pixels.to(torch.bfloat16) * images.rescale_factor
        mean, std = values.new_tensor([images.image_mean, images.image_std])[:, :, None, None]
        return {"pixel_values": ((values - mean) / std).to(dtype)}

    def feature_count(self, tile: Tile) -> int:
        return self.square_tokens * len(tile.frame_sizes)

    @classmethod
    def by_sample_problem(cls, config: PretrainedConfig) -> str | None:
        return "its layers attend within chunks, which takes a mask"

    def packing_problem(self, config: PretrainedConfig, *, sample_tokens: int, row_tokens: int) -> str | None:
        text: Any = config.get_text_config()
        scales = text.attn_temperature_tuning and not all(text.no_rope_layers)
        if not scales or row_tokens < text.floor_scale:
            return None
        return (
            f"from {text.floor_scale} tokens on (floor_scale) its queries grow with their place in the row, and rows "
            f"will have up to {row_tokens}; set packing.token_capacity times training.micro_batch_bins to less"
        )
