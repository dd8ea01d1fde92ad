"""Pixtral and the models that read pictures with its vision tower: patches of any grid, tokens row by row.

The first Pixtral is a LLaVA with another vision tower (`model_type` llava), Mistral Small 3.1 and later are Mistral 3,
which merge squares of patches; both write a token at the end of each row of patches. LightOnOCR writes none.
"""

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers.image_utils import ChannelDimension
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

from mmray.families.base import RoleMarkers, Size, Span, Tile, as_frame, normalised
from mmray.families.parts import Parts
from mmray.families.text_models import OnTextModel


class PixtralVision(OnTextModel):
    """The sizes and pixels of models with Pixtral's vision tower."""

    least_features = 2  # Mistral 3 takes a lone feature for a vector, and raises

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        self.placeholder = self.placeholder_unit = processor.image_token
        super().__init__(processor, tiled)
        self.images = processor.image_processor
        self.image_token_id = self.placeholder_id
        self.tile_multiple = processor.patch_size * processor.spatial_merge_size

    @functools.cached_property
    def media_token_ids(self) -> tuple[int, ...]:
        processor = self.processor
        tokens = [processor.image_token, processor.image_break_token, processor.image_end_token]
        return tuple(self.known_token_ids(tokens))

    @property
    def processor_kwargs(self) -> dict[str, Any]:
        return {"do_resize": False, "do_center_crop": False} if self.tiled else {}

    @property
    @abstractmethod
    def _resize_multiple(self) -> tuple[int, int]:
        """The (height, width) of which the sides of a resized picture are multiples."""

    def _frame_size(self, tile_size: Size) -> Size:
        if self.tiled:
            return tile_size
        size = self._resized(tile_size) if self.images.do_resize else tile_size
        if self.images.do_center_crop and all(size):
            return self.images.crop_size.width, self.images.crop_size.height
        return size

    def _resized(self, tile_size: Size) -> Size:
        """The size of a picture after resizing. A narrow strip may come out without width or height."""
        width, height = tile_size
        limit = self.images.size
        rows, columns = get_resize_output_image_size(
            # The rule reads the shape alone: a view of one byte stands for the page.
            np.broadcast_to(np.uint8(0), (3, height, width)),
            size=(limit.longest_edge or limit.height, limit.longest_edge or limit.width),
            patch_size=self._resize_multiple,
            input_data_format=ChannelDimension.FIRST,
        )
        return columns, rows

    def _grid(self, frame_size: Size) -> tuple[int, int]:
        """The (rows, columns) of tokens of a picture."""
        width, height = frame_size
        return height // self.tile_multiple, width // self.tile_multiple

    def _measure_span(self, tile_size: Size, num_tiles: int) -> Span:
        rows, columns = self._grid(self._frame_size(tile_size))
        if not rows or not columns:
            raise ValueError(f"{type(self.processor).__name__} makes nothing of a page of {tile_size}")
        return Span(np.asarray(self._tokens(rows, columns), dtype=np.int32), rows * columns)

    @abstractmethod
    def _tokens(self, rows: int, columns: int) -> list[int]:
        """The token ids of a picture with this many rows and columns of features."""

    def frames(self, tile: Image.Image, num_tiles: int = 1) -> list[np.ndarray]:
        if self.tiled:
            return [as_frame(tile)]
        height, width = self._resize_multiple
        output = self.images(
            tile, do_rescale=False, do_normalize=False, do_pad=False, return_tensors=None,
            patch_size={"height": height, "width": width}, **self.processor_kwargs,
        )  # fmt: skip
        return [np.ascontiguousarray(output["pixel_values"][0].transpose(1, 2, 0))]

    def pixel_inputs(self, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        sizes = torch.tensor([frame.shape[:2] for frame in frames], dtype=torch.int64)
        height, width = sizes.amax(0).tolist()
        pixels = [
            pad(
                normalised(frame.permute(2, 0, 1)[None], self.images, dtype)[0],
                (0, width - frame.shape[1], 0, height - frame.shape[0]),
            )
            for frame in frames
        ]
        return {"pixel_values": torch.stack(pixels), "image_sizes": sizes.to(frames[0].device)}

    @property
    def dummy_size(self) -> Size:
        return self.least_features * self.tile_multiple, self.tile_multiple

    def feature_count(self, tile: Tile) -> int:
        grids = map(self._grid, tile.frame_sizes)
        return sum(rows * columns for rows, columns in grids)


class Pixtral(PixtralVision):
    """Pixtral (a LLaVA with Pixtral's vision tower) and Mistral 3: pictures zero-padded to the row's largest, with
    `image_sizes`.

    `[/INST]` ends the user's turn and opens the assistant's, so it is never trained.
    """

    model_types = ("llava", "mistral3")
    processor_classes = ("PixtralProcessor",)
    module_names = Parts(vision=("model.vision_tower",), projector=("model.multi_modal_projector",))

    @functools.cached_property
    def role_markers(self) -> tuple[RoleMarkers, ...]:
        end = self.tokenizer.eos_token
        markers = [
            RoleMarkers("user", "[INST]", "[/INST]", include_end=False),
            RoleMarkers("assistant", "[/INST]", end),
        ]
        if "[SYSTEM_PROMPT]" in self._vocabulary:  # from V7 on; before, templates write it into the last user turn
            markers.append(RoleMarkers("system", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"))
        if "[TOOL_RESULTS]" in self._vocabulary:
            # The results of several calls follow one another, and then the assistant goes on.
            markers += [
                RoleMarkers("tool", start, "[/TOOL_RESULTS]", include_end=False)
                for start in ("[TOOL_RESULTS]", "[/TOOL_RESULTS][TOOL_RESULTS]")
            ]
            markers.append(RoleMarkers("assistant", "[/TOOL_RESULTS]", end))
        return tuple(markers)

    @property
    def _resize_multiple(self) -> tuple[int, int]:
        return self.tile_multiple, self.tile_multiple

    def _tokens(self, rows: int, columns: int) -> list[int]:
        row = [self.image_token_id] * columns + [self.token_id(self.processor.image_break_token)]
        return (row * rows)[:-1] + [self.token_id(self.processor.image_end_token)]


class LightOnOcr(PixtralVision):
    """LightOnOCR: Pixtral's vision tower before a Qwen3; inputs as Pixtral."""

    model_types = ("lighton_ocr",)
    processor_classes = ("LightOnOcrProcessor",)
    module_names = Parts(vision=("model.vision_encoder",), projector=("model.vision_projection",))

    @property
    def _resize_multiple(self) -> tuple[int, int]:
        """The size of a patch, although a token stands for a square of them: an odd row or column of patches gives no
        token."""
        patch = self.images.patch_size
        return (patch, patch) if isinstance(patch, int) else (patch["height"], patch["width"])

    def _tokens(self, rows: int, columns: int) -> list[int]:
        return [self.image_token_id] * (rows * columns)
