"""Llama 3.2 Vision: one token for a picture; the text attends to the pictures through cross-attention layers.

The processor spreads a page over a canvas of up to four squares, padded with black. The vision tower always gets four
squares for a picture, so each picture costs it the same, whatever its size, and is one visual token here.

Rows of several samples would be wrong: a token before the first image of its row attends to all images of the row in
transformers' cross-attention (its mask is emptied, not closed). In a row of one sample these are the sample's own, as
in pretraining; a sample without images would attend to its neighbours'. For the same reason a row without any image
cannot run the vision tower beside ranks whose rows have some: its tokens would attend to the dummy picture.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios
from transformers.models.mllama.processing_mllama import build_string_from_input

from mmray.families.base import Family, PackedRow, RoleMarkers, Size, Span, Tile, as_frame, header_ends, normalised
from mmray.families.parts import Parts
from mmray.images import TilingPolicy

HEADERS = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}
"""The name that the chat template writes for each role."""


class Mllama(Family):
    """Llama 3.2 Vision: one sample a row, with `aspect_ratio_ids`, `aspect_ratio_mask` and `cross_attention_mask`; rows
    without an image are refused."""

    model_types = ("mllama",)
    processor_classes = ("MllamaProcessor",)
    module_names = Parts(vision=("model.vision_model",), projector=("model.multi_modal_projector",))
    takes_text_only = False
    pads_prompts = False
    looks_ahead = True  # what no token of a row of the mask may see is not masked in its attention

    def embedding_rows(self, config: PretrainedConfig) -> int:
        """Number of token ids with an embedding: eight more than the vocabulary, which the head does not have."""
        return super().embedding_rows(config) + 8

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        self.placeholder = self.placeholder_unit = processor.image_token
        super().__init__(processor, tiled)
        self.images = processor.image_processor
        self.image_token_id = self.placeholder_id
        self.square = int(self.images.size.height)
        self.tile_multiple = self.square

    @functools.cached_property
    def media_token_ids(self) -> tuple[int, ...]:
        return (self.image_token_id,)

    @functools.cached_property
    def role_markers(self) -> tuple[RoleMarkers, ...]:
        return tuple(
            RoleMarkers(role, f"<|start_header_id|>{header}<|end_header_id|>{line_breaks}", "<|eot_id|>")
            for line_breaks in header_ends("\n\n")
            for role, header in HEADERS.items()
        )

    def tokenizer_text(self, text: str, tile_sizes: Sequence[Size] = ()) -> str:
        """Rendered text with the begin-of-text token, which the processor writes after the images that a text begins
        with."""
        return str(build_string_from_input(text, self.tokenizer.bos_token, self.placeholder))

    def resolve_tiling(self, policy: TilingPolicy) -> TilingPolicy:
        """The policy with tiles of whole squares. As many as the processor allows are pasted on a canvas of their own
        size."""
        if not policy.is_tiled:
            return policy
        if policy.native_resolution:
            raise ValueError(
                f"native_resolution: this model takes tiles of at most {self.images.max_image_tiles} squares of "
                f"{self.square} pixels; set tile_size instead"
            )
        aligned = policy.aligned(self.square)
        for width, height in aligned.fixed_sizes:
            squares = (width // self.square) * (height // self.square)
            if squares > self.images.max_image_tiles:
                raise ValueError(
                    f"a tile of {width} x {height} pixels has {squares} squares of {self.square}, and this model takes "
                    f"{self.images.max_image_tiles}; set a smaller tile_size or overview"
                )
        return aligned

    def _measure_span(self, tile_size: Size, num_tiles: int) -> Span:
        return Span(np.asarray([self.image_token_id], dtype=np.int32), 1)

    def frames(self, tile: Image.Image, num_tiles: int = 1) -> list[np.ndarray]:
        """The canvas with the page on it, as the only frame."""
        if self.tiled:
            return [as_frame(tile)]
        channels_first = as_frame(tile).transpose(2, 0, 1)
        size = {"height": self.square, "width": self.square}
        resized, grid = self.images.resize(
            channels_first, size=self.images.size, max_image_tiles=self.images.max_image_tiles,
            resample=self.images.resample,
        )  # fmt: skip
        canvas = self.images.pad(resized, size=size, aspect_ratio=grid)
        return [np.ascontiguousarray(canvas.transpose(1, 2, 0))]

    def _grid(self, frame_size: Size) -> tuple[int, int]:
        """The (rows, columns) of squares on a canvas."""
        return frame_size[1] // self.square, frame_size[0] // self.square

    def pixel_inputs(self, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        device, side, most = frames[0].device, self.square, self.images.max_image_tiles
        known = get_all_supported_aspect_ratios(most)
        pixels = torch.zeros((len(frames), most, 3, side, side), dtype=dtype, device=device)
        kinds, counts = [], []
        for number, frame in enumerate(frames):
            rows, columns = self._grid((frame.shape[1], frame.shape[0]))
            squares = frame.reshape(rows, side, columns, side, 3).permute(0, 2, 4, 1, 3).flatten(0, 1)
            pixels[number, : rows * columns] = normalised(squares, self.images, dtype)
            kinds.append(known.index((rows, columns)) + 1)
            counts.append(rows * columns)
        used = torch.arange(most) < torch.tensor(counts)[:, None]
        return {
            "pixel_values": pixels[None],
            "aspect_ratio_ids": torch.tensor([kinds], dtype=torch.int64, device=device),
            "aspect_ratio_mask": used[None].to(device, torch.int64),
        }

    def feature_count(self, tile: Tile) -> int:
        return 1

    @classmethod
    def by_sample_problem(cls, config: PretrainedConfig) -> str | None:
        return "its cross-attention layers take a mask"

    def packing_problem(self, config: PretrainedConfig, *, sample_tokens: int, row_tokens: int) -> str | None:
        return (
            "a token before the first image of its row looks at every image of the row through the cross-attention "
            "layers, also at those of other samples"
        )

    def attention_inputs(self, row: PackedRow, dtype: torch.dtype, config: PretrainedConfig) -> dict[str, Tensor]:
        """The cross-attention mask, int64 [1, L, images, squares], as the processor's.

        Tokens attend to an image from its own token on, up to the next image. Of images without text between them, each
        is attended to up to where the last one's text ends.
        """
        length = len(row.input_ids)
        places = (row.input_ids == self.image_token_id).nonzero().flatten().tolist()
        stops = [*places[1:], length]
        for number in reversed(range(len(places) - 1)):
            if stops[number] == places[number] + 1:
                stops[number] = stops[number + 1]
        most = self.images.max_image_tiles
        visible = torch.zeros((1, length, len(places), most), dtype=torch.int64, device=row.input_ids.device)
        for number, (start, stop, tile) in enumerate(zip(places, stops, row.tiles, strict=True)):
            ((rows, columns),) = map(self._grid, tile.frame_sizes)
            visible[0, start:stop, number, : rows * columns] = 1
        return {"cross_attention_mask": visible}

    def prompt_inputs(
        self, input_ids: Tensor, mask: Tensor, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype,
        model: PreTrainedModel,
    ) -> dict[str, Any]:  # fmt: skip
        """The inputs of one prompt, with the mask by which its tokens look at the images before them."""
        inputs = super().prompt_inputs(input_ids, mask, tiles, frames, dtype, model)
        if not tiles:
            return inputs
        lengths = torch.tensor([input_ids.shape[1]], device=input_ids.device)
        row = PackedRow(input_ids[0], lengths, torch.zeros_like(input_ids[0]), tuple(tiles))
        return inputs | self.attention_inputs(row, dtype, model.config)
