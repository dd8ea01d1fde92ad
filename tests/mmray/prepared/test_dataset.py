"""A prepared dataset: committed by its manifest, continued where it stopped, read back as it was written."""

import contextlib
import functools
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmray.errors import UserError
from mmray.prepared import Bin, PreparedDataset, PreparedWriter
from mmray.prepared.dataset import add_statistics, bins_name, part_names
from mmray.prepared.schema import REJECTED
from mmray.rows.document import ImageRef
from mmray.rows.encode import Sample
from mmray.storage import Folder
from tests.mmray.preparing import Preparation


def contents(folder) -> dict[str, bytes]:
    files = Folder(str(folder))
    return {name: files.read(name) for name in files.names()}


def other(preparation, **changes) -> Preparation:
    """The same job with another setting of packing."""
    dataset = preparation.data.train[0].model_dump()
    packing = preparation.packing.model_copy(update=changes)
    return Preparation(preparation.family.processor, dataset, packing=packing)


@pytest.fixture
def prepared(preparation, tmp_path) -> PreparedDataset:
    return preparation.write(tmp_path / "prepared")


@pytest.fixture
def begun(preparation, tmp_path):
    """A folder where a prepare stopped after its first window, and its writer."""
    writer = PreparedWriter(str(tmp_path / "begun"))
    assert not writer.is_finished(preparation.record)
    assert writer.begin(preparation.record) == set()
    number, results = next(preparation.windows())
    writer.write_window(number, preparation.window(results))
    return tmp_path / "begun", writer


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
        assert each.given.dtype == np.bool_
        for name in ("input_ids", "sample_lengths", "sample_rules", "given"):
            assert getattr(each, name).tolist() == row[name], name
        for name in ("bucket", "visual_tokens", "trained_tokens", "sample_ids", "sample_sources", "images"):
            assert getattr(each, name) == row[name], name


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
    assert prepared.manifest["seconds"] == 1.5
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
    hopeless = other(preparation, token_capacity=1)
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
    prepared = Preparation(processors["qwen2_vl"], dataset, packing=preparation.packing).write(tmp_path / "prepared")
    assert [shard["bins"] == 0 for shard in prepared.manifest["shards"]] == [True, False, True, False]
    ids = [row_id for number in range(len(prepared)) for row_id in prepared.bin(number).sample_ids]
    assert sorted(ids) == [f"row-{number}" for number in range(6)]


def test_fill_is_of_all_bins_together():
    part = {"rows_read": 3, "rows_packed": 2, "rows_rejected": 1, "rejected_by_reason": {"b": 1, "a": 0}, "bins": 1,
            "bins_at_least": 1, "tokens": 50, "visual_tokens": 10, "trained_tokens": 30, "images": 2}  # fmt: skip
    total = add_statistics([part, part | {"tokens": 100}], (100, 40))
    assert (total["rows_read"], total["bins"], total["tokens"]) == (6, 2, 150)
    assert (total["token_fill"], total["visual_fill"]) == (0.75, 0.25)
    assert total["rejected_by_reason"] == {"a": 0, "b": 2}
    assert add_statistics([], (100, 40))["token_fill"] == 0


# ---- The commit ----


def test_a_finished_folder_holds_what_the_design_names_and_no_more(prepared):
    shards = [bins_name(number) for number in range(3)]
    assert sorted(contents(prepared.path)) == [*shards, "manifest.json", "rejected.parquet"]
    assert [shard["file"] for shard in prepared.manifest["shards"]] == shards


