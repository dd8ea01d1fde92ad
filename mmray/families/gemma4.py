"""Gemma 4: pictures in patches of any grid, resized to use up the image processor's budget of tokens.

Most sizes are causal, and positions keep samples apart. Where `use_bidirectional_attention` is "vision", an image's
tokens attend to each other in the layers with a sliding window, and only there. Then mmray builds the masks
(`mmray.families.attention`), one for each kind of layer, as a single one would lose the window.

Video and audio are not read.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig

from mmray.families.attention import (
    SEEN_WHOLE,
    causal_mask,
    given_mask,
    mask_problem,
    run_numbers,
    sample_numbers,
    seeing_blocks,
    within_window,
)
from mmray.families.base import Family, PackedRow, RoleMarkers, Size, Span, Tile, as_frame, header_ends, normalised
from mmray.families.parts import Parts
from mmray.images import TilingPolicy

STOP_TOKENS = ("<|tool_response>",)
"""The token by which a model of Gemma 4's format stops after a tool call; its templates begin the tool's answer with
it."""


def turn_markers() -> tuple[RoleMarkers, ...]:
    """The role boundaries of Gemma 4's templates.

    The second header is for turns that begin with a line break: the tokenizer makes one token of the two breaks.
    """
    return tuple(
        RoleMarkers(role, f"<|turn>{name}{line_break}", "<turn|>")
        for line_break in header_ends()
        for role, name in (("system", "system"), ("user", "user"), ("assistant", "model"))
    )


class Gemma4(Family):
    """Gemma 4 (no video, no audio): `image_position_ids`; with `use_bidirectional_attention: vision` also masks for its
    two kinds of layers, and then no flash attention."""

    model_types = ("gemma4",)
    processor_classes = ("Gemma4Processor",)
    stop_tokens = STOP_TOKENS
    module_names = Parts(
        vision=("model.vision_tower",),
        projector=("model.embed_vision",),
        embeddings=(
            "model.language_model.embed_tokens",
            "model.language_model.embed_tokens_per_layer",
            "lm_head",
        ),
        audio=("model.audio_tower", "model.embed_audio"),
    )

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        self.placeholder = self.placeholder_unit = processor.image_token
        super().__init__(processor, tiled)
        self.images = processor.image_processor
        self.image_token_id = self.placeholder_id
        self.patch_size = int(self.images.patch_size)
        self.pooling = int(self.images.pooling_kernel_size)
        self.tile_multiple = self.patch_size * self.pooling
        self.max_features = int(self.images.max_soft_tokens)

    @functools.cached_property
    def media_token_ids(self) -> tuple[int, ...]:
        processor = self.processor
        tokens = [
            processor.boi_token, processor.image_token, processor.eoi_token, processor.video_token,
            processor.boa_token, processor.audio_token, processor.eoa_token,
        ]  # fmt: skip
        return tuple(self.known_token_ids([token for token in tokens if token is not None]))

    @functools.cached_property
    def role_markers(self) -> tuple[RoleMarkers, ...]:
        return turn_markers()

    def resolve_tiling(self, policy: TilingPolicy) -> TilingPolicy:
        """Checks a tiling policy. Raises ValueError for tiles or an overview over the image processor's budget of
        tokens."""
        resolved = super().resolve_tiling(policy)
        for size in resolved.fixed_sizes:
            self._check_frame(size)
        return resolved

    @property
    def processor_kwargs(self) -> dict[str, Any]:
        return {"do_resize": False} if self.tiled else {}

    def _pooled(self, frame_size: Size) -> int:
        width, height = frame_size
        return (width // self.tile_multiple) * (height // self.tile_multiple)

    def _check_frame(self, size: Size) -> int:
        """Number of features of a picture that is not resized. Raises ValueError for one that the model cannot take."""
        if any(side % self.tile_multiple for side in size):
            raise ValueError(f"a picture of {size} that is not resized: its sides must divide by {self.tile_multiple}")
        features = self._pooled(size)
        if features > self.max_features:
            raise ValueError(
                f"a tile of {size[0]} x {size[1]} pixels has {features} image tokens, and max_soft_tokens of the image "
                f"processor is {self.max_features}; use smaller tiles"
            )
        return features

    def _measure_span(self, tile_size: Size, num_tiles: int) -> Span:
        if self.tiled or not self.images.do_resize:
            count = self._check_frame(tile_size)
        else:
            width, height = tile_size
            (count,) = self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens
        edges = self.token_id(self.processor.boi_token), self.token_id(self.processor.eoi_token)
        ids = [edges[0], *[self.image_token_id] * count, edges[1]]
        return Span(np.asarray(ids, dtype=np.int32), count)

    def frames(self, tile: Image.Image, num_tiles: int = 1) -> list[np.ndarray]:
        pixels = as_frame(tile)
        if self.tiled or not self.images.do_resize:
            return [pixels]
        resized = self.images.aspect_ratio_preserving_resize(
            pixels.transpose(2, 0, 1),
            patch_size=self.patch_size,
            max_patches=self.max_features * self.pooling**2,
            pooling_kernel_size=self.pooling,
            resample=self.images.resample,
        )
        return [np.ascontiguousarray(resized.transpose(1, 2, 0))]

    def pixel_inputs(self, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """`pixel_values` [frames, patches, patch values] and `image_position_ids` [frames, patches, 2], (column, row):
        as many patches as the budget allows, those that a frame lacks are zero and stand at -1."""
        patch, budget, device = self.patch_size, self.max_features * self.pooling**2, frames[0].device
        pixels = torch.zeros((len(frames), budget, 3 * patch**2), dtype=dtype, device=device)
        places = torch.full((len(frames), budget, 2), -1, dtype=torch.int64, device=device)
        for number, frame in enumerate(frames):
            values = normalised(frame.permute(2, 0, 1)[None], self.images, dtype)[0]
            rows, columns = frame.shape[0] // patch, frame.shape[1] // patch
            cells = values.reshape(3, rows, patch, columns, patch).permute(1, 3, 2, 4, 0)
            pixels[number, : rows * columns] = cells.reshape(rows * columns, -1)
            grid = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
            places[number, : rows * columns] = grid.flip(1)
        return {"pixel_values": pixels, "image_position_ids": places}

    def feature_count(self, tile: Tile) -> int:
        return sum(map(self._pooled, tile.frame_sizes))

    @staticmethod
    def _sees_images_whole(config: PretrainedConfig) -> bool:
        return bool(config.get_text_config().use_bidirectional_attention == "vision")

    @classmethod
    def by_sample_problem(cls, config: PretrainedConfig) -> str | None:
        return SEEN_WHOLE if cls._sees_images_whole(config) else None

    def model_problem(self, config: PretrainedConfig) -> str | None:
        return mask_problem(config) if self._sees_images_whole(config) else None

    def attention_inputs(self, row: PackedRow, dtype: torch.dtype, config: PretrainedConfig) -> dict[str, Any]:
        if not self._sees_images_whole(config):
            return super().attention_inputs(row, dtype, config)
        samples = sample_numbers(row)
        causal = causal_mask(samples)
        images = run_numbers(row.input_ids == self.image_token_id, samples)
        window = config.get_text_config().sliding_window
        masks = {
            "full_attention": causal,
            "sliding_attention": within_window(seeing_blocks(causal, images), window),
        }
        return {"attention_mask": {kind: given_mask(mask, config, dtype) for kind, mask in masks.items()}}
