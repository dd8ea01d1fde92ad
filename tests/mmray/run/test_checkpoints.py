"""Which checkpoint of a run is used: the newest of which every byte is as it was written."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from mmray.errors import UserError
from mmray.run.checkpoints import (
    checkpoint_name,
    checkpoint_names,
    looks_whole,
    newest_looking_whole,
    newest_whole,
    prune,
)
from mmray.training.checkpoint import STATE_FILE
from mmray.training.checksums import list_files, list_name, listed_files
from mmray.training.ranks import Ranks
from tests.mmray.training.ranks import RankGroup

RANKS = 2
STATE = {"step": 0, "world_size": RANKS, "zero_stage": 2, "dtype": "fp32", "lists": RANKS}


class Alone:
    """The only rank."""

    rank, size = 0, 1

    def from_first(self, value):
        return value

    def every(self, value):
        return [value]


def write_checkpoint(run: Path, step: int, unique: str = "aa") -> Path:
    """A checkpoint as two ranks write it: files of their own, then the lists of these."""
    folder = run / checkpoint_name(step, unique)
    for rank in range(RANKS):
        part = run / f"part-{rank}"
        (part / "deepspeed").mkdir(parents=True)
        (part / "deepspeed" / f"shard-{rank}.pt").write_bytes(bytes([step % 256, rank]) * 500)
        if rank == 0:
            (part / STATE_FILE).write_text(json.dumps(STATE | {"step": step}))
        files = list_files(part)
        shutil.copytree(part, folder, dirs_exist_ok=True)
        (folder / list_name(rank)).parent.mkdir(exist_ok=True)
        (folder / list_name(rank)).write_text(files)
        shutil.rmtree(part)
    return folder


def change_a_byte(folder: Path) -> None:
    path = folder / "deepspeed" / "shard-1.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def cut_a_file(folder: Path) -> None:
    (folder / "deepspeed" / "shard-0.pt").write_bytes(b"123")


def lose_a_file(folder: Path) -> None:
    (folder / "deepspeed" / "shard-1.pt").unlink()


def lose_a_list(folder: Path) -> None:
    (folder / list_name(1)).unlink()


def tear_a_list(folder: Path) -> None:
    (folder / list_name(1)).write_text('{"deepspeed/sh')


def empty_a_list(folder: Path) -> None:
    (folder / list_name(1)).write_text("[3]")


def lose_the_state(folder: Path) -> None:
    (folder / STATE_FILE).unlink()


DAMAGES = {
    change_a_byte: "deepspeed/shard-1.pt was changed: its checksum is another",
    cut_a_file: "deepspeed/shard-0.pt has 3 of its 1,000 bytes",
    lose_a_file: "deepspeed/shard-1.pt: No such file or directory",
    lose_a_list: "rank-00001.json, a list of its files: No such file or directory; it was not copied to its end",
    tear_a_list: "a list of its files is damaged: Unterminated string",
    empty_a_list: "files/rank-00001.json is no list of files",
    lose_the_state: "holds no readable checkpoint",
}


def restore(rank: int, world_size: int, runs: list[Path]) -> list[tuple[str | None, list[tuple[str, str]]]]:
    """On every rank, for each run: the checkpoint that is used, or the error, and what was told of others."""
    ranks, results = Ranks(), []
    for run in runs:
        told: list[tuple[str, str]] = []
        try:
            found = newest_whole(run, ranks, lambda name, problem, told=told: told.append((name, problem)))
            results.append((found and found.name, told))
        except UserError as error:
            results.append((str(error), told))
    return results


def test_a_damaged_newest_checkpoint_is_passed_over_by_all_ranks(tmp_path: Path) -> None:
    runs = []
    for damage in DAMAGES:
        run = tmp_path / damage.__name__
        write_checkpoint(run, 5)
        damage(write_checkpoint(run, 10))
        runs.append(run)
    good, bad, new = tmp_path / "good", tmp_path / "bad", tmp_path / "new"
    for step in (9, 10, 100_000_001):  # in the order of numbers, not of letters
        write_checkpoint(good, step)
    change_a_byte(write_checkpoint(bad, 5))
    lose_a_list(write_checkpoint(bad, 10))
    first, second = RankGroup(RANKS, restore, [*runs, good, bad, new]).results()
    assert [used for used, _ in first] == [used for used, _ in second], "ranks agree"

    for run, problem, (used, told) in zip(runs, DAMAGES.values(), first, strict=False):
        assert used == "checkpoint_00000005_aa"
        assert [name for name, _ in told] == ["checkpoint_00000010_aa"]
        assert problem in told[0][1]
        assert sorted(path.name for path in run.iterdir()) == [
            "checkpoint_00000005_aa", "damaged_checkpoint_00000010_aa",
        ]  # fmt: skip
    assert all(told == [] for _, told in second), "only rank 0 tells"

    assert first[-3] == ("checkpoint_100000001_aa", [])
    message, told = first[-2]
    assert message.splitlines()[0].endswith("bad has checkpoints, but none of them is whole:")
    assert "  checkpoint_00000010_aa: rank-00001.json, a list" in message
    assert "  checkpoint_00000005_aa: deepspeed/shard-1.pt was changed" in message
    assert told == []
    assert len(checkpoint_names(bad)) == 2, "nothing is renamed where nothing is left"
    assert first[-1] == (None, [])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_look_finds_what_is_missing_and_changes_in_small_files(tmp_path: Path, damage) -> None:
    older = write_checkpoint(tmp_path, 5)
    folder = write_checkpoint(tmp_path, 10)
    assert looks_whole(folder)
    assert newest_looking_whole(tmp_path) == folder
    damage(folder)
    assert not looks_whole(folder)
    assert newest_looking_whole(tmp_path) == older


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint_names(tmp_path / "nowhere") == []
    assert newest_looking_whole(tmp_path) is None


def test_every_file_is_listed_once_the_largest_first(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3)
    names = [file.name for file in listed_files(folder, RANKS)]
    assert names == ["deepspeed/shard-0.pt", "deepspeed/shard-1.pt", STATE_FILE]


def test_pruning_counts_whole_checkpoints_and_takes_what_is_older(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 10, "bb").rename(tmp_path / "damaged_checkpoint_00000010_bb")
    lose_a_list(tmp_path / "checkpoint_00000015_aa")
    lose_a_file(write_checkpoint(tmp_path, 25))
    (tmp_path / "metrics.jsonl").touch()
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint_00000010_aa", "checkpoint_00000015_aa", "checkpoint_00000020_aa", "checkpoint_00000025_aa",
        "metrics.jsonl",
    ]  # fmt: skip


def test_pruning_never_takes_the_last_whole_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5)
    lose_a_list(write_checkpoint(tmp_path, 10))
    prune(tmp_path, keep=1)
    assert checkpoint_names(tmp_path) == ["checkpoint_00000010_aa", "checkpoint_00000005_aa"]
    prune(tmp_path, keep=2)
    assert len(checkpoint_names(tmp_path)) == 2


def test_what_is_passed_over_is_told_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path, 5)
    change_a_byte(write_checkpoint(tmp_path, 10))
    with caplog.at_level(logging.WARNING, "mmray"):
        assert newest_whole(tmp_path, Alone(), lambda *_: None).name == "checkpoint_00000005_aa"
    (message,) = caplog.messages
    assert "checkpoint_00000010_aa is passed over, it is not whole: deepspeed/shard-1.pt was changed" in message
