"""Pictures of numbers: rows fit pictures, splits share no number, and the model sees white as 0."""

import json
from random import Random

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from mmray.families import load_processor
from mmray.synthetic.numbers import CELL, PROMPT, draw_number, write_numbers, write_reader


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_name_pictures_of_their_numbers(tmp_path):
    rows = rows_of(write_numbers(tmp_path, "train", 30))
    assert len({row["id"] for row in rows}) == 30
    for row in rows:
        number = row["text"].removeprefix(PROMPT)
        assert number.isdecimal()
        (picture,) = row["images"]
        assert Image.open(tmp_path / picture).size == (CELL * len(number), CELL)
    assert {len(row["text"]) - len(PROMPT) for row in rows} == {1, 2, 4}


def test_splits_share_no_long_number_and_are_drawn_alike_each_time(tmp_path):
    train = rows_of(write_numbers(tmp_path / "a", "train", 400, digits=[4]))
    held_out = rows_of(write_numbers(tmp_path / "a", "eval", 99, digits=[4]))
    assert not {row["text"] for row in train} & {row["text"] for row in held_out}
    again = write_numbers(tmp_path / "b", "train", 400, digits=[4])
    assert rows_of(again) == train
    for row in train[:20]:
        name = row["images"][0]
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("digit", range(10))
def test_a_digit_stays_in_its_cell(digit):
    """Beside a digit of the widest shift, the next cell's border is white."""
    for seed in range(20):
        page = np.asarray(draw_number(str(digit), Random(seed)))
        border = np.concatenate([page[0], page[-1], page[:, 0], page[:, -1]])
        assert border.min() > 200
        assert page.min() <= 100


def test_the_model_sees_white_as_0_and_strokes_as_the_rest(tmp_path):
    write_reader(tmp_path)
    processor = load_processor(tmp_path / "processor")
    white = processor.image_processor(images=[Image.new("RGB", (56, 56), "white")], return_tensors="np")
    assert np.abs(white["pixel_values"]).max() < 1e-6
    config = AutoConfig.from_pretrained(tmp_path / "model")
    model = AutoModelForImageTextToText.from_config(config)
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight
    assert weight.std().item() == pytest.approx(0.1, rel=0.1)
    vision = model.model.visual.blocks[0].mlp.fc1.weight
    assert vision.std().item() == pytest.approx(0.1, rel=0.1)
