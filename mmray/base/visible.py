"""Makes text of the data safe to show: control characters become visible and have no effect."""

# Formatting characters that reorder the text around them or cannot be seen: in training data both are worth knowing.
_FORMATTING = (0x200B, 0x200E, 0x200F, *range(0x2028, 0x202F), 0x2060, *range(0x2066, 0x206A), 0xFEFF)

_VISIBLE: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) != "\t"},
    ord("\n"): "↵\n",
    127: "\N{SYMBOL FOR DELETE}",
    **{code: f"⟨U+{code:04X}⟩" for code in (*range(128, 160), *_FORMATTING)},
}


def visible(text: str) -> str:
    """Replace control and formatting characters of a text by visible signs, and mark line breaks (`↵`)."""
    return text.translate(_VISIBLE)
