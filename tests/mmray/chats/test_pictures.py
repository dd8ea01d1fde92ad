"""The pictures of a chat are those that its parts name: told by the colour of a pixel."""

import json

import numpy as np
import pytest

from mmray.images import load_image
from mmray.rows.sample import RejectedRow
from tests.mmray.chats.oracle import SHARED, preparation_of

ROWS = SHARED / "oddities/rows/chat"
pytestmark = pytest.mark.skipif(not ROWS.exists(), reason="the shared data is not here")

COLOURS = {(220, 30, 30): "red", (200, 30, 30): "red", (30, 180, 30): "green", (30, 30, 200): "blue"}
EXPECTED = {
    "openai_url_noimages": ["red"],
    "openai_b64": ["red"],
    "qwen_image": ["red"],
    "qwen_image_file": "image_scheme",
    "hf_path": ["red"],
    "hf_url": ["red"],
    "CONFLICT_parts_name_blue_green_images_green_blue": "image_conflict",
    "INDEX_1_0": ["blue", "green"],
    "INDEX_same_twice": ["green", "green"],
    "text_part_ph": "special_token_in_text",
    "str_ph_noimages": "placeholder_count",
    "literal_in_answer": "placeholder_count",
    "literal_html_answer": "placeholder_count",
    "content_null_toolcall": "not_written",
    "toolcall_emptystr": "not_written",
    "developer": [],
    "model_role": [],
    "bing_observation": "wrong_type",
    "Capital": [],
    "empty_answer": [],
    "weight0": [],
    "reasoning_content": "not_written",
    "system_column": [],
    "responses_api": "wrong_type",
    "video": "wrong_type",
    "qwen1": "placeholder_count",
    "both": "wrong_type",
    "content_and_value": "wrong_type",
    "role_and_from": [],
    "parts_null_keys": ["red"],
    "part_str": "wrong_type",
    "messages_jsonstring": [],
    "img_in_system": ["red"],
    "pad_typed": ["red"],
}


def colour(image) -> str:
    """The colour of the middle of a picture."""
    picture = load_image(image.uri if image.data is None else image.data)
    pixel = picture.getpixel((picture.width // 2, picture.height // 2))
    return COLOURS[tuple(np.asarray(pixel).tolist())]


def test_pictures_by_pixel(processors):
    from mmray.families import family_of

    preparation = preparation_of(family_of(processors["qwen2_vl"]), "sampled", image_root=str(ROWS))
    rows = [json.loads(line) for line in (ROWS / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    results = {row["id"]: found for row, found in zip(rows, preparation.encode(*rows))}  # verified by the processor
    shown = {
        name: found.reason if isinstance(found, RejectedRow) else [colour(image) for image in found.images]
        for name, found in results.items()
    }
    assert shown == EXPECTED
