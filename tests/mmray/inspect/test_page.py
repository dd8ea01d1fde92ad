"""The web page of a bin: every token where it stands, the pictures that training sees, and nothing of the data that a
browser takes for more than text."""

import re
from dataclasses import replace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmray.base.visible import visible
from mmray.images import plan_tiles, render_tiles
from mmray.inspect import page, write_bin_page
from mmray.inspect.page import page_of
from mmray.inspect.view import view_bin, view_samples
from mmray.loss.rules import IGNORE_INDEX
from mmray.loss.settings import RoleLoss
from mmray.loss.sources import label_maker
from mmray.packing.settings import PackingSettings
from mmray.prepared import PreparedDataset
from tests.mmray.html_page import Page
from tests.mmray.looking import drawn_page, name_processor, preparation, training_labels, write_looked_at
from tests.mmray.preparing import Preparation, chat, write_rows

TILING = {"grid": (2, 2), "tile_size": (56, 84), "overview": (84, 84), "labels": True}
HOSTILE = "</span><script>alert(1)</script><img src=x onerror=alert(2)>\"' onmouseover='alert(3)' {{ 7*7 }} &lt; \x1b"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_looked_at(tmp_path_factory.mktemp("page"))


@pytest.fixture
def paged(processors, folder, tmp_path):
    """A function that prepares rows: the page of the first bin, the dataset, the preparation."""

    def paged(family, *kinds, **options):
        made = preparation(processors[family], folder, *kinds, **options)
        prepared = made.write(tmp_path / "prepared")
        return Page(page_of(view_bin(prepared, 0, made.family), made.family, prepared.tiling)), prepared, made

    return paged


# ---- Tokens ----

TOOLTIP = re.compile(r"bin (\d+)(?:–(\d+))? · sample (\d+)(?:–(\d+))? · id (\d+) · (.*)", re.DOTALL)


def shown_tokens(found):
    """(place in the bin, place in the sample, id, raw token, mark) for each token on the page."""
    shown = []
    for element in found.tokens:
        (mark,) = [name for name in ("trained", "context", "media") if element.is_in(name)]
        for line in element.attributes["title"].split("\n"):
            start, stop, sample_start, sample_stop, token_id, raw = TOOLTIP.fullmatch(line).groups()
            count = int(stop or start) - int(start) + 1
            assert count == int(sample_stop or sample_start) - int(sample_start) + 1
            assert ("run" in element.classes) == (count > 1)
            shown += [(int(start) + n, int(sample_start) + n, int(token_id), raw, mark) for n in range(count)]
    return shown


@pytest.mark.parametrize("family", ["qwen2_vl", "smolvlm"])
@pytest.mark.parametrize("loss", ["sampled", "all", RoleLoss(roles=("user",), train_on_eos="last")])
def test_every_token_has_its_places_its_id_and_the_colour_of_its_label(paged, family, loss):
    found, prepared, made = paged(family, "chat", "pretrain", loss=loss)
    packed, shown = prepared.bin(0), shown_tokens(found)
    within = np.concatenate([np.arange(length) for length in packed.sample_lengths])
    names = made.family.tokenizer.convert_ids_to_tokens(packed.input_ids.tolist())
    assert [token[:4] for token in shown] == [
        (place, int(within[place]), int(token_id), visible(name))
        for place, (token_id, name) in enumerate(zip(packed.input_ids, names))
    ]
    trained = [mark == "trained" for *_, mark in shown]
    assert trained == (training_labels(prepared, 0, made) != IGNORE_INDEX).tolist()
    assert any(trained)


def test_the_text_of_the_tokens_is_the_samples_text(paged):
    found, prepared, made = paged("qwen2_vl", "chat")
    packed, decode = prepared.bin(0), made.family.tokenizer.decode
    text = "".join(element.text for element in found.tokens)
    assert text == visible(decode(packed.input_ids).replace("<|image_pad|>" * 48, "[48 × <|image_pad|>]"))
    emoji = next(element for element in found.tokens if element.text == "\N{GRINNING FACE}")
    assert emoji.attributes["title"].count("\n") > 0  # several tokens make it


