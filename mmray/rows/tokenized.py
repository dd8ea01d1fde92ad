"""Reads a `tokenized` row: its token ids, the tokens to train on, and where its images stand."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmray.base.words import one_line
from mmray.errors import RowError
from mmray.images import TilePlan
from mmray.loss.rules import IGNORE_INDEX
from mmray.rows.document import check_image_count
from mmray.rows.messages import missing_column
from mmray.rows.settings import DatasetSettings


def row_token_ids(value: dict[str, Any], dataset: DatasetSettings, vocabulary_size: int) -> np.ndarray:
    """Reads the row's token ids, int32 [n]. Raises RowError for a row without ids, and for ids that the tokenizer
    lacks."""
    column = dataset.column("input_ids")
    if value.get(column) is None:
        raise missing_column(repr(column), value)
    ids = _integers(value[column], column)
    if not len(ids):
        raise RowError("wrong_type", f"{column} has 0 entries; give the row's tokens or drop it")
    unknown = np.flatnonzero((ids < 0) | (ids >= vocabulary_size))
    if len(unknown):
        raise RowError(
            "wrong_type", f"{column}[{unknown[0]}] is {ids[unknown[0]]}: the tokenizer has 0 to {vocabulary_size - 1}"
        )
    return ids


def row_trained_mask(value: dict[str, Any], dataset: DatasetSettings, ids: np.ndarray) -> np.ndarray:
    """Marks the tokens to train on by the row's `sampled_mask` or `labels`, bool [n].

    Raises RowError for a row with neither of them, and for one in which they disagree.
    """
    label_column, mask_column = dataset.column("labels"), dataset.column("sampled_mask")
    labels, mask = value.get(label_column), value.get(mask_column)
    if labels is None and mask is None:
        raise missing_column(f"{label_column!r} and no {mask_column!r}", value)
    if labels is None:
        return _flags(mask, mask_column, len(ids))
    labelled = _labelled(labels, label_column, ids)
    if mask is None:
        return labelled
    sampled = _flags(mask, mask_column, len(ids))
    where = np.flatnonzero(labelled != sampled)
    if len(where):
        place = int(where[0])
        raise RowError(
            "wrong_type",
            f"{label_column}[{place}] is {labels[place]} but {mask_column}[{place}] is {int(sampled[place])}: they "
            "disagree on what is trained on; leave one of them out",
        )
    return sampled


def attended_tokens(value: dict[str, Any], dataset: DatasetSettings, num_tokens: int) -> np.ndarray:
    """Marks the tokens whose `attention_mask` is not 0, bool [n]; all tokens of a row without a mask.

    Raises RowError for a mask that does not fit the tokens.
    """
    column = dataset.column("attention_mask")
    mask = value.get(column)
    return np.ones(num_tokens, dtype=bool) if mask is None else _flags(mask, column, num_tokens)


def image_blocks(
    ids: np.ndarray, plans: Sequence[TilePlan], tiles: Sequence[list[tuple[np.ndarray, int]]], image_token_id: int
) -> tuple[np.ndarray, int]:
    """Finds where the images stand in a `tokenized` row's ids (`Sample.blocks`), and counts their visual tokens.

    tiles: for each image and each of its tiles, the tokens that it becomes and how many of them carry features.

    Raises RowError `image_tokens` unless each tile stands there with exactly these tokens: a wrong number, or images in
    another order than their tokens, would give the model the features of one image for another.
    """
    places = np.flatnonzero(ids == image_token_id)
    total = sum(visual for spans in tiles for _, visual in spans)
    if len(places) != total:
        check_image_count(0 if not len(places) else len(plans), len(plans))
        sizes = [plan.size for plan in plans]
        raise RowError(
            "image_tokens", f"input_ids hold {len(places)} image tokens; images of {sizes!r:.200} make {total}"
        )
    blocks, read = [], 0
    for number, spans in enumerate(tiles):
        first = stop = -1
        for token_ids, visual in spans:
            start = int(places[read]) - int(np.flatnonzero(token_ids == image_token_id)[0])
            stop = start + len(token_ids)
            if not np.array_equal(ids[max(start, 0) : stop], token_ids):
                raise RowError(
                    "image_tokens",
                    f"input_ids[{max(start, 0)}:{stop}] are not the {len(token_ids)} tokens of a tile of image "
                    f"{number}, of {plans[number].size}; write them in the order of images, as the processor does",
                )
            first = start if first < 0 else first
            read += visual
        blocks.append((first, stop - first))
    return np.asarray(blocks, dtype=np.int32).reshape(-1, 2), total


def _labelled(entries: object, column: str, ids: np.ndarray) -> np.ndarray:
    labels = _integers(entries, column)
    _check_length(column, len(labels), len(ids))
    labelled: np.ndarray = labels != IGNORE_INDEX
    wrong = np.flatnonzero(labelled & (labels != ids))
    if len(wrong):
        place = int(wrong[0])
        raise RowError(
            "wrong_type",
            f"{column}[{place}] is {labels[place]}: a label is its token ({ids[place]}) or {IGNORE_INDEX}",
        )
    return labelled


def _flags(entries: object, column: str, num_tokens: int) -> np.ndarray:
    if not isinstance(entries, list) or not all(isinstance(entry, int) and entry in (0, 1) for entry in entries):
        raise RowError("wrong_type", f"{column} must be a list of true and false (or 1 and 0), not {entries!r:.60}")
    _check_length(column, len(entries), num_tokens)
    return np.asarray(entries, dtype=bool)


def _check_length(column: str, length: int, num_tokens: int) -> None:
    if length != num_tokens:
        raise RowError(
            "wrong_type", f"the row has {num_tokens} tokens and {column} {length} entries; give one for each"
        )


def _integers(entries: object, column: str) -> np.ndarray:
    if not isinstance(entries, list) or not all(type(entry) is int for entry in entries):
        raise RowError("wrong_type", f"{column} must be a list of integers, not {entries!r:.60}")
    try:
        return np.asarray(entries, dtype=np.int32)
    except OverflowError as error:
        raise RowError("wrong_type", f"{column} holds a number that is no token id: {one_line(error)}") from error
