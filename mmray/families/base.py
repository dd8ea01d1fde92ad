"""What mmray needs to know of a model family, and nothing else.

A family is bound to one processor and answers, from sizes alone: which tokens stand for a tile, how many of them
carry image features, and which sizes the processor will resample a tile to. At training time it turns decoded tiles
into uint8 frames (on CPU actors), frames into the model's pixel inputs (arithmetic only, on the training device), and
gives positions. The processor's own code decides every size; the arithmetic here must equal it, and tests compare
both on every setting.

Adding a family is one file with a subclass of `Family` and a line in `mmray/families/__init__.py`.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmray.errors import UserError
from mmray.images import TilingPolicy

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class RoleMarkers:
    """The text around one role's turns in a chat template. An empty `end` reaches to the sample's end."""

    role: str
    start: str
    end: str = ""
    include_start: bool = False
    include_end: bool = True


@dataclass(frozen=True)
class Span:
    """The tokens one tile becomes. token_ids: int32 [n]; visual_tokens: how many of them carry image features."""

    token_ids: np.ndarray
    visual_tokens: int


class Family(ABC):
    """One model family, bound to a processor (`mmray.families.family_of`)."""

    model_types: ClassVar[tuple[str, ...]]
    """`config.model_type` of the models this file serves."""
    processor_classes: ClassVar[tuple[str, ...]]
    """Class names of the processors this file serves."""
    rotary_sections: ClassVar[bool] = False
    """True for M-RoPE: positions have a text row and three grid rows."""

    image_token_id: int
    """The token that carries one image feature; `Span.visual_tokens` counts it."""
    placeholder: str
    """The single token that stands for an image in rendered text; its span takes its place."""
    placeholder_unit: str
    """What the chat template writes for an image: the placeholder and the tokens around it."""
    tile_multiple: int
    """Tiles whose sides are multiples of this many pixels are not resampled by the processor."""

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.tiled = tiled
        self.placeholder_id = self.token_id(self.placeholder)
        self._span = functools.lru_cache(maxsize=65_536)(self._measure_span)

    # ---------------------------------------------------------------- text

    def token_id(self, token: str) -> int:
        """The id of a token that must be in the vocabulary; the unknown-token id is never accepted for it."""
        found = self.tokenizer.convert_tokens_to_ids(token)
        if found is None or (found == self.tokenizer.unk_token_id and token != self.tokenizer.unk_token):
            raise ValueError(f"the tokenizer of {type(self.processor).__name__} has no token {token!r}")
        return int(found)

    def known_token_ids(self, tokens: Sequence[str]) -> list[int]:
        """The ids of those of `tokens` that the vocabulary has as single tokens."""
        vocabulary = self._vocabulary
        return [vocabulary[token] for token in tokens if token in vocabulary]

    @functools.cached_property
    def _vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()

    @functools.cached_property
    @abstractmethod
    def media_token_ids(self) -> tuple[int, ...]:
        """Every token that is there for an image or a video: never trained."""

    @functools.cached_property
    @abstractmethod
    def role_markers(self) -> tuple[RoleMarkers, ...]:
        """The role boundaries of the family's chat template."""

    @functools.cached_property
    def structure_tokens(self) -> tuple[str, ...]:
        """Special tokens that the model reads as structure; text of a user never holds them."""
        tokenizer = self.tokenizer
        special = {str(token) for token in tokenizer.get_added_vocab()} | set(tokenizer.all_special_tokens)
        markers = "".join(marker.start + marker.end for marker in self.role_markers)
        found = {token for token in special if token in markers}
        found.update(token for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if token)
        found.update(tokenizer.convert_ids_to_tokens(list(self.media_token_ids)))
        return tuple(sorted(found))

    # ---------------------------------------------------------------- sizes

    def resolved_tiling(self, policy: TilingPolicy) -> TilingPolicy:
        """`resolve_tiling` for a job's settings: a policy the family cannot take is a UserError."""
        try:
            return self.resolve_tiling(policy)
        except ValueError as error:
            raise UserError(f"images: {error}") from error

    def resolve_tiling(self, policy: TilingPolicy) -> TilingPolicy:
        """The policy with tile sizes this family's processor keeps as they are."""
        return policy.aligned(self.tile_multiple) if policy.is_tiled else policy

    def span(self, tile_size: Size) -> Span:
        """The tokens of a tile of this size, equal to what the processor writes for it."""
        return self._span(tile_size)

    @abstractmethod
    def _measure_span(self, tile_size: Size) -> Span: ...

    @property
    def processor_kwargs(self) -> dict[str, Any]:
        """Image settings that a call of the processor needs to see tiles as they are; none when untiled."""
        return {}

    # ---------------------------------------------------------------- pixels

    @abstractmethod
    def frames(self, tile: Image.Image) -> list[np.ndarray]:
        """The tile as the vision tower sees it before arithmetic: uint8 arrays [height, width, 3], resized by the
        processor's own rule."""

    @abstractmethod
    def pixel_inputs(self, frames: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's image arguments for all frames of a packed row, in order.

        frames: uint8 [height, width, 3] each, already on the training device. Equal to the processor's output
        (rescale, normalise, layout) on the same tiles.
        """

    @property
    @abstractmethod
    def dummy_frame(self) -> np.ndarray:
        """A small white frame, uint8 [height, width, 3], for a row without images: the vision tower then runs on
        every rank."""

    @abstractmethod
    def feature_counts(self, frame_sizes: Sequence[Size]) -> list[int]:
        """Image features (tokens `image_token_id`) that the model makes of each frame."""

    # ---------------------------------------------------------------- positions

    def position_ids(self, input_ids: Tensor, lengths: Tensor, frame_sizes: Sequence[Size]) -> Tensor:
        """Positions that restart at each sample.

        input_ids: int [L], one packed row; lengths: int [samples], their sum is L. Returns int64 [1, L], or
        [4, 1, L] for M-RoPE families: the text row first, then time, height and width.
        """
        return positions_in_sample(lengths)[None]


def positions_in_sample(lengths: Tensor) -> Tensor:
    """0, 1, 2, … within each sample. lengths: int [samples]; returns int64 [sum(lengths)]."""
    lengths = lengths.to(torch.int64)
    total = int(lengths.sum())
    starts = lengths.cumsum(0) - lengths
    return torch.arange(total, device=lengths.device) - torch.repeat_interleave(starts, lengths, output_size=total)


def normalised(pixels: Tensor, images: Any, dtype: torch.dtype) -> Tensor:
    """Rescale and normalise as the image processor `images` does, in fp32. pixels: uint8 [n, 3, height, width]."""
    values = pixels.to(torch.float32)
    if images.do_rescale:
        values = values * images.rescale_factor
    if images.do_normalize:
        mean, std = values.new_tensor([images.image_mean, images.image_std])[:, :, None, None]
        values = (values - mean) / std
    return values.to(dtype)
