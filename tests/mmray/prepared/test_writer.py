"""Writing a prepared dataset: committed by its manifest, continued where it stopped, whatever stops it."""

import contextlib
import errno
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from mmray.errors import UserError
from mmray.prepared import PreparedDataset, PreparedWriter
from mmray.prepared.stages import PrepareContext
from mmray.prepared.window import Window
from mmray.prepared.writer import add_statistics
from mmray.rows.encode import Encoder
from mmray.rows.files import source_files
from mmray.rows.plan import plan_chunks
from mmray.storage import Folder
from tests.mmray.preparing import PACKING, Preparation, committing, contents, other_packing, write_rows


@pytest.fixture
def begun(preparation, tmp_path):
    """A folder where a prepare stopped after its first window, and its writer."""
    writer = PreparedWriter(str(tmp_path / "begun"))
    assert not writer.is_finished(preparation.record)
    assert writer.begin(preparation.record) == set()
    write_windows(preparation, writer, [0])
    return tmp_path / "begun", writer


def write_windows(preparation, writer, numbers):
    """Commit some windows."""
    windows = preparation.packed_windows()
    for number in numbers:
        writer.windows().write(number, windows[number])


def plan_of(preparation):
    """The chunks of all windows, one each."""
    packing = preparation.packing
    files = source_files(preparation.data.train)
    return plan_chunks(files, window_rows=packing.window_rows, chunk_rows=packing.chunk_rows)


def one(folder, pattern):
    """The file of a folder with such a name."""
    (found,) = Path(folder).glob(pattern)
    return found


def test_fill_is_of_all_bins_together():
    part = {"rows_read": 3, "rows_packed": 2, "rows_rejected": 1, "rejected_by_reason": {"b": 1, "a": 0}, "bins": 1,
            "bins_at_least": 1, "tokens": 50, "visual_tokens": 10, "trained_tokens": 30, "images": 2,
            "image_notes": {"broken_exif": 2}, "examples": {"broken_exif": ["f:1", "f:2", "f:3"]}}  # fmt: skip
    total = add_statistics([part, part | {"tokens": 100}], (100, 40))
    assert (total["rows_read"], total["bins"], total["tokens"]) == (6, 2, 150)
    assert (total["token_fill"], total["visual_fill"]) == (0.75, 0.25)
    assert total["rejected_by_reason"] == {"a": 0, "b": 2}
    assert total["image_notes"] == {"broken_exif": 4}
    assert total["examples"] == {"broken_exif": ["f:1", "f:2", "f:3", "f:1", "f:2"]}
    assert add_statistics([], (100, 40))["token_fill"] == 0


# ---- The commit ----


def test_a_finished_folder_holds_what_the_design_names_and_no_more(prepared):
    shards = [one(prepared.path, f"bins-{number:05d}-*.parquet").name for number in range(3)]
    assert sorted(contents(prepared.path)) == [*shards, "manifest.json", "rejected.parquet"]
    assert [shard["file"] for shard in prepared.manifest["shards"]] == shards


def test_a_folder_without_manifest_is_refused_with_the_remedy(tmp_path, begun):
    with pytest.raises(UserError, match=r"no prepared dataset: it has no manifest\.json\. Run jobs/prepare\.py"):
        PreparedDataset(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="A prepare was begun here but did not finish"):
        PreparedDataset(str(begun[0]))


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
    kinds = [name.split("-")[0] for name in written[1:-2]]
    assert kinds == ["bins", "rejected", "window"] * 3


def test_lost_rows_stop_the_commit(begun, preparation):
    folder, writer = begun
    path = one(folder, "window-00000-*.json")
    commit = json.loads(path.read_text())
    commit["statistics"]["rows_packed"] -= 1
    path.write_text(json.dumps(commit))
    with pytest.raises(RuntimeError, match="rows were lost"):
        preparation.finish(writer, 1)
    with pytest.raises(UserError):
        PreparedDataset(str(folder))


# ---- Again, and other input ----


def test_a_second_run_finds_the_result_and_makes_nothing(prepared, preparation, monkeypatch):
    before = contents(prepared.path)
    monkeypatch.setattr(Encoder, "encode", None)
    assert preparation.write(prepared.path).fingerprint == prepared.fingerprint
    assert contents(prepared.path) == before


