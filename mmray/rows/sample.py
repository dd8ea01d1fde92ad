"""The two results of encoding a row: a sample, or a rejected row with its reason."""

import json
from dataclasses import dataclass, field

import numpy as np

from mmray.base.redact import redacted
from mmray.loss.rules import LossRule
from mmray.rows.image_refs import ImageRef

SHOWN_LETTERS = 500

NO_BLOCKS = np.zeros((0, 2), dtype=np.int32)


@dataclass(frozen=True)
class Sample:
    """One encoded row. A sample's position in its window is that of its row.

    source: the place of the row, `file:line`.
    bucket: the common shape of its images, `mixed`, or `text`.
    input_ids: its tokens, int32 [n].
    sizes: the upright (width, height) of each image in pixels.
    blocks: the first token and the number of tokens of each image, int32 [images, 2].
    given_mask: the tokens to train on, bool [n], for LossRule.GIVEN; else empty.
    """

    id: str
    source: str
    rule: LossRule
    bucket: str
    visual_tokens: int
    input_ids: np.ndarray
    images: tuple[ImageRef, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    blocks: np.ndarray = field(default_factory=lambda: NO_BLOCKS)
    given_mask: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    visual_pairs: int = 0
    """Sum over the tiles of their visual tokens squared, to which attention in the vision tower is proportional."""
    notes: tuple[str, ...] = ()
    """Flaws that were tolerated: one word for each image that has one (`ImageHeader.note`), and for what a chat
    template left out."""
    dataset: int = 0
    """The number of the row's data set in the split."""
    messages: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    """The message of each token, int32 [n] (-1: none), where the encoder was asked for it (`tells_messages`)."""
    roles: tuple[str, ...] = ()
    """The roles of a chat's messages."""
    columns: tuple[str, ...] = ()
    """The columns of the row by which its data set is judged (`mmray.rows.columns`)."""


@dataclass(frozen=True)
class RejectedRow:
    """A row that cannot be used. row: the row as JSON, shortened, for a person who searches for the cause."""

    id: str
    source: str
    reason: str
    message: str
    row: str
    dataset: int = 0
    columns: tuple[str, ...] = ()


def shown(value: object) -> str:
    """Shows a row as JSON: its first SHOWN_LETTERS, without passwords; `{}` for what is no row."""
    if not isinstance(value, dict):
        return "{}"
    try:
        text = json.dumps(value, default=lambda other: f"<{type(other).__name__}>", ensure_ascii=False)
    except RecursionError:
        return "{}"
    return redacted(text)[:SHOWN_LETTERS]
