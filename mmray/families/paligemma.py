"""PaliGemma and PaliGemma 2: a prompt that the model attends to as a whole, then an answer that it generates.

The processor has no chat template and makes `<image>…<image><bos>prompt\\n` of a prompt, with attention in both
directions (`token_type_ids` 0), then of its `suffix` the answer, causal (1), with labels on the answer alone. In a
`pretrain` row everything up to the last image is the prompt, with the beginning of sequence and the line break that the
processor writes after it, and all text after it is the answer; a line break right after the image is the processor's
own. So the row `<image>\\nThe page's text` is what the processor makes of the prompt `<image>` and the suffix `The
page's text`, and the model learns to read a page when asked nothing. Prompt and answer are tokenised apart, as the
processor does. Training on text as part of the prompt, which the processor does with text without a suffix, would show
the model each token that it is to predict.

A prompt after the images is for `tokenized` rows: all that comes before the first trained token of a sample is its
prompt, whatever the kind of row. Text without an image, which the processor refuses, gets the same form without image
tokens.

Every prompt of a packed row would be one block for transformers, so mmray builds the mask (`mmray.families.attention`);
with neither mask nor types the model attends in both directions everywhere under sdpa. It takes a mask for all its
layers: that of PaliGemma 2 has no sliding window, and its samples must not be longer than the window where they are
packed. A sample alone in a row longer than the window gets its types instead of a mask, and keeps the window.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mmray.families.attention import causal_mask, given_mask, mask_problem, sample_numbers, seeing_blocks
from mmray.families.base import PackedRow, RoleMarkers, Size, Span, Tile
from mmray.families.one_size import OneSize
from mmray.families.parts import Parts


class PaliGemma(OneSize):
    """PaliGemma, and PaliGemma 2 with eager attention: a mask in which a prompt's tokens attend to each other; samples
    of PaliGemma 2 pack up to its sliding window; no flash attention, no chats."""

    model_types = ("paligemma",)
    processor_classes = ("PaliGemmaProcessor",)
    module_names = Parts(vision=("model.vision_tower",), projector=("model.multi_modal_projector",))
    has_prompt = looks_ahead = True

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        self.placeholder = self.placeholder_unit = processor.image_token
        super().__init__(processor, tiled)
        self.image_token_id = self.placeholder_id

    @functools.cached_property
    def media_token_ids(self) -> tuple[int, ...]:
        return (self.image_token_id,)

    @functools.cached_property
    def role_markers(self) -> tuple[RoleMarkers, ...]:
        return ()

    def prompt_and_answer(self, text: str) -> tuple[str, str]:
        prompt, image, answer = text.rpartition(self.placeholder)
        return f"{prompt}{image}{self.tokenizer.bos_token}\n", answer.removeprefix("\n")

    def process(self, text: str, tiles: Sequence[Image.Image], **options: Any) -> Any:
        """The processor's output for the prompt and the answer of a row, without the end token that it writes after an
        answer."""
        prompt, answer = self.prompt_and_answer(text)
        if not tiles:
            return self.tokenizer([prompt], text_pair=[answer], return_token_type_ids=True, **options)
        prompt = prompt.removesuffix(f"{self.tokenizer.bos_token}\n")
        output = self.processor(text=[prompt], suffix=[answer], images=list(tiles), **self.processor_kwargs, **options)
        for name in ("input_ids", "attention_mask", "token_type_ids", "labels"):
            value = output[name]
            output[name] = value[:, :-1] if isinstance(value, Tensor) else [ids[:-1] for ids in value]
        return output

    def _measure_span(self, tile_size: Size, num_tiles: int) -> Span:
        return Span(np.full(self.features, self.image_token_id, dtype=np.int32), self.features)

    def position_ids(self, row: PackedRow) -> Tensor:
        """Positions that start at 1 in each sample, as the model counts itself."""
        return super().position_ids(row) + 1

    @classmethod
    def by_sample_problem(cls, config: PretrainedConfig) -> str | None:
        return "the tokens of a prompt see each other, which takes a mask"

    def model_problem(self, config: PretrainedConfig) -> str | None:
        text, implementation = config.get_text_config().model_type, config._attn_implementation
        if text == "gemma2" and implementation != "eager":
            return f"its text model, {text}, runs without {implementation} in transformers; set model.attention: eager"
        return mask_problem(config)

    def packing_problem(self, config: PretrainedConfig, *, sample_tokens: int, row_tokens: int) -> str | None:
        window = _sliding_window(config)
        if window is None or sample_tokens <= window:
            return self.model_problem(config)
        return (
            f"samples of up to {sample_tokens} tokens (packing.token_capacity) may exceed the sliding window of its "
            f"layers, {window} tokens, which the mask that keeps samples apart does not have"
        )

    def attention_inputs(self, row: PackedRow, dtype: torch.dtype, config: PretrainedConfig) -> dict[str, Any]:
        samples = sample_numbers(row)
        prompts = _before_answers(row.trained, samples, len(row.lengths))
        window = _sliding_window(config)
        if window is not None and len(samples) > window and int(row.segment_ids.max()) == 0:
            # What is no sample has no prompt here: a prompt is one block, whatever the positions say.
            return {"token_type_ids": (~prompts | (samples > 0)).to(torch.int64)[None]}
        mask = seeing_blocks(causal_mask(samples), (samples + 1) * prompts)
        return {"attention_mask": given_mask(mask, config, dtype)}

    def prompt_inputs(
        self, input_ids: Tensor, mask: Tensor, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype,
        model: PreTrainedModel,
    ) -> dict[str, Any]:  # fmt: skip
        """The inputs of a prompt that is seen as a whole, as in training: all its tokens are of type 0."""
        types = {"token_type_ids": torch.zeros_like(input_ids)}
        return super().prompt_inputs(input_ids, mask, tiles, frames, dtype, model) | types


def _sliding_window(config: PretrainedConfig) -> int | None:
    """Tokens that the sliding layers of the text model attend over; None without such layers, as in Gemma."""
    text = config.get_text_config()
    return None if text.model_type == "gemma" else text.sliding_window


def _before_answers(trained: Tensor, samples: Tensor, count: int) -> Tensor:
    """True for tokens that come before the first trained token of their sample, bool [L]: all of a sample without
    one."""
    places = torch.arange(len(samples), device=samples.device)
    first = torch.full((count,), len(samples), device=samples.device)
    first.scatter_reduce_(0, samples, places.masked_fill(~trained, len(samples)), "amin")
    return places < first[samples]
