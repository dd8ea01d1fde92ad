"""Computes where tokens stand in their text without asking the tokenizer.

The tokenizer returns offsets only from a call that takes half as long again, and as long once more to hand them over.
The bytes of each token of the vocabulary are known. Where the joined bytes of the tokens equal the text, or the
normalised text, the places are a running sum; otherwise the tokenizer is asked after all.
"""

from collections.abc import Callable, Sequence

import numpy as np
from tokenizers import Tokenizer

Span = tuple[int, int]


class TokenPlaces:
    """Computes the places of a tokenizer's tokens."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        token_bytes = _token_bytes(backend)
        self._bytes = np.frombuffer(b"".join(token_bytes), dtype=np.uint8)
        self._lengths = np.asarray([len(token) for token in token_bytes], dtype=np.int64)
        self._starts = self._lengths.cumsum() - self._lengths

    def of(self, text: str, ids: np.ndarray, *, add_special_tokens: bool) -> "PlacedTokens":
        """Returns the tokens of a text with their places. ids: the tokens that the tokenizer returned, int [n]."""
        lengths = self._lengths[ids]
        stops = lengths.cumsum()
        joined = self._joined(ids, lengths, stops)
        for normalise in (_as_it_is, self._normalised):
            written = normalise(text).encode()
            if joined.endswith(written):
                stops -= len(joined) - len(written)
                return PlacedTokens(text, written, np.maximum(stops - lengths, 0), np.maximum(stops, 0), normalise)
        offsets = self._backend.encode(text, add_special_tokens=add_special_tokens).offsets
        starts, stops = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
        return PlacedTokens(text, None, starts, stops)

    def _joined(self, ids: np.ndarray, lengths: np.ndarray, stops: np.ndarray) -> bytes:
        """Joins the bytes of tokens. One gather takes two fifths of the time of joining objects."""
        moved = self._starts[ids] - (stops - lengths)
        return self._bytes[np.arange(stops[-1] if len(stops) else 0) + moved.repeat(lengths)].tobytes()

    def _normalised(self, text: str) -> str:
        """Normalises a text as the tokenizer does, with every kind of space as a plain space."""
        normalizer = self._backend.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text)).replace("\u2581", " ")


def _as_it_is(text: str) -> str:
    return text


class PlacedTokens:
    """The tokens of one text with their places, in bytes of `written` where that is given, else in letters."""

    def __init__(
        self, text: str, written: bytes | None, starts: np.ndarray, stops: np.ndarray,
        normalise: Callable[[str], str] = _as_it_is,
    ) -> None:  # fmt: skip
        self._text, self._starts, self._stops, self._normalise = text, starts, stops, normalise
        self._written: str | bytes = text if written is None else written
        self._in_bytes = written is not None and (len(written) != len(text) or normalise is not _as_it_is)

    def __len__(self) -> int:
        return len(self._starts)

    def within(self, spans: Sequence[Span]) -> np.ndarray:
        """Marks the tokens of spans of letters, bool [n].

        A token that extends beyond a span belongs to it if more than blanks of the token lie in the span: LLaVA's next
        `▁USER` begins with the space behind an answer.
        """
        inside = np.zeros(len(self), dtype=bool)
        for start, stop in self._scaled(spans):
            first, last = self._overlapping(start, stop)
            if last > first and self._stops[last - 1] > stop and self._is_blank(int(self._starts[last - 1]), stop):
                last -= 1
            inside[first:last] = True
        return inside

    def holding(self, span: Span) -> slice:
        """Returns the tokens that hold a span's text and, besides it, only blanks."""
        ((start, stop),) = self._scaled([span])
        first, last = self._overlapping(start, stop)
        while first < last and not self._is_blank(int(self._starts[first]), start):
            first += 1
        while last > first and not self._is_blank(stop, int(self._stops[last - 1])):
            last -= 1
        return slice(first, last)

    def text_of(self, tokens: slice) -> str:
        """Returns the text from the first to the last of a range of tokens."""
        piece = self._written[int(self._starts[tokens][0]) : int(self._stops[tokens][-1])]
        return piece.decode(errors="replace") if isinstance(piece, bytes) else piece

    def _overlapping(self, start: int, stop: int) -> tuple[int, int]:
        first = int(np.searchsorted(self._stops, start, side="right"))
        return first, max(first, int(np.searchsorted(self._starts, stop, side="left")))

    def _is_blank(self, start: int, stop: int) -> bool:
        return not self._written[start:stop].strip()

    def _scaled(self, spans: Sequence[Span]) -> list[Span]:
        """Converts spans of letters to the unit of the places."""
        if not self._in_bytes:
            return list(spans)
        scaled: dict[int, int] = {}
        letters = place = 0
        for border in sorted({border for span in spans for border in span}):
            place += len(self._normalise(self._text[letters:border]).encode())
            letters = border
            scaled[border] = place
        return [(scaled[start], scaled[stop]) for start, stop in spans]


def _token_bytes(backend: Tokenizer) -> list[bytes]:
    """Returns the bytes of each token of the vocabulary."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    by_letter = _byte_letters()
    is_byte_level = "\u0120" in vocabulary  # how byte-level vocabularies write a space
    token_bytes = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        if number in added:
            token_bytes[number] = added[number].content.encode()
        elif is_byte_level:
            token_bytes[number] = bytes(by_letter.get(letter, 0) for letter in token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            token_bytes[number] = bytes([int(token[3:5], 16)])
        else:
            token_bytes[number] = token.replace("\u2581", " ").encode()
    return token_bytes


def _byte_letters() -> dict[str, int]:
    """Returns the byte for each letter of a byte-level vocabulary, as in GPT-2: printable bytes are themselves, the
    others are letters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
