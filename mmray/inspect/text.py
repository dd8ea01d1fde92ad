"""Decodes token ids into the text that a person reads, piece by piece."""

from collections.abc import Callable, Sequence

MAX_BYTES_OF_A_CHARACTER = 4
"""Most bytes of a character in UTF-8; a byte-level token may hold a single one of them."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def token_texts(
    ids: Sequence[int], decode: Callable[[list[int]], str], *, before: Sequence[int] = ()
) -> list[tuple[int, str]]:
    """Decode tokens into pieces (number of tokens, text), in order; the texts joined are the text of all tokens.

    decode: the tokenizer's function; before: the tokens before these.

    A piece has more than one token when only several tokens make a character. Each piece is decoded after the one
    before it, whose text is then cut off: alone, many tokenizers drop the space that a token begins with.
    """
    ids = [*before, *ids]
    pieces: list[tuple[int, str]] = []
    context, start = 0, len(before)
    for stop in range(start + 1, len(ids) + 1):
        known, text = decode(ids[context:start]), decode(ids[context:stop])
        is_waiting = text.endswith(_UNFINISHED) and stop < len(ids) and stop - start < MAX_BYTES_OF_A_CHARACTER
        if is_waiting:
            continue
        piece_text = text.removeprefix(known) if text.startswith(known) else decode(ids[start:stop])
        pieces.append((stop - start, piece_text))
        context, start = start, stop
    return pieces