def test_a_stopped_run_is_continued_with_the_same_result(begun, preparation, prepared, monkeypatch):
    folder, _ = begun
    kept = one(folder, "bins-00000-*").stat().st_mtime_ns
    writer = PreparedWriter(str(folder))
    assert writer.begin(preparation.record) == {0}
    assert contents(preparation.write(folder).path) == contents(prepared.path)
    assert one(folder, "bins-00000-*").stat().st_mtime_ns == kept


def test_windows_may_be_written_in_any_order_and_twice(preparation, prepared, tmp_path):
    writer = PreparedWriter(str(tmp_path / "again"))
    writer.begin(preparation.record)
    write_windows(preparation, writer, (2, 0, 1, 2))
    preparation.finish(writer, 3)
    assert contents(tmp_path / "again") == contents(prepared.path)


def test_another_fingerprint_is_refused_with_the_settings_that_differ(prepared, begun, preparation):
    changed = other_packing(preparation, token_capacity=230)
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
    changed = other_packing(preparation, token_capacity=1, visual_capacity=2, window_rows=3, bucket_fill=0.1)
    changed.context = replace(changed.context, tiling=changed.policy.model_copy(update=TILES))
    with pytest.raises(UserError, match=r"and \d+ more\n"):
        changed.write(prepared.path)


TILES = {"grid": (1, 2), "tile_size": (28, 28), "overlap": 0.2, "labels": True, "no_upscale": True, "min_area": 9}


def test_clearing_takes_what_was_prepared_and_nothing_else(prepared, begun, preparation):
    changed = other_packing(preparation, token_capacity=230)
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
    changed = other_packing(preparation, token_capacity=230)
    again = {job: committing(job.packed_windows()) for job in (preparation, changed)}  # encode once
    expected = {job: contents(job.write(tmp_path / name).path) for job, name in [(preparation, "a"), (changed, "b")]}
    remove = Folder.remove
    for deletions in range(9):
        for job in (preparation, changed):
            folder = tmp_path / f"{deletions}-{job.packing.token_capacity}"
            if finished:
                preparation.write(folder, run_windows=again[preparation])
            else:
                writer = PreparedWriter(str(folder))
                context = replace(preparation.context, path=str(folder))
                writer.begin(preparation.record)
                list(again[preparation](context, writer.token, plan_of(preparation)[:2], None))
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
            assert contents(job.write(folder, run_windows=again[job]).path) == expected[job]


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


@pytest.mark.parametrize("pattern", ["bins-00000-*", "rejected-00000-*", "window-00000-*"])
@pytest.mark.parametrize("left", [0, 20, None])
def test_a_window_whose_files_are_not_whole_is_made_again(begun, preparation, prepared, pattern, left):
    """As after a copy that was broken off: the commit is there, what it names is not, or the other way round."""
    folder, _ = begun
    path = one(folder, pattern)
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:left])
    assert PreparedWriter(str(folder)).begin(preparation.record) == set()
    assert contents(preparation.write(folder).path) == contents(prepared.path)


# ---- Others at work in the same folder ----


def another_window(preparation):
    """The first window as it was when an image had another size: other bins of the same plan."""
    _, results = next(preparation.windows())
    return preparation.window(results[1:])


@pytest.mark.parametrize("replaced", [True, False])
def test_actors_that_outlive_their_driver_never_write_into_a_run_that_began_anew(
    begun, preparation, prepared, replaced
):
    folder, killed = begun
    late = killed.windows()  # held by an actor of the killed driver
    writer = PreparedWriter(str(folder))
    job = other_packing(preparation, token_capacity=230) if replaced else preparation
    writer.clear()  # --replace
    late.write(1, another_window(preparation))
    assert writer.begin(job.record) == set()
    late.write(0, another_window(preparation))
    write_windows(job, writer, range(3))
    late.write(2, another_window(preparation))
    made = contents(job.finish(writer, 3).path)
    assert {name: data for name, data in made.items() if name.startswith("bins-")} == {
        f"bins-{number:05d}-{name}": data
        for number, (name, data) in enumerate(bins_by_hash(job))
    }  # fmt: skip
    late.write(2, another_window(preparation))  # after the end: no part of the dataset
    assert PreparedDataset(str(folder)).statistics == json.loads(made["manifest.json"])["statistics"]
    ids = [row_id for number in range(len(prepared)) for row_id in prepared.bin(number).sample_ids]
    assert len(ids) == len(set(ids)) == prepared.statistics["rows_packed"]


