"""A prepared dataset, read back as it was written."""

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmray.errors import UserError
from mmray.prepared import Bin, PreparedDataset, PreparedWriter
from mmray.prepared.schema import REJECTED
from mmray.rows.image_refs import ImageRef
from mmray.rows.sample import Sample
from tests.mmray.preparing import Preparation, committing, contents, other_packing

# ---- Reading back ----


def written_bins(preparation):
    """The bins of each window as packing made them."""
    windows = [preparation.window(results) for _, results in preparation.windows()]
    return [pq.read_table(io.BytesIO(window.bins)).to_pylist() for window in windows]


def test_every_bin_comes_back_as_it_was_written(prepared, preparation):
    windows = written_bins(preparation)
    assert len(windows) == 3
    assert max(map(len, windows)) > 8  # more than one row group
    rows = [row for window in windows for row in window]
    assert len(prepared) == len(rows) == prepared.statistics["bins"]
    # backwards, so that every border of shards and row groups is crossed both ways
    for number in [*range(len(rows))[::-1], *range(len(rows))]:
        each, row = prepared.bin(number), rows[number]
        assert isinstance(each, Bin)
        assert each.index == number
        assert each.input_ids.dtype == np.int32
        assert each.given_mask.dtype == np.bool_
        assert each.given_mask.tolist() == row["given"]
        for name in ("input_ids", "sample_lengths", "sample_rules"):
            assert getattr(each, name).tolist() == row[name], name
        for name in ("bucket", "visual_tokens", "trained_tokens", "sample_ids", "sample_sources", "images"):
            assert getattr(each, name) == row[name], name


def test_a_dataset_that_is_read_already_travels_to_other_processes(prepared):
    first = prepared.bin(0)
    there = pickle.loads(pickle.dumps(prepared))
    assert len(there) == len(prepared)
    assert there.bin(0).sample_ids == first.sample_ids


def test_columns_are_the_counts_of_all_bins_in_order(prepared):
    bins = [prepared.bin(number) for number in range(len(prepared))]
    assert prepared.column("num_tokens").tolist() == [len(each.input_ids) for each in bins]
    assert prepared.column("trained_tokens").tolist() == [each.trained_tokens for each in bins]
    assert prepared.column("visual_tokens").sum() == prepared.statistics["visual_tokens"]
    assert prepared.column("num_tokens").dtype == np.int32


@pytest.mark.parametrize("step", [0, 1, -1, -1000])
def test_there_is_no_bin_before_the_first_or_after_the_last(prepared, step):
    with pytest.raises(IndexError, match=f"with {len(prepared)} bins"):
        prepared.bin(len(prepared) + step if step >= 0 else step)


def test_the_sums_of_the_manifest_are_those_of_the_bins(prepared, preparation):
    facts = prepared.statistics
    assert facts["rows_read"] == 70 == facts["rows_packed"] + facts["rows_rejected"]
    assert facts["rejected_by_reason"] == {"empty_text": 7}
    bins = [prepared.bin(number) for number in range(len(prepared))]
    assert facts["tokens"] == sum(len(each.input_ids) for each in bins)
    assert facts["trained_tokens"] == sum(each.trained_tokens for each in bins)
    assert facts["images"] == sum(len(each.images) for each in bins)
    room = facts["bins"] * preparation.packing.token_capacity
    assert facts["token_fill"] == pytest.approx(facts["tokens"] / room, abs=1e-4)
    assert 0 < facts["visual_fill"] < 1
    assert facts["bins_at_least"] <= facts["bins"]
    assert prepared.manifest["seconds"] > 0
    assert prepared.manifest["record"] == json.loads(json.dumps(preparation.record))
    assert prepared.tiling == preparation.policy
    assert repr(prepared.path) in repr(prepared)


def test_rejected_rows_are_in_their_file(prepared, inputs):
    rejected = prepared.rejected()
    assert rejected.schema.equals(REJECTED)
    assert rejected["id"].to_pylist() == [f"row-{number}" for number in range(7, 70, 10)]
    assert set(rejected["reason"].to_pylist()) == {"empty_text"}
    assert rejected["source"].to_pylist()[:2] == [f"{inputs}/rows.jsonl:8", f"{inputs}/rows.jsonl:18"]
    assert "text is empty" in rejected["message"][0].as_py()
    assert json.loads(rejected["row"][0].as_py())["id"] == "row-7"


def test_a_dataset_without_bins_is_one(preparation, tmp_path):
    hopeless = other_packing(preparation, token_capacity=1, max_rejected_share=1)
    prepared = hopeless.write(tmp_path)
    assert len(prepared) == 0
    assert prepared.statistics["rows_rejected"] == 70
    assert prepared.statistics["token_fill"] == 0
    assert prepared.column("num_tokens").tolist() == []
    with pytest.raises(IndexError):
        prepared.bin(0)


