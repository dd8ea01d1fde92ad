"""Measures rows: their tokens, visual tokens, text and pixels.

The text of a row is what the model is to write: the trained tokens that are neither special nor white space. A page's
text can so be compared with its pixels, whatever the kind of its row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np

from mmray.families import Family
from mmray.images import plan_tiles
from mmray.loss.labels import LabelMaker
from mmray.loss.rules import IGNORE_INDEX
from mmray.loss.settings import loss_of_record
from mmray.prepared.dataset import Bin, PreparedDataset
from mmray.prepared.sample_columns import BINS_PER_ROW_GROUP
from mmray.prepared.versions import run_labels
from mmray.rows.sample import Sample

Item = TypeVar("Item")

MOST_TOKENS = 16_000_000
"""Most tokens of a prepared dataset that are read to measure its rows; they take about 4 s."""


@dataclass(frozen=True)
class RowMeasures:
    """Measures of some rows, one entry for each row; numbers are int64 [rows]."""

    sets: np.ndarray
    """Number of the row's set of rows in its split; -1 where the dataset does not say."""
    tokens: np.ndarray
    visual_tokens: np.ndarray
    text_tokens: np.ndarray
    """Trained tokens that are neither special nor white space."""
    images: np.ndarray
    """Number of images."""
    pixels: np.ndarray
    """Area of all images, upright, before they are cut or resized."""
    buckets: np.ndarray
    """Image shape by which the row is packed, str [rows]."""
    ids: np.ndarray
    """The row's id, str [rows]."""
    sources: np.ndarray
    """The row's place, `file:line`, str [rows]."""
    pictures: np.ndarray
    """Path or URI of the row's first image, str [rows]; empty without one, and for bytes in the row."""

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: np.ndarray) -> "RowMeasures":
        """The measures of some rows, by their numbers or a mask."""
        return RowMeasures(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @classmethod
    def joined(cls, parts: Sequence["RowMeasures"]) -> "RowMeasures":
        """The measures of several groups of rows, at least one."""
        return cls(
            **{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)}
        )

    @classmethod
    def none(cls) -> "RowMeasures":
        """The measures of no row."""
        numbers, texts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=object)
        return cls(numbers, numbers, numbers, numbers, numbers, numbers, texts, texts, texts, texts)


def measured_samples(samples: Sequence[Sample], labels: Sequence[np.ndarray], family: Family) -> RowMeasures:
    """Measures encoded rows. labels: those of each row, from `sample_labels`."""
    if not samples:
        return RowMeasures.none()
    words = _Words(family)
    return RowMeasures(
        sets=_numbers(sample.dataset for sample in samples),
        tokens=_numbers(len(sample.input_ids) for sample in samples),
        visual_tokens=_numbers(sample.visual_tokens for sample in samples),
        text_tokens=_numbers(words.count(label_ids) for label_ids in labels),
        images=_numbers(len(sample.images) for sample in samples),
        pixels=_numbers(sum(width * height for width, height in sample.sizes) for sample in samples),
        buckets=_texts(sample.bucket for sample in samples),
        ids=_texts(sample.id for sample in samples),
        sources=_texts(sample.source for sample in samples),
        pictures=_texts(sample.images[0].uri if sample.images else "" for sample in samples),
    )


def measured_bins(prepared: PreparedDataset, family: Family, *, most_tokens: int = MOST_TOKENS) -> RowMeasures:
    """Measures the rows of a prepared dataset.

    family: that of the processor it was prepared with.
    most_tokens: of more tokens, evenly spaced groups of bins are read.
    """
    labels = run_labels(prepared, loss_of_record(prepared.manifest["record"]["loss"]), family)
    words = _Words(family)
    parts = [
        _measured_bin(prepared, shown, labels, words, family)
        for group in _groups_to_read(prepared, most_tokens)
        for shown in prepared.bins(group.start, group.stop)
    ]
    return RowMeasures.joined(parts) if parts else RowMeasures.none()


def _groups_to_read(prepared: PreparedDataset, most_tokens: int) -> list[range]:
    """The bin numbers of the row groups to read: all of them, or evenly spaced ones."""
    groups = [
        range(first, min(first + BINS_PER_ROW_GROUP, bins.stop))
        for bins in prepared.files.values()
        for first in range(bins.start, bins.stop, BINS_PER_ROW_GROUP)
    ]
    share = most_tokens / max(prepared.statistics["tokens"], 1)
    return spaced(groups, max(1, int(len(groups) * share)))


def _measured_bin(
    prepared: PreparedDataset, shown: Bin, labels: LabelMaker, words: "_Words", family: Family
) -> RowMeasures:
    rows = len(shown.sample_ids)
    given_mask = shown.given_mask if len(shown.given_mask) else np.zeros(len(shown.input_ids), dtype=bool)
    blocks = [(image["first_token"], image["num_tokens"]) for image in shown.images]
    label_ids = labels.of_arrays(shown.input_ids, shown.sample_lengths, shown.sample_rules, given_mask, blocks)
    starts = np.cumsum(shown.sample_lengths)[:-1]
    images, pixels = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64)
    tiles: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    pictures = [""] * rows
    for image in shown.images:
        row, size = image["sample"], (image["width"], image["height"])
        pictures[row] = pictures[row] or image["uri"] or ""
        images[row] += 1
        pixels[row] += size[0] * size[1]
        tiles[row] += plan_tiles(size, prepared.tiling).tile_sizes
    return RowMeasures(
        sets=shown.sample_sets.astype(np.int64),
        tokens=shown.sample_lengths.astype(np.int64),
        visual_tokens=_numbers(sum(family.span(size, len(sizes)).visual_tokens for size in sizes) for sizes in tiles),
        text_tokens=_numbers(words.count(part) for part in np.split(label_ids, starts)),
        images=images,
        pixels=pixels,
        buckets=np.full(rows, shown.bucket, dtype=object),
        ids=_texts(shown.sample_ids),
        sources=_texts(shown.sample_sources),
        pictures=_texts(pictures),
    )


class _Words:
    """Counts the tokens of texts, without special tokens and white space."""

    def __init__(self, family: Family) -> None:
        self._tokenizer = family.tokenizer
        self._known: dict[int, bool] = {}

    def count(self, token_ids: np.ndarray) -> int:
        return sum(map(self._is_text, token_ids[token_ids != IGNORE_INDEX].tolist()))

    def _is_text(self, token_id: int) -> bool:
        if token_id not in self._known:
            self._known[token_id] = bool(self._tokenizer.decode([token_id], skip_special_tokens=True).strip())
        return self._known[token_id]


def _numbers(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)


def _texts(values: Iterable[str]) -> np.ndarray:
    values = list(values)
    texts = np.empty(len(values), dtype=object)
    texts[:] = values
    return texts


def spaced(items: list[Item], most: int) -> list[Item]:
    """Pick at most `most` items, evenly spaced, in order."""
    if len(items) <= most:
        return items
    return [items[place] for place in np.linspace(0, len(items) - 1, most).round().astype(int).tolist()]
