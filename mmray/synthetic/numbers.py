"""Pictures of numbers, with rows and a model of two layers that learns to read them within a minute of CPU time.

A picture is a row of cells of 28 x 28 pixels, each one visual token of Qwen2-VL, with a digit in each: in one of three
typefaces, shifted by some pixels, in some shade of grey. Pictures have one, two or four cells, so that they differ in
size, tiles and tokens. The numbers are random: nothing but the picture tells them, and a model that writes unseen ones
right was trained, exported and prompted with the right sizes, tiles, order, positions and labels.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from mmray.images import TilingPolicy, plan_tiles
from mmray.synthetic.documents import sample_texts
from mmray.synthetic.models import small_config
from mmray.synthetic.processors import write_processor

CELL = 28
"""Width and height of a digit's cell in pixels."""
DIGITS = (1, 2, 4)
"""Numbers of digits, in turn."""
PROMPT = "<image>\n"
"""Text of a row before its number."""
HELD_OUT = 8
"""One in so many numbers of four digits is in the split `eval` alone."""

_FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")
_FONT_SIZE = 24
_MOST_SHIFT = 2


def write_numbers(
    folder: str | Path, split: str, num_pages: int, *, digits: Sequence[int] = DIGITS, seed: int = 0
) -> Path:
    """Writes `num_pages` pictures and `numbers-SPLIT.jsonl` with a row for each; returns the path of that file.

    Same arguments, Pillow and matplotlib (whose fonts are used), same files. No number of four digits or more is in
    both the split `eval` and another one.
    """
    folder = Path(folder)
    (folder / "numbers").mkdir(parents=True, exist_ok=True)
    random, lines = Random(f"mmray/{seed}/numbers/{split}"), []
    for index in range(num_pages):
        number = _number(random, digits[index % len(digits)], held_out=split == "eval")
        path = f"numbers/{split}-{index:05d}.png"
        draw_number(number, random).save(folder / path)
        lines.append(json.dumps({"id": f"number-{index:05d}", "text": PROMPT + number, "images": [path]}))
    rows = folder / f"numbers-{split}.jsonl"
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


def draw_number(number: str, random: Random) -> Image.Image:
    """The picture of a number, grey on white, CELL pixels high."""
    page = Image.new("L", (CELL * len(number), CELL), 255)
    pen, font = ImageDraw.Draw(page), _font(random.choice(_FONTS))
    for cell, digit in enumerate(number):
        x, y = (random.randint(-_MOST_SHIFT, _MOST_SHIFT) for _ in "xy")
        place = (cell * CELL + CELL // 2 + x, CELL // 2 + y)
        pen.text(place, digit, fill=random.randint(0, 80), font=font, anchor="mm")
    return page


def write_reader(folder: str | Path) -> None:
    """Writes `processor` and `model` (a config.json: random weights) of a small Qwen2-VL that learns to read.

    It differs from `write_processor` and `small_config` in what decides how fast a model of this size learns: white is
    0 to the model, since the same large value in a thousand pixels hides the strokes (200 steps were not enough, 100
    now are); weights start five times as large, for a width of 64 and not of thousands; positions turn as fast in 8
    pairs as they do in the 64 of a large model. Labels of tiles are words of the tokenizer.
    """
    policy = TilingPolicy(grid=(3, 4), tile_size=(CELL, CELL), overview=(CELL, CELL), labels=True)
    labels = [label or "" for label in plan_tiles((CELL, CELL), policy).labels]
    processor = write_processor(
        Path(folder) / "processor", "qwen2_vl", [*sample_texts(), *labels * 20],
        image_processor={"image_mean": [1.0] * 3, "image_std": [0.3] * 3},
    )  # fmt: skip
    spread = {"initializer_range": 0.1}
    config = small_config("qwen2_vl", processor, text_config=dict(spread), vision_config=dict(spread), **spread)
    config.text_config.rope_parameters["rope_theta"] = 30.0
    config.save_pretrained(Path(folder) / "model")


def _number(random: Random, digits: int, *, held_out: bool) -> str:
    """A random number of a split."""
    while True:
        number = random.randrange(10**digits)
        if digits < 4 or (number % HELD_OUT == 0) == held_out:
            return f"{number:0{digits}d}"


@cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf" / name, _FONT_SIZE)