def bins_by_hash(preparation):
    folder = Folder(f"memory://by-hash-{preparation.packing.token_capacity}")
    writer = PreparedWriter(folder.uri)
    writer.begin(preparation.record)
    write_windows(preparation, writer, range(3))
    for name in folder.names():
        if name.startswith("bins-"):
            yield name.split("-", 2)[2], folder.read(name)


def test_a_late_writer_of_the_same_plan_gives_whole_windows_or_the_same_ones(begun, preparation):
    """Its commit names its own bins, so bins of one and counts of the other never come together."""
    folder, killed = begun
    writer = PreparedWriter(str(folder))
    assert writer.begin(preparation.record) == {0}
    killed.windows().write(0, another_window(preparation))
    write_windows(preparation, writer, [1, 2])
    prepared = preparation.finish(writer, 3)
    rows = sum(len(prepared.bin(number).sample_ids) for number in range(len(prepared)))
    assert rows == prepared.statistics["rows_packed"]
    assert prepared.statistics["rows_read"] == 69


def test_two_runs_of_the_same_job_at_once_give_one_result(preparation, prepared, tmp_path):
    run_windows = committing(preparation.packed_windows())
    folder = tmp_path / "both"
    failed = []

    def run():
        try:
            preparation.write(folder, run_windows=run_windows)
        except UserError as error:
            failed.append(str(error))

    for _ in range(5):
        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        preparation.write(folder, run_windows=run_windows)  # whoever lost is told to run again
        assert contents(folder) == contents(prepared.path)
        assert all("another run" in each or "removes files" in each for each in failed), failed
        PreparedWriter(str(folder)).clear()


def test_a_run_that_another_one_has_replaced_is_told_so(begun, preparation):
    folder, first = begun
    second = PreparedWriter(str(folder))
    second.clear()
    second.begin(other_packing(preparation, token_capacity=230).record)
    write_windows(preparation, first, [1, 2])
    with pytest.raises(UserError, match=r"another run of jobs/prepare\.py has begun anew in this folder"):
        preparation.finish(first, 3)
    assert second.begin(other_packing(preparation, token_capacity=230).record) == set()


def test_a_run_that_finds_the_other_done_has_its_result(begun, preparation, prepared):
    folder, first = begun
    preparation.write(folder)
    made = contents(folder)
    assert preparation.finish(first, 3).fingerprint == prepared.fingerprint
    assert contents(folder) == made


@pytest.mark.parametrize("left", ["plan.json", "window-00002-0123456789ab.json", ".bins-00002.parquet.0a1b2c3d"])
def test_what_a_stop_right_after_the_manifest_leaves_is_tidied_by_the_next_run(prepared, preparation, left):
    made = contents(prepared.path)
    (Path(prepared.path) / left).write_text("left")
    plan = {"fingerprint": prepared.manifest["fingerprint"], "token": "0123456789ab"}
    (Path(prepared.path) / "plan.json").write_text(json.dumps(plan))
    preparation.write(prepared.path)
    assert contents(prepared.path) == made


# ---- Disks that are full, folders that are closed ----


WINDOW = Window(b"bins", b"rejected", {"rows_read": 1})


