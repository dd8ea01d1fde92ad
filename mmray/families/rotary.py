"""The base of families with M-RoPE: pictures of any size on a grid of patches, and positions with rows and columns.

A picture gets one token for each square of patches that the model merges.

Qwen's, GLM's and PaddleOCR's processors and `get_rope_index` are one design. They differ in the rule of sizes, which is
asked of each processor, in the order of patches, and in their tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig

from mmray.families.base import Family, PackedRow, Size, Span, Tile, as_frame, normalised, positions_in_sample


class RotaryFamily(Family):
    """A family with M-RoPE. A subclass names its tokens and the markers of its template."""

    position_rows = 4
    media_tokens: ClassVar[tuple[str, ...]]
    """Tokens that stand for images, video and audio; those that the vocabulary lacks are skipped."""

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        super().__init__(processor, tiled)
        self.images = processor.image_processor
        self.image_token_id = self.placeholder_id
        self.tile_multiple = self.images.patch_size * self.images.merge_size
        self.resizes = self.images.do_resize and not tiled

    @functools.cached_property
    def media_token_ids(self) -> tuple[int, ...]:
        return tuple(self.known_token_ids(self.media_tokens))

    @property
    def processor_kwargs(self) -> dict[str, Any]:
        return {"do_resize": False} if self.tiled else {}

    def model_problem(self, config: PretrainedConfig) -> str | None:
        for name, ours in (("patch_size", self.images.patch_size), ("spatial_merge_size", self.images.merge_size)):
            theirs = getattr(config.vision_config, name, ours)
            if ours != theirs:
                setting = {"spatial_merge_size": "merge_size"}.get(name, name)
                return (
                    f"vision_config.{name} is {theirs}, {setting} of the image processor is {ours}; make them "
                    "the same, or set model.processor to the model's own"
                )
        return super().model_problem(config)

    # ---------------------------------------------------------------- sizes

    def _measure_span(self, tile_size: Size, num_tiles: int) -> Span:
        count = self._resized_tokens(tile_size) if self.resizes else self._merged(tile_size)
        return Span(np.full(count, self.image_token_id, dtype=np.int32), count)

    def _resized_tokens(self, tile_size: Size) -> int:
        """Number of tokens of a tile that the processor resizes, by the processor's own rule."""
        width, height = tile_size
        return int(self.images.get_number_of_image_patches(height, width)) // self.images.merge_size**2

    def _merged(self, frame_size: Size) -> int:
        """Number of tokens of a frame: merged squares of patches. Raises ValueError where they do not fill it."""
        width, height = frame_size
        side = self.tile_multiple
        if width % side or height % side:
            raise ValueError(f"{type(self.processor).__name__} takes sides that are multiples of {side} pixels")
        return (width // side) * (height // side)

    # ---------------------------------------------------------------- pixels

    @property
    def resize_options(self) -> dict[str, Any]:
        """Arguments of the image processor's `resize` in addition to sizes."""
        return {}

    def frames(self, tile: Image.Image, num_tiles: int = 1) -> list[np.ndarray]:
        page = as_frame(tile)
        if not self.resizes:
            return [page]
        resized = self.images.resize(
            page.transpose(2, 0, 1), size=self.images.size, resample=self.images.resample, factor=self.tile_multiple,
            **self.resize_options,
        )  # fmt: skip
        return [np.ascontiguousarray(resized.transpose(1, 2, 0))]

    def pixel_inputs(self, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        size = self.images.patch_size
        patches = normalised(torch.cat([self.patches(frame) for frame in frames]), self.images, dtype)
        grids = [(1, frame.shape[0] // size, frame.shape[1] // size) for frame in frames]
        grid = torch.tensor(grids, dtype=torch.int64).to(frames[0].device)
        return {"pixel_values": self.timed(patches), "image_grid_thw": grid}

    def patches(self, frame: Tensor) -> Tensor:
        """The patches of a frame: uint8 [height, width, 3] becomes [patches, 3, side, side].

        Merged squares stand in reading order, and the patches inside each of them, too.
        """
        size, merge = self.images.patch_size, self.images.merge_size
        rows, columns = frame.shape[0] // (size * merge), frame.shape[1] // (size * merge)
        cells = frame.reshape(rows, merge, size, columns, merge, size, 3)
        return cells.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, size, size)

    def timed(self, patches: Tensor) -> Tensor:
        """Patches [n, 3, side, side] in the form that the model takes, [n, 3 * times * side * side]: the picture is the
        same at all times of a patch."""
        return patches.unsqueeze(2).expand(-1, -1, self.images.temporal_patch_size, -1, -1).flatten(1)

    def feature_count(self, tile: Tile) -> int:
        return sum(map(self._merged, tile.frame_sizes))

    # ---------------------------------------------------------------- positions

    def position_ids(self, row: PackedRow) -> Tensor:
        """M-RoPE positions, int64 [4, L]: text, time, height and width (the rule of `get_rope_index`).

        The tokens of an image with r rows and c columns count both from the position p at which the image stands. The
        text after it goes on at p + max(r, c), which saves r · c - max(r, c) positions. A sample of two words, an image
        of 2 × 3 tokens and one more word:

            token    word  word  img  img  img  img  img  img  word
            text        0     1    2    3    4    5    6    7     8
            time        0     1    2    2    2    2    2    2     5
            height      0     1    2    2    2    3    3    3     5
            width       0     1    2    3    4    2    3    4     5

        All images of the row are computed at once.
        """
        input_ids, lengths = row.input_ids, row.lengths
        frame_sizes = [size for tile in row.tiles for size in tile.frame_sizes]
        device = input_ids.device
        within = positions_in_sample(lengths)
        grid = torch.tensor(frame_sizes, dtype=torch.int64).reshape(-1, 2).to(device) // self.tile_multiple
        columns, rows = grid[:, 0], grid[:, 1]
        counts = rows * columns
        visual = (input_ids == self.image_token_id).nonzero().flatten()
        total = len(visual)
        first = visual[counts.cumsum(0) - counts] if len(counts) else visual
        saved = counts - torch.maximum(rows, columns)

        # Positions saved by all images that ended before a token, less those saved before its sample began.
        saved_after = torch.zeros(len(input_ids) + 1, dtype=torch.int64, device=device)
        saved_after.scatter_add_(0, first + counts, saved)
        saved_before = saved_after[:-1].cumsum(0)
        at_start = saved_before[lengths.cumsum(0) - lengths]
        text = within - (saved_before - torch.repeat_interleave(at_start, lengths, output_size=len(input_ids)))

        image = torch.repeat_interleave(torch.arange(len(counts), device=device), counts, output_size=total)
        inside = torch.arange(total, device=device) - (counts.cumsum(0) - counts)[image]
        base = text[first][image]
        time_, height, width = text.clone(), text.clone(), text.clone()
        time_[visual] = base
        height[visual] = base + inside // columns[image]
        width[visual] = base + inside % columns[image]
        return torch.stack([within, time_, height, width])

    # ---------------------------------------------------------------- the model

    def packing_problem(self, config: PretrainedConfig, *, sample_tokens: int, row_tokens: int) -> str | None:
        kind = config.get_text_config().rope_parameters["rope_type"]
        if kind in ("dynamic", "longrope"):
            return f"its rope_type {kind} turns all samples of a row by the longest one"
        return None
