"""What a `tokenized` row says itself: its token ids, and which of them train."""

from typing import Any

import numpy as np

from mmray.errors import RowError
from mmray.images.source import one_line
from mmray.masks.labels import IGNORE_INDEX
from mmray.rows.document import missing_column
from mmray.rows.settings import DatasetSettings


def own_ids(value: dict[str, Any], dataset: DatasetSettings, vocabulary_size: int) -> np.ndarray:
    """The row's ids, int32 [n]. Raises RowError for none, and for ids that the tokenizer lacks."""
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


def own_mask(value: dict[str, Any], dataset: DatasetSettings, ids: np.ndarray) -> np.ndarray:
    """Which tokens train by the row's `sampled_mask` or its `labels`, bool [n].

    Raises RowError for a row with neither, and for one in which they disagree.
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
            "disagree on what trains; leave one of them out",
        )
    return sampled


def _labelled(found: object, column: str, ids: np.ndarray) -> np.ndarray:
    labels = _integers(found, column)
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


def _flags(found: object, column: str, num_tokens: int) -> np.ndarray:
    if not isinstance(found, list) or not all(isinstance(entry, int) and entry in (0, 1) for entry in found):
        raise RowError("wrong_type", f"{column} must be a list of true and false (or 1 and 0), not {found!r:.60}")
    _check_length(column, len(found), num_tokens)
    return np.asarray(found, dtype=bool)


def _check_length(column: str, length: int, num_tokens: int) -> None:
    if length != num_tokens:
        raise RowError(
            "wrong_type", f"the row has {num_tokens} tokens and {column} {length} entries; give one for each"
        )


def _integers(found: object, column: str) -> np.ndarray:
    if not isinstance(found, list) or not all(type(entry) is int for entry in found):
        raise RowError("wrong_type", f"{column} must be a list of integers, not {found!r:.60}")
    try:
        return np.asarray(found, dtype=np.int32)
    except OverflowError as error:
        raise RowError("wrong_type", f"{column} holds a number that is no token id: {one_line(error)}") from error
