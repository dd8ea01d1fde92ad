"""Gemma 3: pictures of one size with a fixed number of tokens, which attend to each other in both directions.

So a packed row needs masks built by mmray (`mmray.families.attention`), one for the layers with a sliding window and
one for the others, and no `token_type_ids`. No window limits how far an image's tokens attend ahead; backward they
attend as far as any token.

The processor writes two line breaks before and after an image. With the text beside them they may merge into other
tokens (three breaks are one token of Gemma), so they belong to the text and not to the image's span.

Pan and scan cannot be set in the processor's files: transformers 5.23 reads it from the call alone. Tiling is the way
to show details to the model.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
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
from mmray.families.base import PackedRow, RoleMarkers, Size, Span, header_ends
from mmray.families.one_size import OneSize
from mmray.families.parts import Parts


class GemmaText(OneSize):
    """The turns of Gemma 3 and Gemma 3n, and the text they have around images."""

    @functools.cached_property
    def media_token_ids(self) -> tuple[int, ...]:
        tokenizer = self.tokenizer
        return tuple(self.known_token_ids([tokenizer.boi_token, tokenizer.image_token, tokenizer.eoi_token]))

    @functools.cached_property
    def role_markers(self) -> tuple[RoleMarkers, ...]:
        """The markers of user and model turns. A system message stands at the head of the first user turn."""
        return tuple(
            RoleMarkers(role, f"<start_of_turn>{name}{line_break}", "<end_of_turn>")
            for line_break in header_ends()
            for role, name in (("user", "user"), ("assistant", "model"))
        )

    def tokenizer_text(self, text: str, tile_sizes: Sequence[Size] = ()) -> str:
        return text.replace(self.placeholder, f"\n\n{self.placeholder}\n\n")

    def _measure_span(self, tile_size: Size, num_tiles: int) -> Span:
        tokenizer = self.tokenizer
        ids = [tokenizer.boi_token_id, *[self.image_token_id] * self.features, tokenizer.eoi_token_id]
        return Span(np.asarray(ids, dtype=np.int32), self.features)


class Gemma3(GemmaText):
    """Gemma 3: masks for its two kinds of layers, in which an image's tokens attend to each other; no flash
    attention."""

    model_types = ("gemma3",)
    processor_classes = ("Gemma3Processor",)
    module_names = Parts(vision=("model.vision_tower",), projector=("model.multi_modal_projector",))

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        self.placeholder = self.placeholder_unit = processor.boi_token
        super().__init__(processor, tiled)
        self.image_token_id = int(self.tokenizer.image_token_id)

    @property
    def frame_kwargs(self) -> dict[str, Any]:
        return {"do_pan_and_scan": False}

    @classmethod
    def by_sample_problem(cls, config: PretrainedConfig) -> str | None:
        return SEEN_WHOLE

    def model_problem(self, config: PretrainedConfig) -> str | None:
        return mask_problem(config)

    def attention_inputs(self, row: PackedRow, dtype: torch.dtype, config: PretrainedConfig) -> dict[str, Any]:
        text = config.get_text_config()
        samples = sample_numbers(row)
        images = run_numbers(row.input_ids == self.image_token_id, samples)
        visible = seeing_blocks(causal_mask(samples), images)
        masks = {"full_attention": given_mask(visible, config, dtype)}
        if "sliding_attention" in text.layer_types:
            masks["sliding_attention"] = given_mask(within_window(visible, text.sliding_window), config, dtype)
        return {"attention_mask": masks}
