"""Granite for Docling (`model_type` granite_docling): squares of one size on the grid that suits the page, and the
whole page.

granite-docling-258M is not of this family but an Idefics3.

The image processor's `fine_route` sends all pages of a job through the connector's fine path, with four times the
tokens; so the samples of a row are of one kind, as the model wants it. Its density router, which chooses the path of a
page, does not enter the loss and keeps its weights.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig

from mmray.families.base import Family, RoleMarkers, Size, Span, Tile, as_frame, channels_first, normalised
from mmray.families.parts import Parts
from mmray.images import TilingPolicy

LARGEST_GRID = 16
"""The most rows and columns of squares that the vocabulary has tokens for."""


class GraniteDocling(Family):
    """Granite for Docling: `pixel_values` and `pixel_attention_mask` over the squares of a row, and `tile_fine_mask`
    where the processor's `fine_route` is on."""

    model_types = ("granite_docling",)
    processor_classes = ("GraniteDoclingProcessor",)
    module_names = Parts(
        vision=("model.vision_model",),
        projector=("model.vision_model.connector", "model.density_router"),
        language=("model.text_model",),
        embeddings=("model.text_model.embed_tokens", "lm_head"),
    )

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        self.placeholder = self.placeholder_unit = processor.image_token
        super().__init__(processor, tiled)
        self.images = processor.image_processor
        self.image_token_id = self.placeholder_id
        self.square = int(self.images.size.height)
        self.tile_multiple = self.square
        self.square_tokens = processor.image_seq_len * (4 if self.images.fine_route else 1)

    @functools.cached_property
    def media_token_ids(self) -> tuple[int, ...]:
        numbers = range(1, LARGEST_GRID + 1)
        cells = [f"<row_{row}_col_{column}>" for row in numbers for column in numbers]
        edges = [self.processor.fake_image_token, self.processor.global_image_tag]
        return tuple(self.known_token_ids([self.placeholder, *edges, *cells]))

    @functools.cached_property
    def role_markers(self) -> tuple[RoleMarkers, ...]:
        return tuple(
            RoleMarkers(role, f"<|start_of_role|>{role}<|end_of_role|>", "<|end_of_text|>")
            for role in ("system", "user", "assistant", "tool")
        )

    def tokenizer_text(self, text: str, tile_sizes: Sequence[Size] = ()) -> str:
        """Rendered text with the line break that the processor writes after a page of one square, which may merge with
        the text."""
        head, *tails = text.split(self.placeholder)
        ends = ("\n" if self._is_single(size) else "" for size in tile_sizes)
        return head + "".join(self.placeholder + end + tail for end, tail in zip(ends, tails, strict=True))

    def resolve_tiling(self, policy: TilingPolicy) -> TilingPolicy:
        return policy.with_fixed_tiles((self.square, self.square)) if policy.is_tiled else policy

    @property
    def processor_kwargs(self) -> dict[str, Any]:
        return {"crop_to_patches": False} if self.tiled else {}

    def _grid(self, tile_size: Size) -> tuple[int, int]:
        """The (rows, columns) of squares of a page."""
        width, height = tile_size
        rows, columns = self.images.get_tile_grid(height, width, self.processor_kwargs)
        return rows, columns

    def _is_single(self, tile_size: Size) -> bool:
        return self._grid(tile_size) == (1, 1)

    def _measure_span(self, tile_size: Size, num_tiles: int) -> Span:
        rows, columns = self._grid(tile_size)
        grid: dict[str, Any] = {"rows": [[rows]], "cols": [[columns]]}
        if self.images.fine_route:
            grid["tile_fine_mask"] = True
        text = self.processor.replace_image_token(grid, 0)
        if self._is_single(tile_size):
            text = text.removesuffix("\n")  # written by `tokenizer_text`
        ids = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
        return Span(ids, int((ids == self.image_token_id).sum()))

    def frames(self, tile: Image.Image, num_tiles: int = 1) -> list[np.ndarray]:
        if self.tiled and tile.size == (self.images.size.width, self.square):
            return [as_frame(tile)]
        output = self.images(tile, do_rescale=False, do_normalize=False, return_tensors=None, **self.processor_kwargs)
        squares = output["pixel_values"][0].transpose(0, 2, 3, 1)  # as floating-point numbers, whole
        return list(np.ascontiguousarray(squares, dtype=np.uint8))

    def pixel_inputs(self, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        pixels = normalised(channels_first(frames), self.images, dtype)
        used = torch.ones((1, len(frames)), dtype=torch.bool, device=pixels.device)
        inputs = {"pixel_values": pixels[None], "pixel_attention_mask": used}
        return inputs | ({"tile_fine_mask": used[:, 0]} if self.images.fine_route else {})

    def feature_count(self, tile: Tile) -> int:
        return self.square_tokens * len(tile.frame_sizes)

    def model_problem(self, config: PretrainedConfig) -> str | None:
        model: Any = config
        if self.images.fine_route and not model.vision_config.use_fine_route:
            return "the processor has fine_route on, and the model has no fine path (vision_config.use_fine_route)"
        return None
