"""Pages of a size that the job sets: lengths equal the processor's, tiles are rendered to match."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmray.batches.micro_batch import Place, render
from mmray.errors import UserError
from mmray.images import TilingPolicy
from mmray.packing.settings import PackingSettings
from mmray.rows.sample import Sample
from tests.mmray.preparing import Preparation, write_rows

PACKING = PackingSettings(token_capacity=6000, visual_capacity=6000)


@pytest.mark.parametrize(
    "tiling",
    [
        {"max_pixels": 60_000}, {"min_pixels": 400_000}, {"max_pixels": 60_000, "exact_pixels": False},
        {"grid": [2, 2], "native_resolution": True, "max_tile_pixels": 20_000}, {"grid": [2, 1], "tile_size": 112},
        {"buckets": [{"max_ratio": 1, "grid": [1, 1]}, {"grid": [1, 1], "tile_size": [224, 336]}], "tile_size": 56},
        {"buckets": [{"grid": [2, 2], "tile_size": 56, "overview": [112, 84], "overlap": 0.1}], "labels": True},
    ],
)  # fmt: skip
def test_lengths_and_pictures_of_sized_pages(
    processors: dict[str, Any], tmp_path: Path, tiling: dict[str, Any]
) -> None:
    Image.new("L", (600, 800), 90).save(tmp_path / "page.jpg")
    rows = [{"id": "a", "text": "<image> x", "images": ["page.jpg"]}]
    dataset = {"files": write_rows(tmp_path / "rows.jsonl", rows), "kind": "pretrain"}
    plain, made = (Preparation(processors["qwen2_vl"], dataset, tiling=each, packing=PACKING) for each in ({}, tiling))
    (sample,) = made.encode(*rows, source=f"{tmp_path}/rows.jsonl")  # and compares with the processor
    assert isinstance(sample, Sample), sample
    assert made.record["tiling"] != plain.record["tiling"]
    packed = made.write(tmp_path / "prepared").bin(0)
    rendered = render([packed], Place(0, 0, 0), made.family, made.policy)
    assert int((rendered.input_ids == made.family.image_token_id).sum()) == sample.visual_tokens
    if "max_pixels" in tiling:
        assert sample.visual_tokens <= 60_000 / 28**2 * 1.15
    assert TilingPolicy.model_validate(made.record["tiling"]) == made.policy


def test_labels_of_tiles_as_the_models_own_tokens(processors: dict[str, Any], tmp_path: Path) -> None:
    """One token a label, and the processor reads the same; a model that has none says so."""
    Image.new("L", (600, 800), 90).save(tmp_path / "page.jpg")
    rows = [{"id": "a", "text": "<image> x", "images": ["page.jpg"]}]
    dataset = {"files": write_rows(tmp_path / "rows.jsonl", rows), "kind": "pretrain"}
    samples = {}
    for labels in (False, True, "tokens"):
        tiling = {"grid": [1, 2], "tile_size": 64, "overview": [64, 64], "labels": labels}
        made = Preparation(processors["idefics3"], dataset, tiling=tiling, packing=PACKING)
        (samples[labels],) = made.encode(*rows, source=f"{tmp_path}/rows.jsonl")  # and compares with the processor
    ids = samples["tokens"].input_ids
    tokens = [made.family.token_id(token) for token in ("<global-img>", "<row_1_col_1>", "<row_2_col_1>")]
    assert len(ids) == len(samples[False].input_ids) + 3
    assert len(ids) < len(samples[True].input_ids) - 3
    assert [token for token in ids.tolist() if token in tokens[1:]] == tokens[1:]
    assert samples["tokens"].visual_tokens == samples[False].visual_tokens
    packed = made.write(tmp_path / "prepared").bin(0)
    rendered = render([packed], Place(0, 0, 0), made.family, made.policy)
    first, count = rendered.blocks[0].tolist()
    assert rendered.input_ids[first] == tokens[0], "an image begins with its first label"
    assert count == len(ids) - len(made.family.tokenizer(" x", add_special_tokens=False)["input_ids"]) - 1
    with pytest.raises(UserError, match=r"images.labels: tokens: .* no token '<global-img>'; labels: true writes them"):
        Preparation(processors["qwen2_vl"], dataset, tiling=tiling, packing=PACKING)
