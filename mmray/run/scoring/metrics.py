"""Error rates of what a model reads: characters, words, exact rows, and lengths.

All rates are micro-averaged: errors of all rows over characters (words) of all references. In a mean of the rows'
rates, ten short lines would outweigh a page on which nothing was read. Edit distances are Levenshtein's, by rapidfuzz.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rapidfuzz.distance import Levenshtein

from mmray.base.settings import Settings

_MARKS = (
    (re.compile(r"^[ \t]*(?:#{1,6}[ \t]+|>[ \t]?|[-*+][ \t]+|\d+[.)][ \t]+)", re.M), ""),  # headings, quotes, lists
    (re.compile(r"^[ \t|:-]*\|[ \t|:-]*$", re.M), ""),  # the line under a table's head
    (re.compile(r"!?\[([^\]\n]*)\]\([^)\n]*\)"), r"\1"),  # links and images: their text
    (re.compile(r"\*\*|__|`+|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)"), ""),  # emphasis and code
    (re.compile(r"[ \t]*\|[ \t]*"), " "),  # the cells of tables
)


class Normalisation(Settings):
    """Differences that do not count as errors: both texts are normalised before they are compared."""

    unicode: Literal["NFC", "NFKC"] | None = "NFC"
    """Unicode form: NFC joins a letter with its accent; NFKC also turns ligatures and full-width letters into plain
    ones.
    null: code points are compared as they are.
    """

    ignore_case: bool = False
    """Compare without regard to case, by Unicode's case folding."""

    white_space: Literal["collapse", "keep"] = "collapse"
    """collapse: white space between words counts as one space, and at the ends as none. keep: it is compared as it
    is."""

    markdown: Literal["keep", "strip"] = "keep"
    """strip: marks of headings, quotes, lists, tables, emphasis and code are removed, and a link is reduced to its
    text."""

    def of(self, text: str) -> str:
        """The text in its normalised form."""
        if self.markdown == "strip":
            for pattern, replacement in _MARKS:
                text = pattern.sub(replacement, text)
        if self.unicode is not None:
            text = unicodedata.normalize(self.unicode, text)
        if self.ignore_case:
            text = text.casefold()
        return " ".join(text.split()) if self.white_space == "collapse" else text


@dataclass(frozen=True)
class RowScores:
    """The counts of one row, from texts in their normalised form."""

    characters: int
    """Code points of the reference."""
    predicted_characters: int
    """Code points of the prediction."""
    character_errors: int
    """Insertions, deletions and substitutions that turn one text into the other."""
    words: int
    """Words of the reference, separated by white space."""
    word_errors: int
    """Insertions, deletions and substitutions of words that turn one text into the other."""
    is_exact: bool
    """True if the texts are equal."""

    @property
    def cer(self) -> float | None:
        """Character errors over the reference's characters; None where the reference is empty."""
        return _rate(self.character_errors, self.characters)


def score_row(reference: str, prediction: str, normalisation: Normalisation | None = None) -> RowScores:
    """Compares a prediction with the text of the page."""
    normalisation = normalisation or Normalisation()
    expected, predicted = normalisation.of(reference), normalisation.of(prediction)
    words = expected.split()
    return RowScores(
        characters=len(expected),
        predicted_characters=len(predicted),
        character_errors=Levenshtein.distance(expected, predicted),
        words=len(words),
        word_errors=Levenshtein.distance(words, predicted.split()),
        is_exact=expected == predicted,
    )


@dataclass(frozen=True)
class Scores:
    """The metrics of several rows. A rate whose denominator is 0 is None."""

    rows: int
    """Number of rows that were compared."""
    cer: float | None
    """Character error rate: errors over characters of the references. It exceeds 1 where a model repeats itself."""
    wer: float | None
    """Word error rate: errors over words of the references."""
    normalised_edit_distance: float | None
    """Character errors over the characters of the longer text of each row: 0 for equal texts, 1 for nothing in
    common."""
    exact_match: float | None
    """Share of rows read without an error."""
    length_ratio: float | None
    """Characters of the predictions over those of the references: far above 1 where a model repeats itself, far below 1
    where it stops early."""

    @classmethod
    def of(cls, rows: Iterable[RowScores]) -> "Scores":
        """The metrics over some rows."""
        rows = list(rows)
        characters = sum(row.characters for row in rows)
        errors = sum(row.character_errors for row in rows)
        return cls(
            rows=len(rows),
            cer=_rate(errors, characters),
            wer=_rate(sum(row.word_errors for row in rows), sum(row.words for row in rows)),
            normalised_edit_distance=_rate(errors, sum(max(row.characters, row.predicted_characters) for row in rows)),
            exact_match=_rate(sum(row.is_exact for row in rows), len(rows)),
            length_ratio=_rate(sum(row.predicted_characters for row in rows), characters),
        )


def _rate(count: int, of: int) -> float | None:
    return count / of if of else None
