"""What mmray needs to know of a model family, and nothing else.

A family is bound to one processor and answers, from sizes alone: which tokens stand for a tile, how many of them
carry image features, and which sizes the processor will resample a tile to. At training time it turns decoded tiles
into uint8 frames (on CPU actors), frames into the model's pixel inputs (arithmetic only, on the training device), and
gives positions and whatever else keeps the samples of a packed row apart. The processor's own code decides every
size; the arithmetic here must equal it, and tests compare both on every setting.

Adding a family is one file with a subclass of `Family`, a line in `mmray/families/__init__.py`, and a file in
`tests/mmray/families/zoo/` that says how a small model of it is built: every test of families then runs on it.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mmray.errors import UserError
from mmray.families.parts import Parts
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
    start_after: str = ""
    """Text that stands before `start`, where tokenizers read a marker otherwise than at a text's beginning."""
    until_next: bool = False
    """No `end`: the turn reaches to where any turn starts."""


@dataclass(frozen=True)
class Span:
    """The tokens one tile becomes. token_ids: int32 [n]; visual_tokens: how many of them carry image features."""

    token_ids: np.ndarray
    visual_tokens: int


@dataclass(frozen=True)
class Tile:
    """One picture as the processor gets it, a piece of a page or a whole page, without its pixels."""

    sample: int
    """Number of its sample in the row."""
    size: Size
    """Before any resizing by the processor."""
    frame_sizes: tuple[Size, ...]
    """Of what the vision tower gets of it (`Family.frames`)."""


@dataclass(frozen=True)
class PackedRow:
    """A packed row as its family sees it. L: tokens; S: samples, with what stands between and after them."""

    input_ids: Tensor
    """int64 [L]"""
    lengths: Tensor
    """int64 [S], their sum is L."""
    segment_ids: Tensor
    """int64 [L]: the number of each token's sample among `lengths`; PADDING_SEGMENT outside samples."""
    tiles: tuple[Tile, ...]
    """In the order of their tokens."""
    trained: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    """bool [L]: the tokens with a label. Empty until labels are made, as when positions are."""