def test_windows_without_bins_stand_between_others(inputs, processors, tmp_path, preparation):
    """A window of bad rows only: the numbers of the bins behind it still find their file."""
    lines = (inputs / "rows.jsonl").read_text().splitlines()
    bad = ['{"text": ""}'] * 30
    (tmp_path / "rows.jsonl").write_text("\n".join(bad + lines[:3] + bad[:27] + bad + lines[3:6]))
    dataset = {"files": (str(tmp_path / "rows.jsonl"),), "kind": "pretrain", "image_root": str(inputs)}
    prepared = Preparation(
        processors["qwen2_vl"], dataset, packing=preparation.packing, max_rejected_share=1
    ).write(tmp_path / "prepared")  # fmt: skip
    assert [shard["bins"] == 0 for shard in prepared.manifest["shards"]] == [True, False, True, False]
    ids = [row_id for number in range(len(prepared)) for row_id in prepared.bin(number).sample_ids]
    assert sorted(ids) == [f"row-{number}" for number in range(6)]


# ---- No dataset ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format_version": 99}', "has format 99, this mmray reads 3; prepare it anew"),
        ('{"some": "other tool"}', "has format None"),
        ('{"format_', "is not JSON"),
        ("[]", "was not written by mmray"),
    ],
)
def test_a_manifest_of_another_make_is_refused(tmp_path, content, message, preparation):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=message):
        PreparedDataset(str(tmp_path))
    with pytest.raises(UserError):
        PreparedWriter(str(tmp_path)).is_finished(preparation.record)


@pytest.mark.parametrize("left", [0, 100, -1])
def test_a_file_of_bins_that_is_missing_or_cut_is_told_with_the_remedy(prepared, left):
    """As of a dataset that was copied in part."""
    path = Path(prepared.path) / prepared.manifest["shards"][0]["file"]
    path.write_bytes(path.read_bytes()[:left])
    if not left:
        path.unlink()
    with pytest.raises(
        UserError, match=r"bins-00000-\w+\.parquet, which manifest\.json names, cannot be read.*--replace"
    ):
        PreparedDataset(prepared.path).bin(0)


# ---- Equal, everywhere ----


def test_two_preparations_are_byte_equal(preparation, tmp_path):
    first, second = (contents(preparation.write(tmp_path / name).path) for name in ("first", "second"))
    assert first == second
    assert len(first) == 5


def test_a_folder_in_memory_holds_the_same(preparation, prepared):
    there = preparation.write("memory://prepared-in-memory/train")
    assert contents(there.path) == contents(prepared.path)
    assert there.bin(len(there) - 1).sample_ids == prepared.bin(len(prepared) - 1).sample_ids
    assert there.rejected().equals(prepared.rejected())
    with pytest.raises(UserError, match=r"packing\.token_capacity"):
        other_packing(preparation, token_capacity=230).write(there.path)
    PreparedWriter(there.path).clear()
    assert contents(there.path) == {}


# ---- What the bins are known by ----


def test_other_bins_of_the_same_rows_and_settings_are_another_dataset(preparation, prepared, tmp_path):
    """A training order belongs to bins: the same rows give others where an image has another size by now."""
    same = preparation.write(tmp_path / "same")
    assert same.fingerprint == prepared.fingerprint
    number, results = next(preparation.windows())
    assert number == 0
    assert preparation.window(results).statistics["content"] == preparation.window(results).statistics["content"]
    samples = [result for result in results if isinstance(result, Sample)]
    with_images = next(sample for sample in samples if sample.images)
    changes = [
        replace(samples[0], id="another"),
        replace(samples[0], input_ids=samples[0].input_ids[::-1].copy()),
        replace(with_images, sizes=tuple((width + 1, height) for width, height in with_images.sizes)),
        replace(with_images, images=tuple(ImageRef(data=b"bytes") for _ in with_images.images)),
        replace(with_images, blocks=with_images.blocks + [0, -1]),
    ]
    hashes = {preparation.window([sample]).statistics["content"] for sample in (samples[0], with_images, *changes)}
    assert len(hashes) == 2 + len(changes)

    smaller = preparation.packed_windows() | {0: preparation.window(results[1:])}
    other = preparation.write(tmp_path / "other", run_windows=committing(smaller))
    assert other.manifest["fingerprint"] == prepared.manifest["fingerprint"]
    assert other.fingerprint != prepared.fingerprint
