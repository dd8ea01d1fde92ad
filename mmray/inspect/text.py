"""Token ids as the text a person reads: piece by piece, and with nothing in it that acts on what shows it."""

from collections.abc import Callable, Sequence

MAX_BYTES_OF_A_CHARACTER = 4
"""In UTF-8: a byte-level token may hold one of them only."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"

# Formatting characters that reorder the text around them or cannot be seen: in training data both are worth knowing.
_FORMATTING = (0x200B, 0x200E, 0x200F, *range(0x2028, 0x202F), 0x2060, *range(0x2066, 0x206A), 0xFEFF)

_VISIBLE: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) != "\t"},
    ord("\n"): "↵\n",
    127: "\N{SYMBOL FOR DELETE}",
    **{code: f"⟨U+{code:04X}⟩" for code in (*range(128, 160), *_FORMATTING)},
}


def visible(text: str) -> str:
    """Text of the data with its control characters as pictures and its line breaks marked (`↵`)."""
    return text.translate(_VISIBLE)


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
        own = text.removeprefix(known) if text.startswith(known) else decode(ids[start:stop])
        pieces.append((stop - start, own))
        context, start = start, stop
    return pieces
