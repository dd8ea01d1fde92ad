"""Idefics3 and SmolVLM (granite-docling-258M is an Idefics3): square frames of one size, markers around each.

Untiled, the processor itself splits a page into rows and columns of frames and adds an overview. Under an mmray tiling
policy every tile is one frame of that size, so its splitting and resizing are turned off.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

from mmray.families.base import Family, RoleMarkers, Size, Span, Tile, as_frame, channels_first, normalised
from mmray.families.parts import Parts
from mmray.images import TilingPolicy


class Idefics3(Family):
    """Idefics3, SmolVLM and the document models built on them."""

    model_types = ("idefics3", "smolvlm")
    processor_classes = ("Idefics3Processor", "SmolVLMProcessor")
    module_names = Parts(
        vision=("model.vision_model",),
        projector=("model.connector",),
        language=("model.text_model",),
        embeddings=("model.text_model.embed_tokens", "lm_head"),
    )
    placeholder = "<image>"
    placeholder_unit = "<image>"

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        super().__init__(processor, tiled)
        self.images = processor.image_processor
        self.image_token_id = self.placeholder_id
        self.frame_side = int(self.images.max_image_size["longest_edge"])
        self.tile_multiple = self.frame_side

    @functools.cached_property
    def _markers(self) -> tuple[str, str]:
        overview = getattr(self.processor, "global_image_tag", None) or self.processor.global_image_token
        return self.processor.fake_image_token, overview

    @functools.cached_property
    def media_token_ids(self) -> tuple[int, ...]:
        cells = [f"<row_{row}_col_{column}>" for row in range(1, 11) for column in range(1, 11)]
        return tuple(self.known_token_ids([self.placeholder, *self._markers, "<video>", *cells]))

    @functools.cached_property
    def role_markers(self) -> tuple[RoleMarkers, ...]:
        if "<|start_of_role|>" in self._vocabulary:
            end = self.tokenizer.eos_token
            return tuple(
                RoleMarkers(role, f"<|start_of_role|>{role}<|end_of_role|>", end)
                for role in ("system", "user", "assistant", "tool")
            )
        return tuple(
            RoleMarkers(role.lower(), f"{role}:", "<end_of_utterance>")
            for role in ("System", "User", "Assistant", "Tool")
        )

    def resolve_tiling(self, policy: TilingPolicy) -> TilingPolicy:
        return policy.with_fixed_tiles((self.frame_side, self.frame_side)) if policy.is_tiled else policy

    @property
    def processor_kwargs(self) -> dict[str, Any]:
        return {"do_image_splitting": False, "do_resize": False} if self.tiled else {}

    def _splits(self, tile_size: Size) -> tuple[int, int]:
        """The (rows, columns) into which the processor splits a page; (0, 0) for a single frame."""
        if self.tiled or not self.images.do_image_splitting:
            return 0, 0
        width, height = tile_size
        if self.images.do_resize:
            # The rule reads the shape alone: a view of one byte stands for the page.
            page = np.broadcast_to(np.uint8(0), (3, height, width))
            height, width = get_resize_output_image_size(page, resolution_max_side=self.images.size["longest_edge"])
        side, ratio = self.frame_side, width / height
        if width >= height:
            columns = math.ceil(width / side)
            rows = math.ceil(int(columns * side / ratio) / side)
        else:
            rows = math.ceil(height / side)
            columns = math.ceil(int(rows * side * ratio) / side)
        if not rows or not columns:  # a page a pixel wide, whose width in the processor's arithmetic comes out below 1
            raise ValueError(f"{type(self.processor).__name__} makes nothing of a page of {tile_size}")
        return (rows, columns) if max(rows, columns) > 1 else (0, 0)

    def _measure_span(self, tile_size: Size, num_tiles: int) -> Span:
        rows, columns = self._splits(tile_size)
        edge, overview = self._markers
        feature = self.placeholder * self.processor.image_seq_len
        cells = "".join(
            "".join(f"{edge}<row_{row}_col_{column}>{feature}" for column in range(1, columns + 1)) + "\n"
            for row in range(1, rows + 1)
        )
        text = f"{cells}\n" if cells else ""
        ids = self.tokenizer(f"{text}{edge}{overview}{feature}{edge}", add_special_tokens=False)["input_ids"]
        return Span(np.asarray(ids, dtype=np.int32), (rows * columns + 1) * self.processor.image_seq_len)

    def frames(self, tile: Image.Image, num_tiles: int = 1) -> list[np.ndarray]:
        if self.tiled and tile.size == (self.frame_side, self.frame_side):
            return [as_frame(tile)]
        output = self.images(
            tile, do_rescale=False, do_normalize=False, do_pad=False, return_tensors=None, **self.processor_kwargs
        )
        return [np.ascontiguousarray(frame.transpose(1, 2, 0)) for frame in output["pixel_values"][0]]

    def pixel_inputs(self, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        pixels = normalised(channels_first(frames), self.images, dtype)
        mask = torch.ones(pixels[:, 0].shape, dtype=torch.int64, device=pixels.device)
        return {"pixel_values": pixels[None], "pixel_attention_mask": mask[None]}

    def feature_count(self, tile: Tile) -> int:
        return self.processor.image_seq_len * len(tile.frame_sizes)
