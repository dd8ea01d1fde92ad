"""Token ids as the text a person reads, piece by piece."""

from collections.abc import Callable, Sequence

MAX_BYTES_OF_A_CHARACTER = 4
"""In UTF-8: a byte-level token may hold one of them only."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def token_texts(
    ids: Sequence[int], decode: Callable[[list[int]], str], *, before: Sequence[int] = ()
) -> list[tuple[int, str]]:
    """The text of each token, joined the text of all of them: (number of tokens, text) in order.

    The number is more than 1 where only several tokens make a character. decode: the tokenizer's; before: the tokens
    that stand before these. Each piece is decoded behind the one before it, and that one's text cut off: alone, many
    tokenizers drop the space that a token begins with.
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