def test_turns_have_their_roles_and_colours(paged):
    found, *_ = paged("qwen2_vl", "chat", "pretrain")
    roles = [(element.text, element.parents[-1].classes) for element in found.of("div", "role")]
    colours = {"system": "role-0", "user": "role-1", "assistant": "role-2"}
    expected = ["system", "user", "assistant", "user", "assistant", "system", "user", "assistant"]
    assert roles == [(role, ["turn", colours[role]]) for role in expected]
    first = [element for element in found.tokens if element.is_in("role-2")]
    assert "".join(element.text for element in first).startswith("<|im_start|>assistant↵\nA page.<|im_end|>↵\n")
    legend = [element.text for element in found.of("span") if element.is_in("legend")]
    assert legend[:3] == ["trained", "not trained", " for an image, never trained"]
    assert [text for text in legend if text.startswith("▌")] == ["▌system", "▌user", "▌assistant", "▌tool"]
    assert len(found.of("div", "turn")) == len(expected) + 1  # the document


def test_the_head_has_the_counts_and_both_fills(paged):
    found, prepared, _ = paged("qwen2_vl", "chat", "pretrain")
    packed = prepared.bin(0)
    tokens, trained = len(packed.input_ids), packed.trained_tokens
    meters = [(each.attributes["value"], each.attributes["max"]) for each in found.of("meter")]
    assert meters == [(str(tokens), "900"), ("60", "600"), (str(trained), str(tokens))]
    head = [element.text for element in found.of("span") if element.is_in("meter")]
    assert head[1] == f"{tokens} of 900 ({tokens / 900:.1%})"
    assert [element.text for element in found.of("h2")] == ["turns", "[red]odd[/]␛[1m", "page"]
    facts = [element.text for element in found.of("b") if element.is_in("facts")]
    assert facts[:4] == ["3", "mixed", "Qwen2VL", "sampled (by messages, all)"]


# ---- Pictures ----


