"""Finds typed text that a job would take for the start or the end of a turn, where markers are plain text.

LLaVA writes `ASSISTANT:` before an answer, and a user may type the same. Rejecting every row with a marker would reject
much harmless prose (`User:` inside an answer opens no turn where only the answer's end is searched for), so the search
only selects rows for a closer check. These are rendered once more with each typed marker replaced by as many letters x,
and both texts are scanned as in training: a row is good if its turns begin and end at the same characters in both.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tokenizers import Tokenizer

from mmray.errors import RowError
from mmray.families import Family
from mmray.families.base import RoleMarkers
from mmray.loss.roles import RoleBoundary
from mmray.loss.turns import opened_turns
from mmray.rows.messages import Part

_BLANKS = r"[\s\u2581]+"
"""Matches blanks, including U+2581, which Sentencepiece writes for a space and reads as one."""


class TypedMarkers:
    """Searches typed text for the turn markers of a job."""

    def __init__(self, family: Family, markers: Sequence[RoleMarkers], boundaries: Sequence[RoleBoundary]) -> None:
        """Prepares the search. boundaries: the markers as tokens, in the order of `markers`."""
        self.boundaries = tuple(boundaries)
        self._backend: Tokenizer = family.tokenizer.backend_tokenizer
        self.special_tokens = _special_tokens(family, markers)
        """Special tokens in the markers, at which text is split before anything else; they must not be typed."""
        texts = {text.strip() for marker in markers for text in (marker.start, marker.end)} - {""}
        longest_first = sorted(texts, key=lambda text: (-len(text), text))
        patterns = [_BLANKS.join(map(re.escape, text.split())) for text in longest_first]
        self._typed = re.compile("|".join(patterns) or r"(?!)")

    def markers_in(self, parts: Sequence[Part]) -> list[str]:
        """Returns the markers typed in a message's content."""
        return [match.group() for match in self._typed.finditer(_joined(parts))]

    def blanked(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """Replaces each typed marker in a content by as many letters x."""
        text = self._typed.sub(lambda match: "x" * len(match.group()), _joined(parts))
        blanked, read = [], 0
        for part in parts:
            stop = read + len(_NO_TEXT if part.text is None else part.text)
            blanked.append(part if part.text is None else replace(part, text=text[read:stop]))
            read = stop
        return tuple(blanked)

    def check(self, text: str, blanked: str, typed: Sequence[tuple[str, str]]) -> None:
        """Raises RowError unless a row's text has the same turns as the text with typed markers blanked.

        text, blanked: both texts as the tokenizer gets them.
        typed: (where, marker) of each blanked marker.
        """
        turns, expected_turns = self._places(text), self._places(blanked)
        if turns == expected_turns:
            return
        begun = [text[start:] for _, start, _ in turns if start not in {place for _, place, _ in expected_turns}]
        where, marker = next(
            (
                typed_marker
                for typed_marker in typed
                for text_onward in begun
                if text_onward.lstrip().startswith(typed_marker[1])
            ),
            typed[0],
        )
        raise RowError(
            "special_token_in_text",
            f"{where} holds {marker!r}, by which the turns of a chat are found: the row would be read as other turns "
            "than it has; write it differently",
        )

    def _places(self, text: str) -> list[tuple[str, int, int]]:
        """Returns the role, first character and end of each turn."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        turns = opened_turns(np.asarray(encoding.ids, dtype=np.int64), self.boundaries)
        offsets = encoding.offsets
        return [
            (self.boundaries[turn.boundary].role, offsets[turn.start][0], offsets[turn.stop - 1][1]) for turn in turns
        ]


_NO_TEXT = "\0"


def _joined(parts: Sequence[Part]) -> str:
    """Joins parts as templates write them, because a marker could be typed half in one part and half in the next."""
    return "".join(_NO_TEXT if part.text is None else part.text for part in parts)


def _special_tokens(family: Family, markers: Sequence[RoleMarkers]) -> tuple[str, ...]:
    tokenizer = family.tokenizer
    special = {*map(str, tokenizer.get_added_vocab()), *map(str, tokenizer.all_special_tokens)}
    texts = [text for marker in markers for text in (marker.start, marker.end)]
    return tuple(sorted(token for token in special if token.strip() and any(token in text for text in texts)))
