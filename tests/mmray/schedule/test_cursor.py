"""A cursor comes back from its file unchanged, or not at all, and refuses to stand in another order."""

import json
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.errors import UserError
from mmray.schedule.balance import BalanceSettings
from mmray.schedule.balanced import BalancedSchedule
from mmray.schedule.cursor import Cursor, DataSpan
from mmray.schedule.schedule import Schedule

SCHEDULE = Schedule(num_bins=100, global_batch_bins=8, seed=3, fingerprint="3f2a")
SORTED = BalanceSettings(whole_row_attention=True, across_batches=True)
BALANCED = BalancedSchedule(SCHEDULE, SORTED)
FAIR = BalancedSchedule(SCHEDULE, BalanceSettings(whole_row_attention=True))


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


def test_a_balanced_order_is_saved_with_its_settings(tmp_path):
    cursor = Cursor.at(BALANCED, step=5)
    cursor.write(tmp_path / "cursor.json")
    saved = Cursor.read(tmp_path / "cursor.json")
    assert saved == cursor
    assert BalanceSettings(**saved.balance, across_batches=True) == SORTED
    saved.check(BALANCED)
    saved.advance(3).check(BalancedSchedule(SCHEDULE, SORTED.model_copy()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"window_batches": 32},
            r"its balance\.window_batches is 64, this job's is 32; set balance\.window_batches to",
        ),
        ({"tolerance": 0}, r"its balance\.tolerance is 0\.05, this job's is 0\.0; set balance\.tolerance to 0\.05"),
        (
            {"group_bins": 4},
            r"balance\.group_bins is None, this job's is 4; set balance\.group_bins to null in",
        ),
        ({"one_shape_per_batch": True}, "set balance.one_shape_per_batch to false"),
        ({"token_pair": 0}, "set balance.token_pair to 3.3e-05"),
        ({"trained_token": 0}, "set balance.trained_token to 0.18"),
        ({"visual_token": 3}, "set balance.visual_token to 1.9"),
        ({"visual_pair": 0}, "set balance.visual_pair to 0.001"),
        ({"whole_row_attention": False}, "set balance.whole_row_attention to true in the job file"),
    ],
)
def test_other_balance_settings_are_refused(change, message):
    other = BalanceSettings(**{"whole_row_attention": True, "across_batches": True} | change)
    with pytest.raises(UserError, match=message):
        Cursor.at(BALANCED, step=5).check(BalancedSchedule(SCHEDULE, other))


def test_every_balance_setting_is_part_of_the_order():
    """Of one that sorts; `across_batches` is told by there being any, as it was before it was a setting."""
    assert Cursor.at(BALANCED).balance.keys() == BalanceSettings.model_fields.keys() - {"across_batches"}


def test_dealing_by_cost_is_no_part_of_the_order():
    """The bins of a step are the same: what ranks are dealt may change with their number too."""
    assert Cursor.at(FAIR) == Cursor.at(SCHEDULE)
    Cursor.at(SCHEDULE, step=5).check(FAIR)
    Cursor.at(FAIR, step=5).check(SCHEDULE)
    Cursor.at(FAIR, step=5).check(BalancedSchedule(SCHEDULE, BalanceSettings(whole_row_attention=False)))


def test_sorting_switched_on_or_off_is_refused():
    for other in (FAIR, SCHEDULE):
        off = r"its balance\.across_batches is False, this job's is True; set balance\.across_batches to false in"
        with pytest.raises(UserError, match=off):
            Cursor.at(other).check(BALANCED)
        on = r"its balance\.across_batches is True, this job's is False; set balance\.across_batches to true in"
        with pytest.raises(UserError, match=on):
            Cursor.at(BALANCED).check(other)
    with pytest.raises(UserError, match="its seed is 3, this job's is 4"):
        Cursor.at(BALANCED).check(replace(BALANCED, order=replace(SCHEDULE, seed=4)))


@pytest.mark.parametrize("balance", [{}, {"balance": None}])
def test_a_cursor_from_before_other_data_and_balance_is_read(tmp_path, balance):
    later = ("balance", "prepared", "first_step", "earlier")
    old = {name: value for name, value in GOOD.items() if name not in later} | {"format": 1} | balance
    (tmp_path / "cursor.json").write_text(json.dumps(old))
    cursor = Cursor.read(tmp_path / "cursor.json")
    cursor.check(SCHEDULE)
    assert cursor == Cursor.at(SCHEDULE)


def test_a_run_sent_on_with_other_data_counts_its_steps_on(tmp_path):
    other = replace(SCHEDULE, num_bins=40, fingerprint="77b0")
    cursor = Cursor.at(SCHEDULE, step=5, prepared="/old").continue_on(other, "/new")
    assert (cursor.step, cursor.first_step, cursor.prepared) == (5, 5, "/new")
    cursor.check(other)
    third = replace(SCHEDULE, num_bins=7, fingerprint="0c11")
    cursor = cursor.advance(2).continue_on(third, "/third")
    cursor.write(tmp_path / "cursor.json")
    saved = Cursor.read(tmp_path / "cursor.json")
    assert saved == cursor
    assert saved.spans == (
        DataSpan(0, "3f2a", 100, "/old"), DataSpan(5, "77b0", 40, "/new"), DataSpan(7, "0c11", 7, "/third"),
    )  # fmt: skip


def test_data_on_which_nothing_was_trained_leaves_no_span():
    other = replace(SCHEDULE, fingerprint="77b0")
    moved = Cursor.at(SCHEDULE, step=5, prepared="/old").continue_on(other, "/new").continue_on(SCHEDULE, "/back")
    assert [span.prepared for span in moved.spans] == ["/old", "/back"]
    assert Cursor.at(SCHEDULE).continue_on(other, "/new") == Cursor.at(other, prepared="/new")


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
        ("[1]", 'no object with "format": 2'),
        (json.dumps(GOOD | {"format": 4}), 'no object with "format": 2'),
        (json.dumps(GOOD | {"epoch": 1}), "keys .*'epoch'"),
        (json.dumps(GOOD | {"step": 1.0}), r"step is 1\.0"),
        (json.dumps(GOOD | {"step": True}), "step is True"),
        (json.dumps(GOOD | {"balance": 3}), "balance is 3"),
        (json.dumps(GOOD | {"step": -2}), "step must be at least 0, got -2"),
        (json.dumps(GOOD | {"earlier": 3}), "earlier is 3"),
        (json.dumps(GOOD | {"earlier": [{"first_step": 0}]}), "expected .*'num_bins'"),
        (json.dumps(GOOD | {"first_step": 2}), r"step 0 and data sets that begin at steps \[2\] do not fit"),
    ],
)
def test_a_damaged_file_is_the_users_error(tmp_path, text, message):
    path = tmp_path / "cursor.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"cursor\.json is no cursor of this version \(.*{message}"):
        Cursor.read(path)