def raising(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device; free some space there; then the same command continues"),
        (errno.EDQUOT, "free some space there"),
        (errno.EROFS, "Read-only file system; let this user write there, or choose another folder"),
        (errno.EACCES, "Permission denied; let this user read and write there"),
        (errno.EIO, "Input/output error; once that is mended, the same command continues"),
    ],
)
def test_a_window_that_cannot_be_written_is_one_line_and_leaves_nothing(
    begun, preparation, prepared, monkeypatch, number, words
):
    folder, writer = begun
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raising(number))
        with pytest.raises(UserError) as caught:
            writer.windows().write(1, WINDOW)
    assert str(caught.value).startswith(f"{folder}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before
    assert contents(preparation.write(folder).path) == contents(prepared.path)


@pytest.mark.parametrize("full_at", range(12))
def test_a_disk_that_is_full_at_any_file_is_continued_with_the_same_result(
    preparation, prepared, tmp_path, monkeypatch, full_at
):
    """12 files: the plan, three of each window, the rejected rows, the manifest."""
    folder, left, fsync = tmp_path / "full", iter(range(full_at)), os.fsync

    def filling(descriptor):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", filling)
        with pytest.raises(UserError, match=f"^{folder}: No space left on device"):
            preparation.write(folder)
    assert not [name for name in contents(folder) if name.startswith(".")]
    with pytest.raises(UserError, match="no prepared dataset"):
        PreparedDataset(str(folder))
    assert contents(preparation.write(folder).path) == contents(prepared.path)


@pytest.mark.parametrize("below", ["", "train"])
def test_an_output_that_is_a_file_is_told(preparation, tmp_path, below):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(UserError, match="a file stands where a folder should be"):
        preparation.write(tmp_path / "taken" / below)
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_closed_is_told(preparation, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied; let this user read and write there"):
        preparation.write(tmp_path / "prepared")


# ---- Datasets of before rows were dealt side by side ----


@pytest.fixture
def two_sets(processors, tmp_path):
    """Two sets of rows in windows of 4."""
    sets = []
    for name in ("one", "two"):
        rows = [{"id": f"{name}{number}", "text": f"{name} {number}"} for number in range(8)]
        sets.append({"files": write_rows(tmp_path / f"{name}.jsonl", rows), "kind": "pretrain"})
    packing = PACKING.model_copy(update={"window_rows": 4, "token_capacity": 30})
    return lambda **changes: Preparation(
        processors["qwen2_vl"], *sets, packing=packing.model_copy(update=changes), max_rejected_share=1
    )  # fmt: skip


def as_it_was(monkeypatch):
    """Records are those of a version that knew of no dealing."""
    record = PrepareContext.record

    def without_dealing(context, files):
        return {name: value for name, value in record(context, files).items() if name != "dealing"}

    monkeypatch.setattr(PrepareContext, "record", without_dealing)


def sets_of_windows(prepared):
    """The sets that the bins of each window's file are of."""
    ids = [[id_ for number in bins for id_ in prepared.bin(number).sample_ids] for bins in prepared.files.values()]
    return [{id_[:3] for id_ in window} for window in ids]


def test_new_datasets_hold_every_set_in_every_window(two_sets, tmp_path):
    prepared = two_sets().write(tmp_path / "new")
    assert prepared.manifest["record"]["dealing"] == 2
    assert sets_of_windows(prepared) == [{"one", "two"}] * 4


def test_a_finished_dataset_of_before_is_up_to_date(two_sets, tmp_path):
    with pytest.MonkeyPatch.context() as before:
        as_it_was(before)
        prepared = two_sets().write(tmp_path / "old")
    assert "dealing" not in prepared.manifest["record"]
    assert sets_of_windows(prepared) == [{"one"}] * 2 + [{"two"}] * 2
    there = contents(tmp_path / "old")
    assert two_sets().write(tmp_path / "old").fingerprint == prepared.fingerprint
    assert contents(tmp_path / "old") == there


def test_an_unfinished_dataset_of_before_ends_as_it_was_planned(two_sets, tmp_path):
    with pytest.MonkeyPatch.context() as before:
        as_it_was(before)
        old = two_sets()
        whole = old.write(tmp_path / "whole")
        writer = PreparedWriter(str(tmp_path / "begun"))
        writer.begin(old.record)
        number, results = next(old.windows())
        writer.windows().write(number, old.window(results))
    ended = two_sets().write(tmp_path / "begun")
    assert ended.fingerprint == whole.fingerprint
    assert contents(tmp_path / "begun").keys() == contents(tmp_path / "whole").keys()
    assert [ended.bin(number).sample_ids for number in range(len(ended))] == [
        whole.bin(number).sample_ids for number in range(len(whole))
    ]


def test_other_settings_of_a_dataset_of_before_are_still_told(two_sets, tmp_path):
    with pytest.MonkeyPatch.context() as before:
        as_it_was(before)
        two_sets().write(tmp_path / "old")
    other = two_sets(token_capacity=40)
    with pytest.raises(UserError, match=r"packing\.token_capacity: 30 -> 40") as refusal:
        other.write(tmp_path / "old")
    assert "dealing" not in str(refusal.value)
