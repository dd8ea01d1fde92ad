"""The prompts and references of a sample: its tokens up to a text that the model is to write, and that text.

A prompt is the beginning of the sample's own tokens, so it is what training saw before the text, in every family and
with every template. Of a chat, each stretch of trained tokens is an answer. Of a page, the text is what follows its
last image: of `x I I \\n T o t a l <end>` with an image `I I`, the prompt is `x I I \\n`, the reference `T o t a l`.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mmray.base.settings import RowKind
from mmray.base.words import counted
from mmray.batches.micro_batch import MicroBatch
from mmray.errors import RowError
from mmray.families import Family, Tile
from mmray.loss.rules import IGNORE_INDEX
from mmray.loss.sources import ending_token_ids
from mmray.run.scoring.settings import GenerateSettings

_NO_TEXT = "there is no text after the row's last image, or no image before its text: nothing to read"


@dataclass(frozen=True)
class ReadingTask:
    """A text that a model is to write.

    turn: number of the answer in its row, from 0.
    prompt_ids: the tokens before it, int64 [n].
    tiles, frames: the pictures of the prompt, in the order of their tokens; frames: uint8 [height, width, 3].
    reference: the text.
    reference_tokens: number of its tokens.
    """

    turn: int
    prompt_ids: np.ndarray
    tiles: tuple[Tile, ...]
    frames: tuple[Tensor, ...]
    reference: str
    reference_tokens: int

    def most_tokens(self, settings: GenerateSettings) -> int:
        """Number of tokens after which the model is stopped."""
        return settings.max_new_tokens or self.reference_tokens + self.reference_tokens // 2 + 16


class PromptCutter:
    """Cuts samples into prompts and references, for one family."""

    def __init__(self, family: Family, settings: GenerateSettings, prompt: str | None = None) -> None:
        """prompt: `evaluation.prompt`."""
        self.family, self._settings, self._prompt = family, settings, prompt
        structure = family.tokenizer.convert_tokens_to_ids(list(family.structure_tokens))
        self._structure = {int(token) for token in structure if token is not None} | set(family.media_token_ids)
        self._ends = {*ending_token_ids(family), family.tokenizer.eos_token_id}
        self._blank: dict[int, bool] = {}

    def tasks(self, batch: MicroBatch, kind: RowKind) -> list[ReadingTask]:
        """The tasks of a micro-batch that holds one sample of this kind.

        Raises RowError (`no_text`) for a sample with nothing to read.
        """
        length = int(batch.masked.lengths[0])
        ids = batch.masked.input_ids[:length].astype(np.int64)
        trained = batch.labels[0, :length].numpy() != IGNORE_INDEX
        by_document = kind == "pretrain" and not self.family.has_prompt
        spans = [self._document(ids, batch.masked.blocks)] if by_document else list(_runs(trained))
        answers = [(start, stop) for start, stop in spans if self.text(ids[start:stop]).strip()]
        if not answers:
            raise RowError("no_text", _NO_TEXT)
        wanted = list(enumerate(answers))
        if self._settings.turns == "last" and not by_document:
            wanted = wanted[-1:]
        pictures = _Pictures(batch)
        return [
            ReadingTask(
                number,
                self._asked(ids, batch.masked.blocks) if by_document and self._prompt is not None else ids[:start],
                *pictures.before(start, self.family),
                self.text(ids[start:stop]),
                int(sum(token not in self._ends for token in ids[start:stop].tolist())),
            )
            for number, (start, stop) in wanted
        ]

    def whole(self, batch: MicroBatch) -> ReadingTask:
        """A task of a sample in which nothing can be read: all of it is the prompt."""
        ids = batch.masked.input_ids[: int(batch.masked.lengths[0])].astype(np.int64)
        return ReadingTask(0, ids, *_Pictures(batch).before(len(ids), self.family), "", 1)

    def text(self, token_ids: np.ndarray | Tensor) -> str:
        """The text of tokens without those that the model reads as structure; other special tokens, such as tags of
        documents, are a part of it."""
        kept = [token for token in token_ids.tolist() if token not in self._structure and token not in self._ends]
        return str(self.family.tokenizer.decode(kept, skip_special_tokens=False))

    def _document(self, ids: np.ndarray, blocks: np.ndarray) -> tuple[int, int]:
        """The first token after the last image that is not white space, and the end; an empty span without an image."""
        if not len(blocks):
            return len(ids), len(ids)
        start = int(blocks[-1].sum())
        tail = self._unit_tails[1]
        if tail and ids[start : start + len(tail)].tolist() == tail:
            start += len(tail)
        while start < len(ids) and self._is_blank(int(ids[start])):
            start += 1
        return start, len(ids)

    def _asked(self, ids: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """The tokens of the sample's images with the text of `evaluation.prompt` around them."""
        assert self._prompt is not None
        head, tail = self._unit_tails
        images = []
        for first, count in blocks.tolist():
            start, stop = first, first + count
            start -= len(head) if head and ids[start - len(head) : start].tolist() == head else 0
            stop += len(tail) if tail and ids[stop : stop + len(tail)].tolist() == tail else 0
            images.append((start, stop))
        pieces = self._prompt.split("<image>")
        if len(pieces) == 1:
            pieces = ["", *["\n"] * (len(images) - 1), f"\n{pieces[0]}"]
        if len(pieces) != len(images) + 1:
            raise RowError(
                "placeholder_count",
                f"evaluation.prompt has {len(pieces) - 1} <image>, the row {counted(len(images), 'image')}",
            )
        opening = list(itertools.takewhile(lambda token: token in self._structure, ids[: images[0][0]].tolist()))
        parts = [np.asarray(opening, dtype=np.int64)]
        for piece, image in zip(pieces, [*images, None]):
            encoded = self.family.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
            parts += [np.asarray(encoded, dtype=np.int64)]
            parts += [ids[slice(*image)]] if image else []
        return np.concatenate(parts)

    @cached_property
    def _unit_tails(self) -> tuple[list[int], list[int]]:
        """The tokens that a chat template writes directly before and after an image's placeholder."""
        before, _, after = self.family.placeholder_unit.partition(self.family.placeholder)
        encode = self.family.tokenizer
        head, tail = (encode(text, add_special_tokens=False)["input_ids"] if text else [] for text in (before, after))
        return head, tail

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = token not in self._ends and not str(self.family.tokenizer.decode([token])).strip()
        return self._blank[token]


