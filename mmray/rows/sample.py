"""What becomes of a row: a sample, or a rejected row with its reason."""

import json
from dataclasses import dataclass, field

import numpy as np

from mmray.base.redact import redacted
from mmray.loss.labels import LossRule
from mmray.rows.image_refs import ImageRef

SHOWN_LETTERS = 500

NO_BLOCKS = np.zeros((0, 2), dtype=np.int32)


@dataclass(frozen=True)
class Sample:
    """One row, encoded. A sample's position in its window is that of its row.

    input_ids: int32 [n]; given: bool [n] for LossRule.GIVEN, else empty; blocks: int32 [images, 2], the first token
    and the number of tokens that stand for each image; sizes: upright (width, height) of each image in pixels.
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
    """Sum over its tiles of their visual tokens squared: what attention in the vision tower grows with."""
    notes: tuple[str, ...] = ()
    """What was passed over in its images (`ImageHeader.note`), a word for each image that has one; and what a chat
    template left out."""
    dataset: int = 0
    """The number of its set of rows in the split."""
    messages: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    """The message of each token, int32 [n] (-1: of none), where the encoder was asked for it (`tells_messages`)."""
    roles: tuple[str, ...] = ()
    """Of a chat's messages."""
    columns: tuple[str, ...] = ()
    """Of its row, those that its set is judged by (`mmray.rows.columns`)."""


@dataclass(frozen=True)
class RejectedRow:
    """A row that cannot be used. row: the row as JSON, shortened, for a person who looks for the cause."""

    id: str
    source: str
    reason: str
    message: str
    row: str
    dataset: int = 0
    columns: tuple[str, ...] = ()


def shown(value: object) -> str:
    """A row as JSON, its first SHOWN_LETTERS, without passwords; what is no row has nothing to show."""
    if not isinstance(value, dict):
        return "{}"
    try:
        text = json.dumps(value, default=lambda other: f"<{type(other).__name__}>", ensure_ascii=False)
    except RecursionError:
        return "{}"
    return redacted(text)[:SHOWN_LETTERS]
