"""The contract of a model family: everything that mmray needs to know of one, and nothing else.

A family is bound to one processor and answers, from sizes alone: which tokens stand for a tile, how many of them
carry image features, and which sizes the processor will resample a tile to. At training time it turns decoded tiles
into uint8 frames (on CPU actors), frames into the model's pixel inputs (arithmetic only, on the training device), and
gives positions and whatever else keeps the samples of a packed row apart. The processor's own code decides every
size; the arithmetic here must equal it, and tests compare both on every setting.

Adding a family is one file with a subclass of `Family`, a line in `mmray/families/__init__.py`, and a file in
`tests/mmray/families/zoo/` that says how a small model of it is built: every test of families then runs on it.
"""

import functools
import inspect
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
    """The text that begins and ends one role's turns in a chat template. An empty `end` means the turn ends with the
    sample."""

    role: str
    start: str
    end: str = ""
    include_start: bool = False
    include_end: bool = True
    start_after: str = ""
    """Text put before `start` when it is tokenized, for tokenizers that read a marker differently at the beginning of a
    text."""
    until_next: bool = False
    """True if the turn ends where any other turn starts, because it has no `end`."""


@dataclass(frozen=True)
class Span:
    """The tokens that stand for one tile: its `token_ids`, int32 [n], and how many of them carry image features.

    For example, a tile of granite-docling becomes 64 image tokens between markers:
    `<fake_token_around_image><global-img><image>…<image><fake_token_around_image>`, so n = 67 and `visual_tokens` = 64.
    """

    token_ids: np.ndarray
    visual_tokens: int


@dataclass(frozen=True)
class Tile:
    """One picture as the processor receives it, without its pixels: a whole page or a piece of one."""

    sample: int
    """Index of the tile's sample in the row."""
    size: Size
    """Size before any resizing by the processor."""
    frame_sizes: tuple[Size, ...]
    """Sizes of the frames that the vision tower gets for this tile (`Family.frames`)."""


@dataclass(frozen=True)
class PackedRow:
    """A packed row in the form that families take: L tokens in S samples. Padding between and after samples counts as
    samples."""

    input_ids: Tensor
    """Token ids, int64 [L]."""
    lengths: Tensor
    """Number of tokens of each sample, int64 [S]; their sum is L."""
    segment_ids: Tensor
    """Index of each token's sample in `lengths`, int64 [L]; PADDING_SEGMENT outside samples."""
    tiles: tuple[Tile, ...]
    """The tiles of the row, in the order of their tokens."""
    trained: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    """True for tokens with a label, bool [L]. Empty until labels are made, as it is while positions are."""


