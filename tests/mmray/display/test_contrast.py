"""All text of pages and cards is legible: contrast by the formula of WCAG 2, at least 4.5 to 1 in both themes."""

import re

import pytest

from mmray.display.html import template

SURFACES = {"page", "card"}
NO_TEXT = {"line"}  # rules and tracks
ON_OWN_SURFACE = {"trained-ink": "trained", "media-ink": "media"}


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    shares = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dark + 0.05)


def test_the_formula():
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.005)


def themes() -> list[dict[str, str]]:
    css = template("page.css.jinja").render()
    return [dict(re.findall(r"--([\w-]+): (#\w+)", theme)) for theme in css.split("prefers-color-scheme: dark")]


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_text_has_enough_contrast(theme):
    texts = theme.keys() - SURFACES - NO_TEXT - set(ON_OWN_SURFACE.values())
    assert {"ink", "soft", "good", "warn", "wrong", "grey", "role-0"} <= texts
    surfaces = {name: [theme[surface] for surface in SURFACES] for name in texts}
    for name, surface in ON_OWN_SURFACE.items():
        surfaces[name].append(theme[surface])
    pale = {name: min(contrast(theme[name], surface) for surface in surfaces[name]) for name in texts}
    assert {name: round(value, 2) for name, value in pale.items() if value < 4.5} == {}