def assert_like(shown, tile):
    """A picture and the tile it is of, but for its size and JPEG."""
    expected = tile.resize(shown.size, Image.Resampling.LANCZOS)
    difference = np.abs(np.asarray(shown, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.mean() < 4
    turned = np.abs(np.asarray(shown, dtype=int)[::-1] - np.asarray(expected, dtype=int))
    assert turned.mean() > 10


def test_pictures_are_the_tiles_of_training(paged, folder):
    found, prepared, _ = paged("qwen2_vl", "chat", "pretrain", tiling=TILING)
    images, pictures = prepared.bin(0).images, iter(found.pictures)
    captions = iter(element.text for element in found.of("figcaption"))
    for image in images:
        plan = plan_tiles((image["width"], image["height"]), prepared.tiling)
        tiles = render_tiles(image["uri"], plan)
        assert len(tiles) == 5
        for tile, label in zip(tiles, plan.labels):
            assert_like(next(pictures), tile)
            assert next(captions) == f"{label} {tile.width} × {tile.height}"
    assert next(pictures, None) is None
    assert [each.attributes["style"] for each in found.of("div", "grid")] == ["--columns: 1", "--columns: 2"] * 3
    assert f"image 0: {folder}/page.png (170 × 220)" in [element.text for element in found.of("div", "soft")]


def test_an_uncut_page_is_shown_whole(paged, folder):
    found, *_ = paged("idefics3", "chat")
    (picture,) = found.pictures
    assert picture.size == (170, 220)
    assert_like(picture, Image.open(folder / "page.png"))


def test_a_page_above_the_usual_limit_was_let_in_by_its_job(paged, monkeypatch):
    monkeypatch.setattr(page, "MAX_PIXELS", 100)
    assert len(paged("qwen2_vl", "chat")[0].pictures) == 1


def test_rows_read_from_the_right_lie_so(paged):
    found, *_ = paged("qwen2_vl", "chat", tiling=TILING | {"reading_order": "rtl", "overview": None})
    (grid,) = found.of("div", "grid")
    assert grid.attributes["dir"] == "rtl"
    assert [each.text.split()[0] for each in found.of("figcaption")][:2] == ["<row1_col2>", "<row1_col1>"]


def test_pictures_are_made_smaller_until_they_fit(paged, monkeypatch):
    whole = paged("qwen2_vl", "chat", "pretrain", tiling=TILING)[0].pictures
    assert {picture.size for picture in whole} == {(84, 84), (56, 84)}
    monkeypatch.setattr(page, "MAX_PICTURE_PIXELS", 10_000)
    smaller = paged("qwen2_vl", "chat", "pretrain", tiling=TILING)[0].pictures
    pixels = sum(picture.width * picture.height for picture in smaller)
    assert 9_000 < pixels < 11_000
    monkeypatch.setattr(page, "MAX_PICTURE_SIDE", 20)
    assert max(max(picture.size) for picture in paged("qwen2_vl", "chat", "pretrain", tiling=TILING)[0].pictures) == 20


def test_a_picture_that_cannot_be_read_shows_why_and_the_others_stay(processors, tmp_path):
    write_looked_at(tmp_path)
    rows = [
        {"id": name, "text": "<image>", "images": [f"{name}.png"]} for name in ("gone", "broken", "changed", "good")
    ]
    for row in rows:
        drawn_page((170, 220)).save(tmp_path / row["images"][0])
    made = preparation(processors["qwen2_vl"], tmp_path, "pretrain", rows=rows, tiling=TILING)
    prepared = made.write(tmp_path / "prepared")
    (tmp_path / "gone.png").unlink()
    data = (tmp_path / "broken.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(data[: len(data) // 2])
    drawn_page((60, 40)).save(tmp_path / "changed.png")
    found = Page(page_of(view_bin(prepared, 0, made.family), made.family, prepared.tiling))
    errors = [element.text for element in found.of("p", "wrong")]
    assert errors[0] == f"image_missing: {tmp_path}/gone.png: no such file; check the path and `image_root`"
    assert errors[1].startswith(f"image_corrupt: {tmp_path}/broken.png")
    assert errors[2].startswith("image_changed: planned for 170 x 220 pixels, the image now has 60 x 40")
    assert len(errors) == 3
    assert len(found.pictures) == 5


def test_images_and_datasets_behind_uris(processors, processor_folders, tmp_path):
    root = f"memory://{tmp_path.name}"
    with fsspec.open(f"{root}/page.png", "wb") as file:
        drawn_page((170, 220)).save(file, "PNG")
    rows = [chat("<image>?", "Yes.", images=[f"{root}/page.png"], id="far")]
    files = {"files": write_rows(f"{root}/rows.jsonl", rows), "kind": "chat"}
    prepared = Preparation(processors["qwen2_vl"], files).write(f"{root}/prepared")
    size = write_bin_page(tmp_path / "page.html", prepared, 0, str(processor_folders["qwen2_vl"]))
    found = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert size == (tmp_path / "page.html").stat().st_size
    assert_like(found.pictures[0], drawn_page((170, 220)))
    assert f"image 0: {root}/page.png (170 × 220)" in [element.text for element in found.of("div", "soft")]


def test_images_in_the_rows_themselves(processors, folder, tmp_path):
    data = (folder / "page.png").read_bytes()
    rows = pa.table({"id": ["own"], "text": ["<image>x"], "images": [[data]]})
    pq.write_table(rows, tmp_path / "rows.parquet")
    files = {"files": str(tmp_path / "rows.parquet"), "kind": "pretrain"}
    made = Preparation(processors["qwen2_vl"], files)
    prepared = made.write(tmp_path / "prepared")
    found = Page(page_of(view_bin(prepared, 0, made.family), made.family, prepared.tiling))
    assert_like(found.pictures[0], drawn_page((170, 220)))
    assert f"image 0: image of {len(data)} bytes (170 × 220)" in [element.text for element in found.of("div", "soft")]


# ---- Nothing but text of the data, nothing from elsewhere ----


def hostile_page(processors, folder):
    """The page of rows that try to break out by their ids, texts, file names and the dataset's own name."""
    pictures = folder / '"><script>1'
    pictures.mkdir(parents=True)
    drawn_page((40, 60)).save(pictures / "x' onerror=alert(1).png")
    drawn_page((40, 60)).save(pictures / "<b>gone.png")
    rows = [
        chat("<image>" + HOSTILE, HOSTILE, images=["x' onerror=alert(1).png"], id=HOSTILE),
        chat("<image>", "x", images=["<b>gone.png"], id="gone"),
    ]
    made = preparation(processors["qwen2_vl"], pictures, "chat", rows=rows)
    prepared = made.write(folder / "<i>prepared")
    (pictures / "<b>gone.png").unlink()
    return page_of(view_bin(prepared, 0, made.family), made.family, prepared.tiling)


def test_everything_of_the_data_is_text(processors, tmp_path):
    html = hostile_page(processors, tmp_path)
    found = Page(html)
    text = "".join(element.text for element in found.tokens)
    assert text.count(visible(HOSTILE)) == 2
    assert visible(HOSTILE) in [element.text for element in found.of("h2")]
    assert any("onerror=alert(1).png (40 × 60)" in element.text for element in found.of("div", "soft"))
    assert "<b>gone.png: no such file" in found.of("p", "wrong")[0].text
    assert found.of("title")[0].text.endswith("<i>prepared")
    tags = "html head meta title style body header h1 p div span meter b section h2 figure img figcaption"
    assert " ".join(dict.fromkeys(element.tag for element in found.elements)) == tags
    harmless = {"title", "class", "dir", "style", "tabindex", "src", "alt", "min", "max", "value"}
    own = [element for element in found.elements if any(parent.tag == "body" for parent in element.parents)]
    assert {name for element in own for name in element.attributes} == harmless
    assert len(found.of("img")) == 1
    assert {element.attributes.get("style", "--columns: 1") for element in own} == {"--columns: 1"}


def test_the_page_needs_nothing_from_elsewhere(processors, tmp_path):
    found = Page(hostile_page(processors, tmp_path))
    policy = [element.attributes["content"] for element in found.of("meta") if "http-equiv" in element.attributes]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert all(element.attributes["src"].startswith("data:image/jpeg;base64,") for element in found.of("img"))
    (style,) = found.of("style")
    assert not re.search(r"url\(|@import|http", style.text)
    assert "prefers-color-scheme: dark" in style.text
    assert any("width=device-width" in (element.attributes.get("content") or "") for element in found.of("meta"))


def test_boundaries_of_the_job_may_be_called_anything(processors, folder, tmp_path):
    role = "a\"><script>'"
    boundary = {"role": role, "start": "<|im_start|>user\n", "end": "<|im_end|>"}
    loss = RoleLoss(roles=(role,), boundaries=(boundary,), allow_empty=True)
    made = preparation(processors["qwen2_vl"], folder, "chat")
    prepared = made.write(tmp_path)
    roles, samples = view_samples(prepared.bin(0), made.family, loss, label_maker(loss, made.family))
    view = replace(view_bin(prepared, 0, made.family), roles=roles, samples=samples)
    found = Page(page_of(view, made.family, prepared.tiling))
    assert {element.text for element in found.of("div", "role")} == {role}
    assert not found.of("script")


def test_a_full_bin_makes_a_page_of_a_few_megabytes(processors, tmp_path):
    """8,000 tokens, their text and pictures both as bad as they get: no two tokens alike, noise that JPEG keeps."""
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 255, (1120, 1120, 3), dtype=np.uint8))
    noise.save(tmp_path / "noise.jpg")
    ids = generator.integers(0, 500, 4_000).tolist()
    write_rows(tmp_path / "rows.jsonl", [{"id": "noise", "text": "<image>" * 4, "images": ["noise.jpg"] * 4}])
    write_rows(tmp_path / "ids.jsonl", [{"id": "ids", "input_ids": ids, "labels": ids}])
    made = Preparation(
        processors["qwen2_vl"],
        {"files": str(tmp_path / "rows.jsonl"), "kind": "pretrain"},
        {"files": str(tmp_path / "ids.jsonl"), "kind": "tokenized"},
        packing=PackingSettings(token_capacity=16_384, visual_capacity=16_384),
        tiling={"grid": (1, 1), "tile_size": (1120, 1120)},
    )
    prepared = made.write(tmp_path / "prepared")
    assert len(prepared.bin(0).input_ids) > 8_000
    html = page_of(view_bin(prepared, 0, made.family), made.family, prepared.tiling)
    assert len(html.encode()) < 5e6
    assert [picture.size for picture in Page(html).pictures] == [(1000, 1000)] * 4


# ---- The file ----


def test_the_page_is_written_with_the_processor_of_the_manifest(processors, processor_folders, folder, tmp_path):
    prepared = preparation(processors["qwen2_vl"], folder, "chat").write(tmp_path / "prepared")
    name_processor(prepared, processor_folders["qwen2_vl"], "qwen2_vl")
    write_bin_page(tmp_path / "page.html", PreparedDataset(prepared.path), 0)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "A page." in "".join(element.text for element in Page(text).tokens)
