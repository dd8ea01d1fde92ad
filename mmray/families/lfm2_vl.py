"""LFM2-VL: pictures of any grid of patches; the processor splits large ones and adds the whole picture to the pieces.

Its text model has convolutions among the attention layers, which look back over a few tokens whatever their positions.
So samples are separated in a row by as many padding tokens, which a mask makes zeros for the convolutions, as the
tokens before the beginning of a row are.

There is no PIL image processor for this model: pictures are resized by torchvision, which must be installed.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig
from transformers.masking_utils import create_causal_mask

from mmray.families.base import (
    Family,
    PackedRow,
    RoleMarkers,
    Size,
    Span,
    Tile,
    as_frame,
    header_ends,
    normalised,
    positions_in_sample,
)
from mmray.families.parts import Parts
from mmray.images import TilingPolicy
from mmray.packing.pack import PADDING_SEGMENT

LARGEST_GRID = 10
"""The most rows and columns of pieces that a vocabulary may have tokens for."""


class Lfm2VL(Family):
    """LFM2-VL: padded patches with `pixel_attention_mask` and `spatial_shapes`; between samples padding tokens, as many
    as its convolutions look back over, and a mask for these layers beside that for attention."""

    model_types = ("lfm2_vl",)
    processor_classes = ("Lfm2VlProcessor",)
    module_names = Parts(vision=("model.vision_tower",), projector=("model.multi_modal_projector",))
    sample_gap = 2

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        self.placeholder = self.placeholder_unit = processor.image_token
        super().__init__(processor, tiled)
        self.images = processor.image_processor
        self.image_token_id = self.placeholder_id
        self.tile_multiple = self.images.encoder_patch_size * self.images.downsample_factor

    @functools.cached_property
    def media_token_ids(self) -> tuple[int, ...]:
        processor, numbers = self.processor, range(1, LARGEST_GRID + 1)
        edges = [processor.image_start_token, processor.image_end_token, processor.image_thumbnail_token]
        pieces = [f"<|img_row_{row}_col_{column}|>" for row in numbers for column in numbers]
        return tuple(self.known_token_ids([self.placeholder, *edges, *pieces]))

    @functools.cached_property
    def role_markers(self) -> tuple[RoleMarkers, ...]:
        return tuple(
            RoleMarkers(role, f"<|im_start|>{role}{line_break}", "<|im_end|>")
            for line_break in header_ends()
            for role in ("system", "user", "assistant", "tool")
        )

    # ---------------------------------------------------------------- sizes

    def resolve_tiling(self, policy: TilingPolicy) -> TilingPolicy:
        aligned = policy.aligned(self.tile_multiple) if policy.is_tiled else policy
        for size in aligned.fixed_sizes:
            if math.prod(size) > self._most_pixels:
                raise ValueError(
                    f"a tile of {size[0]} x {size[1]} pixels would be made smaller: this model takes "
                    f"{self.images.max_image_tokens} tokens of {self.tile_multiple} x {self.tile_multiple} pixels; set "
                    "a smaller tile_size or overview"
                )
        return aligned

    @property
    def _most_pixels(self) -> int:
        return int(self.images.max_image_tokens * self.tile_multiple**2)

    @property
    def processor_kwargs(self) -> dict[str, Any]:
        return {"do_image_splitting": False, "min_image_tokens": 1} if self.tiled else {}

    @property
    def _splitting(self) -> dict[str, Any]:
        """The settings that decide whether and how a page is split, as arguments of the image processor's functions."""
        images = self.images
        return {
            "min_tiles": images.min_tiles if self._splits else 1,
            "max_tiles": images.max_tiles if self._splits else 1,
            "tile_size": images.tile_size,
        }

    @property
    def _splits(self) -> bool:
        return bool(self.images.do_image_splitting) and not self.tiled

    @property
    def _limits(self) -> dict[str, Any]:
        images = self.images
        return {
            "min_image_tokens": 1 if self.tiled else images.min_image_tokens,
            "max_image_tokens": images.max_image_tokens,
            "encoder_patch_size": images.encoder_patch_size,
            "downsample_factor": images.downsample_factor,
        }

    def _layout(self, tile_size: Size) -> tuple[int, int, Size]:
        """The rows and columns a page is split into, (1, 1) where it is not split, and the size of the whole after
        resizing."""
        width, height = tile_size
        splitting, limits = self._splitting, self._limits
        whole = self.images.smart_resize(height=height, width=width, **limits)
        if self.tiled and whole != tile_size:
            raise ValueError(f"a tile of {tile_size} would be resized to {whole}; set tile_size")
        del limits["min_image_tokens"]
        too_large = self.images._is_image_too_large(
            height=height, width=width, max_pixels_tolerance=self.images.max_pixels_tolerance, **limits
        )
        rows, columns = 1, 1
        if too_large and splitting["max_tiles"] > 1:
            columns, rows, *_ = self.images._get_grid_layout(height, width, **splitting)
        is_split = rows * columns > 1
        if not is_split or self.images.use_thumbnail:
            patches = math.prod(whole) // self.images.encoder_patch_size**2
            if patches > self._most_patches:  # a strip: its shorter side is made a token wide, its longer one is kept
                raise ValueError(
                    f"{type(self.processor).__name__} makes {patches} patches of a page of {tile_size}, and fills up "
                    f"to {self._most_patches}"
                )
        return rows, columns, whole

    @property
    def _most_patches(self) -> int:
        """Number of patches that every frame is padded to."""
        images = self.images
        piece = (images.tile_size // images.encoder_patch_size) ** 2 if self._splits else 0
        return int(max(images.max_image_tokens * images.downsample_factor**2, piece))

    def _measure_span(self, tile_size: Size, num_tiles: int) -> Span:
        rows, columns, (width, height) = self._layout(tile_size)
        processor = self.processor
        text = processor._build_image_tokens(
            rows, columns, *processor._get_image_num_tokens([height, width]), self.images.use_thumbnail,
            processor.use_image_special_tokens,
        )  # fmt: skip
        ids = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
        return Span(ids, int((ids == self.image_token_id).sum()))

    # ---------------------------------------------------------------- pixels

    def frames(self, tile: Image.Image, num_tiles: int = 1) -> list[np.ndarray]:
        if self.tiled:
            return [as_frame(tile)]
        channels_first = torch.from_numpy(np.array(tile, dtype=np.uint8)).permute(2, 0, 1)
        ((*pieces,), *_), *_ = self.images.resize_and_split(
            channels_first[None], use_thumbnail=self.images.use_thumbnail, resample=self.images.resample,
            max_pixels_tolerance=self.images.max_pixels_tolerance, **self._splitting, **self._limits,
        )  # fmt: skip
        return [piece.permute(1, 2, 0).contiguous().numpy() for piece in pieces]

    def pixel_inputs(self, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        images, patch, device = self.images, self.images.encoder_patch_size, frames[0].device
        shapes = torch.tensor([frame.shape[:2] for frame in frames], dtype=torch.int64) // patch
        patches = [
            frame.reshape(rows, patch, columns, patch, 3).permute(0, 2, 4, 1, 3).flatten(0, 1)
            for frame, (rows, columns) in zip(frames, shapes.tolist())
        ]
        counts = shapes.prod(1)
        used = (torch.arange(self._most_patches) < counts[:, None]).to(device)
        pixels = torch.zeros((*used.shape, 3 * patch * patch), dtype=dtype, device=device)
        values = normalised(torch.cat(patches), images, dtype).permute(0, 2, 3, 1).flatten(1)  # channels last
        pixels[used] = values
        return {
            "pixel_values": pixels,
            "pixel_attention_mask": used.to(torch.int32),
            "spatial_shapes": shapes.to(device),
        }

    def feature_count(self, tile: Tile) -> int:
        """Number of features of a tile, of which the projector makes one for each square of patches."""
        patch, square = self.images.encoder_patch_size, self.images.downsample_factor
        return sum(
            math.ceil(width // patch / square) * math.ceil(height // patch / square)
            for width, height in tile.frame_sizes
        )

    # ---------------------------------------------------------------- the model

    @classmethod
    def by_sample_problem(cls, config: PretrainedConfig) -> str | None:
        return _untested(config.get_text_config())

    def packing_problem(self, config: PretrainedConfig, *, sample_tokens: int, row_tokens: int) -> str | None:
        text: Any = config.get_text_config()
        if problem := _untested(text):
            return problem
        if text.conv_bias:
            return "conv_bias makes the padding between samples other than the zeros before a row"
        if text.conv_L_cache - 1 > self.sample_gap:
            return (
                f"its convolutions look back over {text.conv_L_cache - 1} tokens (conv_L_cache), and "
                f"{self.sample_gap} stand between samples"
            )
        return None

    def attention_inputs(self, row: PackedRow, dtype: torch.dtype, config: PretrainedConfig) -> dict[str, Any]:
        """One mask for each kind of layer.

        For attention it is the one that transformers makes of the positions, in the form that the attention
        implementation takes; for convolutions bool [1, L], False outside samples.
        """
        text = config.get_text_config()
        like = torch.empty((1, len(row.input_ids), 1), dtype=dtype, device=row.input_ids.device)
        attention = create_causal_mask(
            text, inputs_embeds=like, attention_mask=None, past_key_values=None,
            position_ids=positions_in_sample(row.lengths)[None],
        )  # fmt: skip
        masks = {"full_attention": attention, "conv": (row.segment_ids != PADDING_SEGMENT)[None]}
        return {"attention_mask": masks} | super().attention_inputs(row, dtype, config)


def _untested(text: PretrainedConfig) -> str | None:
    """The reason why it is not known whether a text model keeps samples apart; None for one that a test has packed."""
    if text.model_type == "lfm2":
        return None
    return f"no test has shown how its text model, a {text.model_type}, keeps samples apart"
