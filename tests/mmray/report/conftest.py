"""A prepared dataset that has everything a report shows."""

import pytest

from tests.mmray.looking import drawn_page, name_processor
from tests.mmray.preparing import Preparation, chat, write_rows
from tests.mmray.report.reported import HOSTILE, packing


@pytest.fixture(scope="session")
def written(tmp_path_factory, processor_folders, processors):
    """Some windows of rows with images of several shapes, chats, and bad rows whose ids are hostile."""
    folder = tmp_path_factory.mktemp("report")
    drawn_page((170, 220)).save(folder / "page.png")
    drawn_page((220, 170)).save(folder / "wide.png")
    pages = [
        {"id": f"page {number}", "text": "<image>\n" + "word " * (number % 40),
         "images": [("page.png", "wide.png")[number % 2]]}
        for number in range(40)
    ]  # fmt: skip
    bad = [{"id": f"{HOSTILE}{number}", "text": ""} for number in range(5)]
    missing = [{"id": HOSTILE, "text": "<image>", "images": [f"{HOSTILE}.png"]}]
    pages_file = write_rows(folder / "pages.jsonl", pages + bad + missing)
    chats = [chat(f"Say {number} {HOSTILE}", HOSTILE, id=f"chat {number} {HOSTILE}") for number in range(9)]
    chats_file = write_rows(folder / "chat.jsonl", chats)
    made = Preparation(
        processors["qwen2_vl"],
        {"files": (pages_file,), "kind": "pretrain", "image_root": str(folder)},
        {"files": (chats_file,), "kind": "chat"},
        packing=packing(), tiling={"grid": (1, 2), "tile_size": (56, 56), "labels": True},
    )  # fmt: skip
    return name_processor(made.write(folder / "prepared"), processor_folders["qwen2_vl"], "qwen2_vl")
