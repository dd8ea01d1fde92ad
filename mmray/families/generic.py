"""Support for any other processor by general rules: slow, and with one sample per row.

All answers come from the processor itself: run on a blank page of each size it gives the tokens, and in the training
process it makes the pixel inputs from the decoded pages. How the model keeps samples of one row apart is not known, so
bins hold one sample (`packing.mode: none`), and the model computes positions itself. No test of mmray covers the model:
when preparing, a seeded sample of rows is still compared with the processor, which stops the job where the rules do not
hold.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mmray.errors import UserError
from mmray.families.base import Family, PackedRow, RoleMarkers, Size, Span, Tile, as_frame
from mmray.families.gemma4 import STOP_TOKENS, turn_markers
from mmray.families.parts import Parts, parts_by_rules

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""Outputs of a processor that belong to the text and not to the pictures."""

log = logging.getLogger("mmray")


class Generic(Family):
    """A processor that names its image token, and a model that trains on one sample a row."""

    model_types = ()
    processor_classes = ()
    is_verified = False
    pads_prompts = False
    position_rows = 0
    tile_multiple = 1

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        """Binds the family to a processor. Raises UserError for one without an image processor or an image token."""
        name = type(processor).__name__
        if not hasattr(processor, "image_processor") or not hasattr(processor, "image_token"):
            raise UserError(
                f"no model family of mmray serves the processor {name}, and it names no image token: it cannot be used"
            )
        self.placeholder = self.placeholder_unit = str(processor.image_token)
        super().__init__(processor, tiled)
        self.image_token_id = self.placeholder_id
        self.stop_tokens = STOP_TOKENS if self.role_markers else ()
        _warn(name)

    @functools.cached_property
    def media_token_ids(self) -> tuple[int, ...]:
        """Ids of the special tokens that stand for a picture."""
        special = set(self.known_token_ids(self.structure_names))
        return tuple(sorted(special.intersection(self.span(self.dummy_size).token_ids.tolist())))

    @functools.cached_property
    def role_markers(self) -> tuple[RoleMarkers, ...]:
        """The markers of Gemma 4's format, which gemma4_unified writes; none for any other format, because none is
        known."""
        template = self.processor.chat_template or ""
        template = template.get("default", "") if isinstance(template, dict) else template
        return turn_markers() if "<|turn>" in template else ()

    @functools.cached_property
    def structure_names(self) -> tuple[str, ...]:
        """All special tokens, because it is not known which of them the template uses."""
        tokenizer = self.tokenizer
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        return tuple(sorted(added | set(tokenizer.all_special_tokens)))

    @functools.cached_property
    def structure_tokens(self) -> tuple[str, ...]:
        return self.structure_names

    def parts(self, model: PreTrainedModel) -> Parts:
        """The parts that transformers tells of the model; all other modules are its projector.

        Raises UserError where transformers does not tell any.
        """
        return parts_by_rules(model)

    @classmethod
    def by_sample_problem(cls, config: PretrainedConfig) -> str | None:
        return f"no test has shown how a {config.model_type} keeps samples apart"

    def packing_problem(self, config: PretrainedConfig, *, sample_tokens: int, row_tokens: int) -> str | None:
        return self.by_sample_problem(config)

    def _measure_span(self, tile_size: Size, num_tiles: int) -> Span:
        page = Image.new("RGB", tile_size, "white")
        ids = np.asarray(self.process(self.placeholder_unit, [page], add_special_tokens=False)["input_ids"][0])
        return Span(ids.astype(np.int32), int((ids == self.image_token_id).sum()))

    def frames(self, tile: Image.Image, num_tiles: int = 1) -> list[np.ndarray]:
        """The tile itself, as the only frame."""
        return [as_frame(tile)]

    def pixel_inputs(self, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        device = frames[0].device
        pictures = [Image.fromarray(frame.cpu().numpy()) for frame in frames]
        output = self.process(" ".join([self.placeholder_unit] * len(pictures)), pictures, return_tensors="pt")
        return {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in output.items()
            if name not in TEXT_INPUTS
        }

    @property
    def dummy_size(self) -> Size:
        return 64, 64

    def feature_count(self, tile: Tile) -> int:
        return self.span(tile.size).visual_tokens

    def position_ids(self, row: PackedRow) -> Tensor:
        return row.lengths.new_zeros((0, len(row.input_ids)))

    def attention_inputs(self, row: PackedRow, dtype: torch.dtype, config: PretrainedConfig) -> dict[str, Any]:
        """The token types, where the processor gives them, and what all families give."""
        types = (row.input_ids == self.image_token_id).to(torch.int64)[None]
        names = {"token_type_ids", "mm_token_type_ids"}.intersection(self.processor.model_input_names)
        return dict.fromkeys(sorted(names), types) | super().attention_inputs(row, dtype, config)


@functools.cache
def _warn(name: str) -> None:
    log.warning(
        "no model family of mmray serves %s: general rules are used, unverified. One sample a row; "
        "loss: {roles: …} needs loss.boundaries",
        name,
    )
