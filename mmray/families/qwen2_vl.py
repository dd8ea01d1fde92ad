"""Qwen2-VL and Qwen2.5-VL: patches of any grid, one token for each merged square of patches, M-RoPE positions."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmray.families.base import Family, RoleMarkers, Size, Span, normalised, positions_in_sample

MEDIA_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


class Qwen2VL(Family):
    """Qwen2-VL and Qwen2.5-VL (images; video is not read)."""

    model_types = ("qwen2_vl", "qwen2_5_vl")
    processor_classes = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor")
    rotary_sections = True
    placeholder = "<|image_pad|>"
    placeholder_unit = "<|vision_start|><|image_pad|><|vision_end|>"

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        super().__init__(processor, tiled)
        self.images = processor.image_processor
        self.image_token_id = self.placeholder_id
        self.tile_multiple = self.images.patch_size * self.images.merge_size

    @functools.cached_property
    def media_token_ids(self) -> tuple[int, ...]:
        return tuple(self.known_token_ids(MEDIA_TOKENS))

    @functools.cached_property
    def role_markers(self) -> tuple[RoleMarkers, ...]:
        # The second header is for turns that begin with a line break: the tokenizer makes one token of the two breaks.
        return tuple(
            RoleMarkers(role, f"<|im_start|>{role}{line_break}", "<|im_end|>")
            for line_break in ("\n", "")
            for role in ("system", "user", "assistant")
        )

    @property
    def processor_kwargs(self) -> dict[str, Any]:
        return {"do_resize": False} if self.tiled else {}

    def _measure_span(self, tile_size: Size) -> Span:
        if self.tiled:
            (count,) = self.feature_counts([tile_size])
        else:
            width, height = tile_size
            (count,) = self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens
        return Span(np.full(count, self.image_token_id, dtype=np.int32), count)

    def frames(self, tile: Image.Image) -> list[np.ndarray]:
        if self.tiled:
            return [np.asarray(tile, dtype=np.uint8)]
        channels_first = np.asarray(tile, dtype=np.uint8).transpose(2, 0, 1)
        resized = self.images.resize(
            channels_first, size=self.images.size, resample=self.images.resample, factor=self.tile_multiple
        )
        return [np.ascontiguousarray(resized.transpose(1, 2, 0))]

    def pixel_inputs(self, frames: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        patch, merge, time = self.images.patch_size, self.images.merge_size, self.images.temporal_patch_size
        patches, grids = [], []
        for frame in frames:
            rows, columns = frame.shape[0] // patch, frame.shape[1] // patch
            cells = frame.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
            # Merged squares in reading order, inside each its patches, inside each channel, row, column.
            patches.append(cells.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, patch, patch))
            grids.append((1, rows, columns))
        pixels = normalised(torch.cat(patches), self.images, dtype)
        pixels = pixels.unsqueeze(2).expand(-1, -1, time, -1, -1).flatten(1)  # the same picture at all times of a patch
        grid = torch.tensor(grids, dtype=torch.int64, device=frames[0].device)
        return {"pixel_values": pixels, "image_grid_thw": grid}

    @property
    def dummy_frame(self) -> np.ndarray:
        return np.full((self.tile_multiple, self.tile_multiple, 3), 255, dtype=np.uint8)

    def feature_counts(self, frame_sizes: Sequence[Size]) -> list[int]:
        return [(width // self.tile_multiple) * (height // self.tile_multiple) for width, height in frame_sizes]

    def position_ids(self, input_ids: Tensor, lengths: Tensor, frame_sizes: Sequence[Size]) -> Tensor:
        """[4, 1, L]. An image of r × c tokens counts rows and columns from the position it stands at and moves the
        text after it on by max(r, c) (the rule of `get_rope_index`), here for all images of the row at once."""
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
        lengths = lengths.to(torch.int64)
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
        return torch.stack([within, time_, height, width])[:, None]
