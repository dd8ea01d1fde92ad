"""Pictures of numbers with rows, on which a model of two layers learns to read within minutes.

A picture is a row of cells of 28 x 28 pixels, which is one visual token of Qwen2-VL, with a digit in each: in one of
three typefaces, shifted by some pixels, in some shade of grey. The numbers are random, so nothing but the picture tells
them: a model that writes unseen ones right reads, and it does so only if sizes, tiles, their order, positions and
labels were right at every step of its way.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random

import matplotlib
from PIL import Image, ImageDraw, ImageFont

CELL = 28
"""Width and height of a digit's cell in pixels."""
DIGITS = 4
_FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")
_FONT_SIZE = 24
_MOST_SHIFT = 2


def write_numbers(
    folder: str | Path, split: str, num_pages: int, *, seed: int = 0, digits: Sequence[int] = (1, 2, 4),
    fonts: int = len(_FONTS),
) -> Path:  # fmt: skip
    """Writes `num_pages` pictures and `SPLIT.jsonl` with a row for each, `{id, text, images}`; returns its path.

    Same arguments, Pillow and matplotlib (whose fonts are used), same files. Splits have different numbers: one in
    eight is of the split `eval`, and none of these in another split.
    """
    folder = Path(folder)
    (folder / split).mkdir(parents=True, exist_ok=True)
    random = Random(f"mmray/{seed}/numbers/{split}")
    lines = []
    for index in range(num_pages):
        number = _number(random, digits[index % len(digits)], held_out=split == "eval")
        path = f"{split}/{index:05d}.png"
        draw_number(number, random, fonts).save(folder / path)
        row = {"id": f"number-{split}-{index:05d}", "text": f"<image>\n{number}", "images": [path]}
        lines.append(json.dumps(row))
    rows = folder / f"{split}.jsonl"
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


def draw_number(number: str, random: Random, fonts: int = len(_FONTS)) -> Image.Image:
    """The picture of a number, grey on white."""
    page = Image.new("L", (CELL * len(number), CELL), 255)
    pen = ImageDraw.Draw(page)
    font = _font(_FONTS[random.randrange(fonts)])
    for cell, digit in enumerate(number):
        x, y = (random.randint(-_MOST_SHIFT, _MOST_SHIFT) for _ in "xy")
        place = (cell * CELL + CELL // 2 + x, CELL // 2 + y)
        pen.text(place, digit, fill=random.randint(0, 80), font=font, anchor="mm")
    return page


def _number(random: Random, digits: int, *, held_out: bool) -> str:
    """A random number of the wanted split."""
    while True:
        number = random.randrange(10**digits)
        if digits < 3 or (number % 8 == 0) == held_out:
            return f"{number:0{digits}d}"


@cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf" / name, _FONT_SIZE)