def test_a_folder_without_manifest_is_refused_with_the_remedy(tmp_path, begun):
    with pytest.raises(UserError, match=r"no prepared dataset: it has no manifest\.json\. Run jobs/prepare\.py"):
        PreparedDataset(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="a prepare was begun here but did not finish"):
        PreparedDataset(str(begun[0]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format_version": 99}', "has format 99, this mmray reads 2; prepare it anew"),
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


def test_the_manifest_is_written_last(preparation, tmp_path, monkeypatch):
    written = []
    write = Folder.writing

    def watched(folder, name):
        written.append(name)
        return write(folder, name)

    monkeypatch.setattr(Folder, "writing", watched)
    preparation.write(tmp_path)
    assert written[0] == "plan.json"
    assert written[-2:] == ["rejected.parquet", "manifest.json"]
    for number in range(3):
        rejected, statistics = part_names(number)
        assert written.index(bins_name(number)) < written.index(rejected) < written.index(statistics)


def test_lost_rows_stop_the_commit(begun, preparation):
    folder, writer = begun
    statistics = Folder(str(folder))
    facts = json.loads(statistics.read(part_names(0)[1]))
    statistics.write(part_names(0)[1], json.dumps(facts | {"rows_packed": facts["rows_packed"] - 1}).encode())
    with pytest.raises(RuntimeError, match="rows were lost"):
        preparation.finish(writer, 1)
    with pytest.raises(UserError):
        PreparedDataset(str(folder))


# ---- Again, and other input ----


def test_a_second_run_finds_the_result_and_makes_nothing(prepared, preparation, monkeypatch):
    before = contents(prepared.path)
    monkeypatch.setattr(preparation.encoder, "encode", None)
    assert preparation.write(prepared.path).fingerprint == prepared.fingerprint
    assert contents(prepared.path) == before


def test_a_stopped_run_is_continued_with_the_same_result(begun, preparation, prepared, monkeypatch):
    folder, _ = begun
    kept = (Path(folder) / bins_name(0)).stat().st_mtime_ns
    writer = PreparedWriter(str(folder))
    assert writer.begin(preparation.record) == {0}
    assert contents(preparation.write(folder).path) == contents(prepared.path)
    assert (Path(folder) / bins_name(0)).stat().st_mtime_ns == kept


def test_windows_may_be_written_in_any_order_and_twice(preparation, prepared, tmp_path):
    writer = PreparedWriter(str(tmp_path / "again"))
    writer.begin(preparation.record)
    windows = {number: preparation.window(results) for number, results in preparation.windows()}
    for number in (2, 0, 1, 2):
        writer.write_window(number, windows[number])
    preparation.finish(writer, 3)
    assert contents(tmp_path / "again") == contents(prepared.path)


def test_another_fingerprint_is_refused_with_the_settings_that_differ(prepared, begun, preparation):
    changed = other(preparation, token_capacity=230)
    for folder in (prepared.path, str(begun[0])):
        before = contents(folder)
        with pytest.raises(UserError) as caught:
            changed.write(folder)
        message = str(caught.value)
        assert "packing.token_capacity: 240 -> 230" in message
        assert prepared.manifest["fingerprint"] in message
        assert "--replace" in message
        assert contents(folder) == before


def test_many_differences_are_shortened(prepared, preparation):
    changed = other(preparation, token_capacity=1, visual_capacity=2, window_rows=3, bucket_fill=0.1)
    changed.tiling, changed.policy = changed.tiling, changed.policy.model_copy(update=TILES)
    with pytest.raises(UserError, match=r"and \d+ more\n"):
        changed.write(prepared.path)


TILES = {"grid": (1, 2), "tile_size": (28, 28), "overlap": 0.2, "labels": True, "no_upscale": True, "min_area": 9}


def test_clearing_takes_what_was_prepared_and_nothing_else(prepared, begun, preparation):
    changed = other(preparation, token_capacity=230)
    for folder in (Path(prepared.path), Path(begun[0])):
        (folder / "notes.txt").write_text("mine")
        writer = PreparedWriter(str(folder))
        writer.clear()
        assert list(contents(folder)) == ["notes.txt"]
        assert not writer.is_finished(changed.record)
        assert len(changed.write(folder)) > 0


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("finished", [True, False])
def test_a_stop_while_clearing_never_leaves_parts_that_count(preparation, tmp_path, monkeypatch, finished):
    """Stopped after any number of deletions: each later run gives its own whole result."""
    changed = other(preparation, token_capacity=230)
    for job in (preparation, changed):  # encode once
        monkeypatch.setattr(job, "windows", functools.partial(iter, list(job.windows())))
    expected = {job: contents(job.write(tmp_path / name).path) for job, name in [(preparation, "a"), (changed, "b")]}
    remove = Folder.remove
    for deletions in range(9):
        for job in (preparation, changed):
            folder = tmp_path / f"{deletions}-{job.packing.token_capacity}"
            if finished:
                preparation.write(folder)
            else:
                writer = PreparedWriter(str(folder))
                writer.begin(preparation.record)
                for number, results in list(preparation.windows())[:2]:
                    writer.write_window(number, preparation.window(results))
            left = iter(range(deletions))

            def stopping(self, name="", left=left):
                if next(left, None) is None:
                    raise Stopped
                remove(self, name)

            with monkeypatch.context() as patch:
                patch.setattr(Folder, "remove", stopping)
                with contextlib.suppress(Stopped):
                    PreparedWriter(str(folder)).clear()
            PreparedWriter(str(folder)).clear()
            assert contents(job.write(folder).path) == expected[job]


def test_files_that_a_killed_process_left_half_written_are_removed(begun, preparation, prepared):
    folder, _ = begun
    for name in (".bins-00001.parquet.0a1b2c3d", ".window-00001.json.0a1b2c3d", ".rejected.parquet.0a1b2c3d"):
        (folder / name).write_bytes(b"half")
    assert PreparedWriter(str(folder)).begin(preparation.record) == {0}
    assert contents(preparation.write(folder).path) == contents(prepared.path)


def test_windows_of_a_lost_plan_do_not_count(begun, preparation, prepared):
    """Without the plan no one knows what they were made from."""
    folder, _ = begun
    Folder(str(folder)).remove("plan.json")
    assert PreparedWriter(str(folder)).begin(preparation.record) == set()
    assert contents(preparation.write(folder).path) == contents(prepared.path)


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
        other(preparation, token_capacity=230).write(there.path)
    PreparedWriter(there.path).clear()
    assert contents(there.path) == {}


# ---- What the bins are known by ----


def test_other_bins_of_the_same_rows_and_settings_are_another_dataset(preparation, prepared, tmp_path, monkeypatch):
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

    windows = list(preparation.windows())
    smaller = [(0, [result for result in windows[0][1] if result is not windows[0][1][0]]), *windows[1:]]
    monkeypatch.setattr(preparation, "windows", lambda: iter(smaller))
    other = preparation.write(tmp_path / "other")
    assert other.manifest["fingerprint"] == prepared.manifest["fingerprint"]
    assert other.fingerprint != prepared.fingerprint