class Family(ABC):
    """One model family, bound to a processor (`mmray.families.family_of`)."""

    model_types: ClassVar[tuple[str, ...]]
    """`config.model_type` of the models this file serves."""
    processor_classes: ClassVar[tuple[str, ...]]
    """Class names of the processors this file serves."""
    module_names: ClassVar[Parts]
    """The modules of each part of the models, those of all of them together (`parts`)."""
    is_verified: ClassVar[bool] = True
    """False: works by general rules that no test has proven for this model."""
    position_rows: ClassVar[int] = 1
    """Rows of `position_ids`: 1; 4 for M-RoPE (the text row, then time, height and width); 0: the model makes its
    own."""
    sample_gap: ClassVar[int] = 0
    """Padding tokens between the samples of a row, for layers that look back over so many tokens."""
    takes_text_only: ClassVar[bool] = True
    """False: the model cannot learn from a row without an image."""
    has_prompt: ClassVar[bool] = False
    """`pretrain` text begins with a prompt that the model sees as a whole and does not learn (`prompt_and_answer`);
    there are no chats."""
    looks_ahead: ClassVar[bool] = False
    """Tokens see a picture that comes after them, as the model was made."""
    leaf_modules: ClassVar[tuple[str, ...]] = ()
    """Classes of those of the model's modules that call layers as often as the data ask for, such as once a picture.
    ZeRO-3 gathers all weights in them at once: else ranks with other data would gather other weights, and wait for each
    other for ever."""
    least_features: ClassVar[int] = 1
    """Image features without which the model cannot run its vision tower: a row with fewer gets the dummy picture."""

    image_token_id: int
    """The token that carries one image feature; `Span.visual_tokens` counts it."""
    placeholder: str
    """The single token that stands for an image in rendered text; its span takes its place."""
    placeholder_unit: str
    """What the chat template writes for an image: the placeholder and the tokens around it."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens by which the model ends its turn though they open the next turn in the template's text."""
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
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or (token_id == self.tokenizer.unk_token_id and token != self.tokenizer.unk_token):
            raise ValueError(f"the tokenizer of {type(self.processor).__name__} has no token {token!r}")
        return int(token_id)

    @functools.cached_property
    def num_token_ids(self) -> int:
        """One more than the largest token id that the tokenizer can give."""
        return max(len(self.tokenizer), 1 + max(self._vocabulary.values()))

    @property
    def padding_id(self) -> int:
        """The token between samples: any that is no image's would do."""
        tokenizer = self.tokenizer
        return int(
            next(token_id for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token_id is not None)
        )

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
        structure = {token for token in special if token.strip() and token in markers}  # Gemma adds line breaks, too
        structure.update(token for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if token)
        structure.update(tokenizer.convert_ids_to_tokens(list(self.media_token_ids)))
        return tuple(sorted(structure))

    def tokenizer_text(self, text: str, tile_sizes: Sequence[Size] = ()) -> str:
        """Rendered text as the tokenizer gets it, each tile still its placeholder: with what the processor writes
        around images that may melt into the tokens of the text beside them. tile_sizes: of the text's tiles, in order.
        """
        return text

    def prompt_and_answer(self, text: str) -> tuple[str, str]:
        """`pretrain` text in two, each tokenised by itself (`has_prompt`): only the second trains."""
        return "", self.tokenizer_text(text)

    def process(self, text: str, tiles: Sequence[Image.Image], **options: Any) -> Any:
        """What the real processor makes of one sample's rendered text and tiles; reads their pixels."""
        return self.processor(text=[text], images=list(tiles) or None, **self.processor_kwargs, **options)

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

    def span(self, tile_size: Size, num_tiles: int = 1) -> Span:
        """The tokens of a tile of this size, equal to what the processor writes for it.

        num_tiles: tiles of the whole sample. Some processors treat a lone picture in another way.
        Raises ValueError for a size that the processor refuses.
        """
        return self._span(tile_size, num_tiles)

    @abstractmethod
    def _measure_span(self, tile_size: Size, num_tiles: int) -> Span: ...

    @property
    def processor_kwargs(self) -> dict[str, Any]:
        """Image settings that a call of the processor needs to see tiles as they are; none when untiled."""
        return {}

    # ---------------------------------------------------------------- pixels

    @abstractmethod
    def frames(self, tile: Image.Image, num_tiles: int = 1) -> list[np.ndarray]:
        """The tile as the vision tower sees it before arithmetic: uint8 arrays [height, width, 3], resized, split and
        padded by the processor's own rule. num_tiles: as for `span`."""

    @abstractmethod
    def pixel_inputs(self, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's image arguments for all tiles of a packed row, in order.

        frames: uint8 [height, width, 3] each, of one tile after the other (`Tile.frame_sizes`), already on the
        training device. Equal to the processor's output (rescale, normalise, layout) on the same tiles.
        """

    @property
    def dummy_size(self) -> Size:
        """The size of a small picture for a row without images: the vision tower then runs on every rank."""
        return self.tile_multiple, self.tile_multiple

    @property
    def dummy_frames(self) -> list[np.ndarray]:
        """The frames of that picture. White: some models drop frames that are zero throughout."""
        width, height = self.dummy_size
        return [np.full((height, width, 3), 255, dtype=np.uint8)]

    @abstractmethod
    def feature_count(self, tile: Tile) -> int:
        """Image features (tokens `image_token_id`) that the model makes of a tile."""

    # ---------------------------------------------------------------- the model

    def model_problem(self, config: PretrainedConfig) -> str | None:
        """Why a model of this configuration would train wrongly, packed or not; None where it does not.

        `config._attn_implementation` is set.
        """
        return None

    def packing_problem(self, config: PretrainedConfig, *, sample_tokens: int, row_tokens: int) -> str | None:
        """Why a model of this configuration cannot take several samples in one row; None where it can.

        sample_tokens, row_tokens: the most that a sample and a row will have. `config._attn_implementation` is set.
        """
        return None

    def parts(self, model: PreTrainedModel) -> Parts:
        """Which modules of a loaded model are its vision tower, its projector, its language model, and its embeddings
        with the head: disjoint, and all parameters of the model. Raises UserError where a weight belongs to none."""
        return self.module_names.of(model)

    def embedding_rows(self, config: PretrainedConfig) -> int:
        """Token ids that the model has a vector for: 0 to this number less one."""
        return int(config.get_text_config().vocab_size)

    def config_image_token_id(self, config: PretrainedConfig) -> int:
        """The image token of the model itself, which must be the processor's."""
        return int(config.image_token_id)

    def position_ids(self, row: PackedRow) -> Tensor:
        """Positions that restart at each sample, int64 [position_rows, L]."""
        return positions_in_sample(row.lengths)[None]

    def attention_inputs(self, row: PackedRow, dtype: torch.dtype, config: PretrainedConfig) -> dict[str, Any]:
        """What the model needs besides positions to keep the samples of a row apart, such as masks.

        dtype: of the model; config: its configuration, with the attention implementation it runs. With flash attention
        it is told where samples begin: else every layer finds that out by itself and waits for the GPU, and some models
        (GLM-4.5V) give their layers the positions of rows and columns, which restart in every picture.
        """
        return sample_bounds(row) if "flash" in str(config._attn_implementation) else {}

    def model_inputs(
        self, row: PackedRow, position_ids: Tensor, frames: Sequence[Tensor], dtype: torch.dtype,
        config: PretrainedConfig,
    ) -> dict[str, Any]:  # fmt: skip
        """The keyword arguments of the model's forward for a packed row, all on the row's device.

        No attention mask is among them unless the family adds one: models find the samples by their positions.
        """
        inputs: dict[str, Any] = {"input_ids": row.input_ids[None]}
        if self.position_rows:
            inputs["position_ids"] = position_ids[:, None] if self.position_rows > 1 else position_ids
        return inputs | self.pixel_inputs(row.tiles, frames, dtype) | self.attention_inputs(row, dtype, config)


def header_ends(line_breaks: str = "\n") -> tuple[str, str]:
    """What stands between a turn's header and its text, as role markers need it: the line breaks of the template, or
    nothing, for turns that begin with a line break themselves: tokenizers make one token of all of them."""
    return line_breaks, ""


def positions_in_sample(lengths: Tensor) -> Tensor:
    """0, 1, 2, … within each sample. lengths: int [samples]; returns int64 [sum(lengths)]."""
    lengths = lengths.to(torch.int64)
    total = int(lengths.sum())
    starts = lengths.cumsum(0) - lengths
    return torch.arange(total, device=lengths.device) - torch.repeat_interleave(starts, lengths, output_size=total)


def as_frame(tile: Image.Image) -> np.ndarray:
    """The frame of a tile that the processor leaves as it is, uint8 [height, width, 3], without running it: 1 ms for
    the six tiles of a page, where processors take 2 to 13."""
    return np.asarray(tile, dtype=np.uint8)


def sample_bounds(row: PackedRow) -> dict[str, Any]:
    """Where the samples of a row begin and how long the longest is, as transformers' attention takes it."""
    starts = torch.nn.functional.pad(row.lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(row.lengths.max())
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def channels_first(frames: Sequence[Tensor]) -> Tensor:
    """Frames of one size, [height, width, 3] each, as [frames, 3, height, width]."""
    return torch.stack(list(frames)).permute(0, 3, 1, 2).contiguous()


def normalised(pixels: Tensor, images: Any, dtype: torch.dtype) -> Tensor:
    """Rescale and normalise as the image processor `images` does, in fp32. pixels: uint8 [n, 3, height, width]."""
    values = pixels.to(torch.float32)
    if images.do_rescale:
        values = values * images.rescale_factor
    if images.do_normalize:
        mean, std = values.new_tensor([images.image_mean, images.image_std])[:, :, None, None]
        values = (values - mean) / std
    return values.to(dtype)
