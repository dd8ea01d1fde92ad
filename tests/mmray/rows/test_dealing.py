"""Rows are dealt so that every window has every file at its share, and the order of training has every set at its
share at every moment."""

from collections import Counter
from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.prepared.window import _drawn_order
from mmray.rows.dealing import MAX_LANES, dealing_of, dealt, dealt_like, first_rows, lanes_of
from mmray.schedule.schedule import Schedule

lane_rows = st.lists(st.integers(0, 40), min_size=1, max_size=8)


@given(lane_rows, st.data())
def test_the_first_rows_are_those_of_the_smallest_places(rows, data):
    """Against all rows in a list, sorted by where each stands in its lane."""
    places = sorted(
        ((row + Fraction(2 * lane + 1, 2 * len(rows))) / count, lane)
        for lane, count in enumerate(rows)
        for row in range(count)
    )
    count = data.draw(st.integers(0, sum(rows)))
    expected = Counter(lane for _, lane in places[:count])
    assert first_rows(rows, count) == [expected[lane] for lane in range(len(rows))]


@given(lane_rows, st.integers(1, 50))
def test_windows_are_whole_and_hold_every_row_once(rows, window_rows):
    windows = list(dealt(rows, window_rows))
    assert [sum(window) for window in windows[:-1]] == [window_rows] * (len(windows) - 1)
    assert len(windows) == -(-sum(rows) // window_rows)
    assert [sum(column) for column in zip(*windows, strict=True)] == (rows if windows else [])
    assert all(count >= 0 for window in windows for count in window)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=16), st.integers(1, 8192))
def test_a_lane_is_at_its_share_up_to_every_window(rows, windows):
    """Give or take a row, and where several others happen to be ahead at once, some rows more."""
    total = sum(rows)
    window_rows = max(1, total // windows, total // 200)
    for number, taken in enumerate(accumulate(map(np.asarray, dealt(rows, window_rows))), start=1):
        due = np.asarray(rows) * (min(number * window_rows, total) / max(total, 1))
        assert (np.abs(taken - due) < 1 + len(rows) / 4).all()


@pytest.mark.parametrize("window_rows", [1, 7, 512])
def test_one_lane_is_read_from_its_beginning_to_its_end(window_rows):
    assert [count for (count,) in dealt([1000], window_rows)] == [
        min(window_rows, 1000 - start) for start in range(0, 1000, window_rows)
    ]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50)), max_size=80).map(sorted), st.sampled_from([1, 2])
)  # fmt: skip
def test_every_file_with_rows_is_in_one_lane_of_its_set(files, dealing):
    sets, rows = [number for number, _ in files], [count for _, count in files]
    lanes = lanes_of(rows, sets, dealing)
    if dealing == 1:
        assert lanes == [list(range(len(rows)))]
        return
    assert sorted(file for lane in lanes for file in lane) == [file for file, count in enumerate(rows) if count]
    assert all(lane == sorted(lane) and len({sets[file] for file in lane}) == 1 for lane in lanes)
    assert [sets[lane[0]] for lane in lanes] == sorted(sets[lane[0]] for lane in lanes)
    assert len(lanes) <= max(MAX_LANES, len(set(sets)))


def test_lanes_of_a_set_with_many_files_are_about_equal():
    lanes = lanes_of([100] * 64 + [30], [0] * 64 + [1], 2)
    assert [len(lane) for lane in lanes] == [8] * 8 + [1]


@pytest.mark.parametrize(
    ("begun", "dealing"), [({"files": ["a"]}, 1), ({"dealing": 2}, 2), ({"dealing": 1}, 1)]
)  # fmt: skip
def test_what_was_begun_before_ends_as_it_was_dealt(begun, dealing):
    record = {"dealing": 2, "files": ["a", "b"]}
    assert dealing_of(dealt_like(record, begun)) == dealing
    assert dealt_like(record, begun).keys() - {"dealing"} == {"files"}
    assert record == {"dealing": 2, "files": ["a", "b"]}


# ---- In the order of training ----

NUM_BINS = 10**6
SHARES = {"0.2 %": 0.002, "1 %": 0.01, "30 %": 0.3}
STEP_BINS, STEPS = 64, 1000


def sets_of_bins(dealing: int, window_bins: int) -> np.ndarray:
    """The set of each bin, int8 [bins]: 3 is that of all others. Each bin is taken to hold one set, the worst case."""
    counts = [round(NUM_BINS * share) for share in SHARES.values()]
    counts.append(NUM_BINS - sum(counts))
    if dealing == 1:
        return np.repeat(np.arange(4, dtype=np.int8), counts)
    made = (np.repeat(np.arange(4, dtype=np.int8), window) for window in dealt(counts, window_bins))
    return np.concatenate([window[_drawn_order(len(window), seed)] for seed, window in enumerate(made)])


def moments(sets: np.ndarray, number: int, order: np.ndarray) -> tuple[float, int]:
    """Of one set: how far its share in any 1,000 steps is from that of all, in deviations of a full shuffle; and the
    longest stretch of bins without it."""
    found = np.concatenate([[0], np.cumsum(sets[order] == number)])
    bins, share = STEPS * STEP_BINS, found[-1] / NUM_BINS
    counts = found[bins::STEP_BINS] - found[:-bins:STEP_BINS]
    deviation = (bins * share * (1 - share) * (1 - bins / NUM_BINS)) ** 0.5
    places = np.flatnonzero(np.diff(found))
    longest = np.diff(np.concatenate([[-1], places, [NUM_BINS]])).max() - 1
    return float(np.abs(counts - bins * share).max() / deviation), int(longest)


@pytest.mark.parametrize("window_bins", [700, 1024, 3000])
def test_every_set_is_at_its_share_in_any_1000_steps(window_bins):
    """In the band that holds 99.9 % of a full shuffle's steps, 3.29 deviations; what chance gives the worst of so many
    moments is let pass up to 4. Files one after another leave it by 20."""
    sets, before = sets_of_bins(2, window_bins), sets_of_bins(1, window_bins)
    order = Schedule(NUM_BINS, STEP_BINS, 0, "3f2a").bins_in(0, 0, NUM_BINS)
    shuffled = np.random.default_rng(0).permutation(NUM_BINS)
    for number, (name, share) in enumerate(SHARES.items()):
        (far, longest), (_, chance) = moments(sets, number, order), moments(sets, number, shuffled)
        assert far < 4, name
        assert longest < 3 * chance, name
        far_before, longest_before = moments(before, number, order)
        assert far_before > 20, name
        if share < 0.1:
            assert longest_before > 50 * chance, name


def test_shares_are_those_of_the_window_in_its_file_too():
    """1,024 neighbouring bins anywhere, whatever the windows' size."""
    sets = sets_of_bins(2, 900)
    shares = np.asarray([(sets[start : start + 1024] == 2).mean() for start in range(0, NUM_BINS - 1024, 1024)])
    assert np.abs(shares - 0.3).max() < 4.5 * (0.3 * 0.7 / 1024) ** 0.5
