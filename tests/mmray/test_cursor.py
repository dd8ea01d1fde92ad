"""A cursor comes back from its file unchanged, or not at all, and refuses to stand in another order."""

import json
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.cursor import Cursor
from mmray.errors import UserError
from mmray.schedule import Schedule

SCHEDULE = Schedule(num_bins=100, global_batch_bins=8, seed=3, fingerprint="3f2a")


def test_a_resumed_run_sees_the_bins_not_yet_seen(tmp_path):
    whole = [SCHEDULE.bins(step) for step in range(30)]
    cursor, seen = Cursor.at(SCHEDULE), []
    for _ in range(11):
        seen.append(SCHEDULE.bins(cursor.step))
        cursor = cursor.advance()
    cursor.write(tmp_path / "cursor.json")

    resumed = Cursor.read(tmp_path / "cursor.json")
    resumed.check(SCHEDULE)
    assert resumed == Cursor.at(SCHEDULE, step=11)
    assert seen + [SCHEDULE.bins(step) for step in range(resumed.step, 30)] == whole


def test_five_fields_are_enough_for_the_default_order():
    Cursor(step=4, fingerprint="3f2a", seed=3, global_batch_bins=8, num_bins=100).check(SCHEDULE)


@given(step=st.integers(0, 10**15), seed=st.integers(0, 2**63), fingerprint=st.text(), shuffle=st.booleans())
def test_json_round_trip(step, seed, fingerprint, shuffle):
    cursor = Cursor(step, fingerprint, seed, 64, 10**9, shuffle)
    assert Cursor.from_json(cursor.to_json()) == cursor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fingerprint": "77b0"},
            r"step 5 .* its fingerprint is '3f2a', this job's is '77b0'; point the job at",
        ),
        ({"seed": 4}, r"its seed is 3, this job's is 4; put seed back"),
        (
            {"global_batch_bins": 16},
            r"its global_batch_bins is 8, this job's is 16; put global_batch_bins back",
        ),
        ({"num_bins": 99}, r"its num_bins is 100, this job's is 99; restore the prepared data set"),
        ({"shuffle": False}, r"its shuffle is True, this job's is False"),
        ({"shuffle_block": 7}, r"its shuffle_block is 1024, this job's is 7"),
        ({"shuffle_window": 7}, r"its shuffle_window is 64, this job's is 7"),
    ],
)
def test_another_order_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        Cursor.at(SCHEDULE, step=5).check(replace(SCHEDULE, **change))


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "cursor.json"
    old = Cursor.at(SCHEDULE, step=1)
    old.write(path)

    def full_disk(file_number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        old.advance().write(path)
    assert Cursor.read(path) == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["cursor.json"]


def test_a_missing_file_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json: no such cursor file; resume from a complete checkpoint"):
        Cursor.read(tmp_path / "nowhere.json")


GOOD = json.loads(Cursor.at(SCHEDULE).to_json())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 3, "finge', "Unterminated"),
        ("[1]", 'no object with "format": 1'),
        (json.dumps(GOOD | {"format": 2}), 'no object with "format": 1'),
        (json.dumps(GOOD | {"epoch": 1}), "keys .*'epoch'"),
        (json.dumps(GOOD | {"step": 1.0}), r"step is 1\.0"),
        (json.dumps(GOOD | {"step": True}), "step is True"),
        (json.dumps(GOOD | {"step": -2}), "step must be at least 0, got -2"),
    ],
)
def test_a_damaged_file_is_the_users_error(tmp_path, text, message):
    path = tmp_path / "cursor.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"cursor\.json is no cursor of this version \(.*{message}"):
        Cursor.read(path)