class Family(ABC):
    """One model family, bound to a processor (`mmray.families.family_of`)."""

    model_types: ClassVar[tuple[str, ...]]
    """`config.model_type` of the models this file serves."""
    processor_classes: ClassVar[tuple[str, ...]]
    """Class names of the processors this file serves."""
    module_names: ClassVar[Parts]
    """Names of the modules of each part (`parts`), of all the models that the family serves."""
    is_verified: ClassVar[bool] = True
    """False for a family that works by general rules, which no test has proven for its models."""
    position_rows: ClassVar[int] = 1
    """Rows of `position_ids`: 1; 4 for M-RoPE (text, then time, height and width); 0 where the model computes its
    own."""
    sample_gap: ClassVar[int] = 0
    """Padding tokens between the samples of a row, for layers that look back over this many tokens."""
    takes_text_only: ClassVar[bool] = True
    """False for models that cannot learn from a row without an image."""
    has_prompt: ClassVar[bool] = False
    """True if `pretrain` text begins with a prompt (`prompt_and_answer`) that the model attends to as a whole and is
    not trained on. Such families have no chats."""
    looks_ahead: ClassVar[bool] = False
    """True if tokens attend to a picture that comes after them, by the model's design."""
    leaf_modules: ClassVar[tuple[str, ...]] = ()
    """Class names of modules that call their layers a number of times that depends on the data, such as once per
    picture.

    ZeRO-3 gathers all weights of such a module at once. Without that, ranks with different data would gather different
    weights and wait for each other forever.
    """
    pads_prompts: ClassVar[bool] = True
    """True if prompts of several rows can be generated for at once, padded on the left, with the pictures of all rows
    one after another."""
    least_features: ClassVar[int] = 1
    """Image features that the vision tower needs to run; a row with fewer gets the dummy picture."""

    image_token_id: int
    """Id of the token that carries one image feature; `Span.visual_tokens` counts these tokens."""
    placeholder: str
    """The single token that stands for an image in rendered text; the image's span replaces it."""
    placeholder_unit: str
    """The text that the chat template writes for an image: the placeholder and the tokens around it."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens with which the model ends its turn, although they open the next turn in the template's text."""
    tile_multiple: int
    """The processor does not resample tiles whose sides are multiples of this many pixels."""

    def __init__(self, processor: Any, tiled: bool = False) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.tiled = tiled
        self.placeholder_id = self.token_id(self.placeholder)
        self._span = functools.lru_cache(maxsize=65_536)(self._measure_span)

    # ---------------------------------------------------------------- text

    def token_id(self, token: str) -> int:
        """The id of a token that the vocabulary must hold; the unknown-token id is never accepted for it."""
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
        """The id of the token between samples. Any token that does not stand for an image would do."""
        tokenizer = self.tokenizer
        return int(
            next(token_id for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token_id is not None)
        )

    def known_token_ids(self, tokens: Sequence[str]) -> list[int]:
        """The ids of those `tokens` that are single tokens of the vocabulary."""
        vocabulary = self._vocabulary
        return [vocabulary[token] for token in tokens if token in vocabulary]

    @functools.cached_property
    def _vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()

    @functools.cached_property
    @abstractmethod
    def media_token_ids(self) -> tuple[int, ...]:
        """Ids of all tokens that stand for an image or a video. They are never trained on."""

    @functools.cached_property
    @abstractmethod
    def role_markers(self) -> tuple[RoleMarkers, ...]:
        """The role boundaries of the family's chat template."""

    @functools.cached_property
    def structure_tokens(self) -> tuple[str, ...]:
        """Special tokens that the model reads as structure. A user's text may not contain them."""
        tokenizer = self.tokenizer
        special = {str(token) for token in tokenizer.get_added_vocab()} | set(tokenizer.all_special_tokens)
        markers = "".join(marker.start + marker.end for marker in self.role_markers)
        structure = {token for token in special if token.strip() and token in markers}  # Gemma adds line breaks, too
        structure.update(token for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if token)
        structure.update(tokenizer.convert_ids_to_tokens(list(self.media_token_ids)))
        return tuple(sorted(structure))

    def tokenizer_text(self, text: str, tile_sizes: Sequence[Size] = ()) -> str:
        """Rendered text as the tokenizer gets it, with each tile still a placeholder.

        Adds what the processor writes around images and what may merge with the text beside them into other tokens.
        tile_sizes: those of the text's tiles, in order.
        """
        return text

    def prompt_and_answer(self, text: str) -> tuple[str, str]:
        """The two parts of `pretrain` text, each tokenized by itself (`has_prompt`): only the second is trained on."""
        return "", self.tokenizer_text(text)

    def process(self, text: str, tiles: Sequence[Image.Image], **options: Any) -> Any:
        """The real processor's output for one sample's rendered text and tiles; it reads their pixels."""
        return self.processor(text=[text], images=list(tiles) or None, **self.processor_kwargs, **options)

    # ---------------------------------------------------------------- sizes

    def resolved_tiling(self, policy: TilingPolicy) -> TilingPolicy:
        """Calls `resolve_tiling` for a job's settings. Raises UserError for a policy that the family cannot take."""
        try:
            return self.resolve_tiling(policy)
        except ValueError as error:
            raise UserError(f"images: {error}") from error

    def resolve_tiling(self, policy: TilingPolicy) -> TilingPolicy:
        """The tiling policy, adjusted to tile sizes that this family's processor does not resize."""
        return policy.aligned(self.tile_multiple) if policy.is_tiled else policy

    def span(self, tile_size: Size, num_tiles: int = 1) -> Span:
        """The tokens that stand for a tile of this size, equal to those that the processor writes.

        num_tiles: tiles of the whole sample. Some processors treat a picture that is alone in its sample differently.
        Raises ValueError for a size that the processor refuses.
        """
        return self._span(tile_size, num_tiles)

    @abstractmethod
    def _measure_span(self, tile_size: Size, num_tiles: int) -> Span: ...

    @property
    def processor_kwargs(self) -> dict[str, Any]:
        """Image settings with which the processor takes tiles as they are; none when pages are not tiled."""
        return {}

    # ---------------------------------------------------------------- pixels

    @abstractmethod
    def frames(self, tile: Image.Image, num_tiles: int = 1) -> list[np.ndarray]:
        """The tile in the form of the vision tower, before arithmetic: uint8 arrays [height, width, 3].

        They are resized, split and padded by the processor's own rule. num_tiles: tiles of the whole sample, as for
        `span`.
        """

    @abstractmethod
    def pixel_inputs(self, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's image arguments for all tiles of a packed row, in order.

        frames: uint8 [height, width, 3] each, those of one tile after those of the other (`Tile.frame_sizes`), already
        on the training device. Equal to the processor's output (rescale, normalise, layout) on the same tiles.
        """

    @property
    def dummy_size(self) -> Size:
        """Size of a small picture that is added to a row without images, so that the vision tower runs on every
        rank."""
        return self.tile_multiple, self.tile_multiple

    @property
    def dummy_frames(self) -> list[np.ndarray]:
        """Frames of the dummy picture. It is white, because some models drop frames that are all zero."""
        width, height = self.dummy_size
        return [np.full((height, width, 3), 255, dtype=np.uint8)]

    @abstractmethod
    def feature_count(self, tile: Tile) -> int:
        """Number of image features (tokens `image_token_id`) that the model makes of a tile."""

    # ---------------------------------------------------------------- the model

    def model_problem(self, config: PretrainedConfig) -> str | None:
        """The reason why a model of this configuration would train wrongly, packed or not; None where it would not.

        `config._attn_implementation` is set.
        """
        return None

    @classmethod
    def by_sample_problem(cls, config: PretrainedConfig) -> str | None:
        """The reason why the text layers of a model cannot compute each sample apart (`model.attention: packed`), so
        that they need masks; None where they can."""
        return None

    def packing_problem(self, config: PretrainedConfig, *, sample_tokens: int, row_tokens: int) -> str | None:
        """The reason why a model of this configuration cannot take several samples in one row; None where it can.

        sample_tokens: the most tokens that a sample will have; row_tokens: the most that a row will have.
        `config._attn_implementation` is set.
        """
        return None

    def parts(self, model: PreTrainedModel) -> Parts:
        """The modules of a loaded model by part: vision tower, projector, language model, and embeddings with the head.

        The parts are disjoint and hold all parameters of the model. Raises UserError where a weight belongs to no part.
        """
        return self.module_names.of(model)

    def embedding_rows(self, config: PretrainedConfig) -> int:
        """Number of token ids that the model has an embedding for: they go from 0 to this number less one."""
        return int(config.get_text_config().vocab_size)

    def config_image_token_id(self, config: PretrainedConfig) -> int:
        """The image token id in the model's configuration, which must equal the processor's."""
        return int(config.image_token_id)

    def position_ids(self, row: PackedRow) -> Tensor:
        """Position ids that restart at each sample, int64 [position_rows, L]."""
        return positions_in_sample(row.lengths)[None]

    def attention_inputs(self, row: PackedRow, dtype: torch.dtype, config: PretrainedConfig) -> dict[str, Any]:
        """Model arguments besides positions that keep the samples of a row apart, such as masks.

        dtype: that of the model; config: its configuration, with the attention implementation it runs. With packed and
        flash attention the model is told where samples begin. Every layer of flash attention would otherwise find that
        out by itself and wait for the GPU, and some models (GLM-4.5V) give their layers the positions of rows and
        columns, which restart in every picture.
        """
        return sample_bounds(row) if "flash" in str(config._attn_implementation) else {}

    def model_inputs(
        self, row: PackedRow, position_ids: Tensor, frames: Sequence[Tensor], dtype: torch.dtype,
        config: PretrainedConfig,
    ) -> dict[str, Any]:  # fmt: skip
        """The keyword arguments of the model's forward for a packed row, all on the row's device.

        They hold no attention mask unless the family adds one: models find the samples by their positions.
        """
        inputs: dict[str, Any] = {"input_ids": row.input_ids[None]}
        if self.position_rows:
            inputs["position_ids"] = position_ids[:, None] if self.position_rows > 1 else position_ids
        return inputs | self.pixel_inputs(row.tiles, frames, dtype) | self.attention_inputs(row, dtype, config)

    def prompt_inputs(
        self, input_ids: Tensor, mask: Tensor, tiles: Sequence[Tile], frames: Sequence[Tensor], dtype: torch.dtype,
        model: PreTrainedModel,
    ) -> dict[str, Any]:  # fmt: skip
        """The model's arguments besides token ids and their mask, to generate after prompts that are not packed.

        input_ids, mask: int64 [rows, L], padded on the left where the mask is 0.
        tiles, frames: those of all rows, one row after another (`Tile.sample`: the row), as for `pixel_inputs`.
        """
        taken = inspect.signature(type(model).forward).parameters
        is_image = ((input_ids == self.image_token_id) & (mask > 0)).to(torch.int64)
        marks = {name: is_image for name in ("mm_token_type_ids", "token_type_ids") if name in taken}
        return marks | (self.pixel_inputs(tiles, frames, dtype) if tiles else {})


def header_ends(line_breaks: str = "\n") -> tuple[str, str]:
    """Texts that may stand between a turn's header and its content: the line breaks of the template, or nothing.

    Nothing, for turns that begin with a line break themselves: tokenizers make one token of all these breaks.
    """
    return line_breaks, ""


def positions_in_sample(lengths: Tensor) -> Tensor:
    """Positions 0, 1, 2, … within each sample. lengths: int [samples]; returns int64 [sum(lengths)]."""
    lengths = lengths.to(torch.int64)
    total = int(lengths.sum())
    starts = lengths.cumsum(0) - lengths
    return torch.arange(total, device=lengths.device) - torch.repeat_interleave(starts, lengths, output_size=total)


def as_frame(tile: Image.Image) -> np.ndarray:
    """The frame of a tile that the processor leaves as it is, uint8 [height, width, 3].

    It is made without running the processor: 1 ms for the six tiles of a page, where processors take 2 to 13.
    """
    return np.asarray(tile, dtype=np.uint8)


def sample_bounds(row: PackedRow) -> dict[str, Any]:
    """The beginnings of the samples of a row and the length of the longest, as arguments of transformers' attention."""
    starts = torch.nn.functional.pad(row.lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(row.lengths.max())
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def channels_first(frames: Sequence[Tensor]) -> Tensor:
    """Stacks frames of one size, each [height, width, 3], into [frames, 3, height, width]."""
    return torch.stack(list(frames)).permute(0, 3, 1, 2).contiguous()


def normalised(pixels: Tensor, images: Any, dtype: torch.dtype) -> Tensor:
    """Rescales and normalises pixels as the image processor `images` does, in fp32. pixels: uint8 [n, 3, height,
    width]."""
    values = pixels.to(torch.float32)
    if images.do_rescale:
        values = values * images.rescale_factor
    if images.do_normalize:
        mean, std = values.new_tensor([images.image_mean, images.image_std])[:, :, None, None]
        values = (values - mean) / std
    return values.to(dtype)