def _runs(trained: np.ndarray) -> Iterator[tuple[int, int]]:
    """The (first, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], trained, [False]]).astype(np.int8)))
    return zip(edges[::2].tolist(), edges[1::2].tolist())


class _Pictures:
    """The pictures of a micro-batch with one sample."""

    def __init__(self, batch: MicroBatch) -> None:
        self._batch = batch
        masked = batch.masked
        self.tiles = [tile for tile in batch.row.tiles if tile.sample == 0]
        sizes = [size for tile in batch.row.tiles for size in tile.frame_sizes]
        self._ends = np.cumsum([width * height * 3 for width, height in sizes]).tolist()
        self._sizes, self._pixels = sizes, masked.pixels

    def before(self, token: int, family: Family) -> tuple[tuple[Tile, ...], tuple[Tensor, ...]]:
        """The tiles, and their frames, of the images whose tokens stand before a token of the sample."""
        ids = self._batch.masked.input_ids[:token]
        features, tiles = int((ids == family.image_token_id).sum()), []
        for tile in self.tiles:
            if features <= 0:
                break
            features -= family.feature_count(tile)
            tiles.append(tile)
        count = sum(len(tile.frame_sizes) for tile in tiles)
        return tuple(tiles), tuple(self._frame(number) for number in range(count))

    def _frame(self, number: int) -> Tensor:
        width, height = self._sizes[number]
        stop = self._ends[number]
        flat = self._pixels[stop - width * height * 3 : stop]
        return torch.from_numpy(flat.reshape(height, width, 3).copy())


def in_row(task: ReadingTask, number: int) -> tuple[Tile, ...]:
    """The task's tiles as those of row `number` of a batch."""
    return tuple(replace(tile, sample=number) for tile in task.tiles)
