"""The loads in a file's footer are those of its bins, whoever asks for which of them in what order."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmray.images import plan_tiles
from mmray.packing.settings import PackingSettings
from mmray.prepared import PreparedDataset
from mmray.schedule.loads import Loads
from tests.mmray.preparing import PICTURES, Preparation, write_pictures, write_rows


@pytest.fixture(scope="module")
def prepared(processors, tmp_path_factory) -> tuple[Preparation, PreparedDataset]:
    """Three files of bins with pages of several shapes, and texts."""
    folder = tmp_path_factory.mktemp("loads")
    write_pictures(folder)
    names = [*PICTURES, None]
    rows = [
        {"id": f"row-{number}", "text": ("<image>" if name else "") + "word " * (5 + 3 * number % 40),
         "images": [name] if name else []}
        for number, name in enumerate(names * 24)
    ]  # fmt: skip
    write_rows(folder / "rows.jsonl", rows)
    dataset = {"files": (str(folder / "rows.jsonl"),), "kind": "pretrain", "image_root": str(folder)}
    preparation = Preparation(
        processors["qwen2_vl"], dataset, tiling={"grid": (1, 2), "tile_size": (56, 56)},
        packing=PackingSettings(token_capacity=200, visual_capacity=80, window_rows=50), max_rejected_share=1,
    )  # fmt: skip
    return preparation, preparation.write(folder / "prepared")


def test_loads_are_those_of_the_bins(prepared):
    preparation, dataset = prepared
    loads = dataset.loads(np.arange(len(dataset)))
    assert len(loads) == len(dataset) > 10
    for number in range(len(dataset)):
        each = dataset.bin(number)
        spans = [
            preparation.family.span(size, 1).visual_tokens
            for image in each.images
            for size in plan_tiles((image["width"], image["height"]), dataset.tiling).tile_sizes
        ]
        assert loads.tokens[number] == len(each.input_ids)
        assert loads.visual_tokens[number] == each.visual_tokens == sum(spans)
        assert loads.trained_tokens[number] == each.trained_tokens
        assert loads.sample_pairs[number] == sum(int(length) ** 2 for length in each.sample_lengths)
        assert loads.visual_pairs[number] == sum(visual**2 for visual in spans)
        assert loads.bucket[number] == each.bucket
    assert len(set(loads.bucket)) > 1
    assert (loads.sample_pairs < loads.tokens**2).any()
    assert loads.visual_pairs.any()


def test_bins_of_any_files_in_any_order(prepared):
    _, dataset = prepared
    assert len(dataset.manifest["shards"]) == 3
    every = dataset.loads(np.arange(len(dataset)))
    chosen = np.random.default_rng(0).permutation(len(dataset))[:9]
    some = dataset.loads(chosen)
    for name in ("tokens", "visual_tokens", "trained_tokens", "sample_pairs", "visual_pairs", "bucket"):
        assert getattr(some, name).tolist() == getattr(every, name)[chosen].tolist()
        assert getattr(some, name).dtype.kind in "iU"


def test_only_footers_of_the_files_asked_for_are_read(prepared, monkeypatch):
    _, dataset = prepared
    opened = []
    fresh = PreparedDataset(dataset.path)
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_: pytest.fail("columns were read"))
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *_: pytest.fail("a row group was read"))
    from_footer = Loads.from_footer
    monkeypatch.setattr(Loads, "from_footer", lambda file: opened.append(file) or from_footer(file))
    fresh.loads(np.asarray([0, 1, len(fresh) - 1]))
    fresh.loads(np.asarray([1, 0]))
    assert len(opened) == 2
