"""The schedule's laws: every bin once per epoch, the same for any number of ranks, in one order forever."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.schedule.order import Taken
from mmray.schedule.schedule import Schedule, _permutation

BILLION = 10**9


def epoch_bins(schedule: Schedule, epoch: int) -> list[int]:
    steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
    return [bin for step in steps for bin in schedule.bins(step) if bin is not None]


def dealt(schedule: Schedule, step: int, world_size: int, micro_batch_bins: int) -> list[int | None]:
    """What all ranks hold of one step, read in the documented order."""
    ranks = [schedule.rank_bins(step, rank, world_size, micro_batch_bins) for rank in range(world_size)]
    return [bin for micro_batches in zip(*ranks, strict=True) for bins in micro_batches for bin in bins]


# --- the order ----------------------------------------------------------------------------------------------


def test_order_is_pinned():
    """Golden values. If this fails, every checkpoint's cursor means something else: do not edit, add a new
    order.
    """
    small = Schedule(num_bins=10, global_batch_bins=4, seed=0, fingerprint="3f2a")
    assert [small.bins(step) for step in range(6)] == GOLDEN_SMALL
    large = Schedule(num_bins=BILLION, global_batch_bins=4, seed=7, fingerprint="3f2a")
    assert [large.bins(step) for step in (0, 1, 249_999_999, 250_000_000, 10**12)] == GOLDEN_LARGE
    blocks = Schedule(num_bins=22, global_batch_bins=22, seed=1, fingerprint="é", shuffle_block=4, shuffle_window=2)
    assert blocks.bins(0) == GOLDEN_BLOCKS


GOLDEN_SMALL = [
    [2, 5, 8, 7],
    [9, 1, 0, 3],
    [4, 6, None, None],
    [6, 7, 1, 5],
    [3, 0, 4, 9],
    [2, 8, None, None],
]
GOLDEN_LARGE = [
    [765861707, 150230145, 843094617, 943666259],
    [318017092, 365052046, 771739361, 374334068],
    [158744327, 164315384, 980176088, 731661092],
    [100998413, 714874218, 999142459, 844333193],
    [230328403, 578670638, 173535235, 623688892],
]
GOLDEN_BLOCKS = [20, 21, 15, 13, 14, 12, 19, 0, 1, 18, 17, 16, 3, 2, 10, 9, 5, 4, 11, 8, 6, 7]


def test_permutation_of_every_size_to_2000():
    for size in range(1, 2001):
        permutation = _permutation(size, "3f2a", seed=size % 5, epoch=0, purpose="window", number=0)
        values = [permutation[index] for index in range(size)]
        assert sorted(values) == list(range(size))
        assert [permutation.place_of(value) for value in values[:5]] == list(range(min(5, size)))


@given(size=st.integers(1, 2**62), seed=st.integers(0, 2**64), index=st.integers(0))
def test_permutation_has_an_inverse_at_any_size(size, seed, index):
    permutation = _permutation(size, "3f2a", seed, epoch=3, purpose="window", number=0)
    assert 0 <= permutation[index % size] < size
    assert permutation.place_of(permutation[index % size]) == index % size


@given(
    num_bins=st.integers(1, 300),
    global_batch_bins=st.integers(1, 40),
    shuffle_block=st.integers(1, 40),
    shuffle_window=st.integers(1, 10),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_every_bin_once_per_epoch(num_bins, global_batch_bins, shuffle_block, shuffle_window, epoch, shuffle):
    schedule = Schedule(num_bins, global_batch_bins, 5, "3f2a", shuffle, shuffle_block, shuffle_window)
    assert sorted(epoch_bins(schedule, epoch)) == list(range(num_bins))


def test_every_bin_once_at_every_size_to_2500():
    for num_bins in range(1, 2501):
        schedule = Schedule(num_bins, 7, 0, "3f2a", shuffle_block=16, shuffle_window=4)
        np.testing.assert_array_equal(np.sort(schedule.bins_in(1, 0, num_bins)), np.arange(num_bins))


@pytest.mark.parametrize("num_bins", range(1, 130))
def test_every_bin_once_with_a_short_block_anywhere(num_bins):
    for epoch in range(6):
        schedule = Schedule(num_bins, 7, 0, "3f2a", shuffle_block=8, shuffle_window=3)
        assert sorted(epoch_bins(schedule, epoch)) == list(range(num_bins))


def test_a_billion_bins_by_sampling():
    schedule = Schedule(BILLION, 64, seed=0, fingerprint="3f2a")
    places = np.random.default_rng(0).choice(BILLION, size=20_000, replace=False).tolist()
    bins = [schedule.bin_at(2, place) for place in places]
    assert len(set(bins)) == len(places)
    assert min(bins) >= 0
    assert max(bins) < BILLION
    assert abs(np.corrcoef(places, bins)[0, 1]) < 0.03


@given(
    num_bins=st.integers(1, 300),
    shuffle_block=st.integers(1, 40),
    shuffle_window=st.integers(1, 10),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
    borders=st.tuples(st.integers(0, 300), st.integers(0, 300)),
)
def test_ranges_are_their_places(num_bins, shuffle_block, shuffle_window, epoch, shuffle, borders):
    schedule = Schedule(num_bins, 4, 5, "3f2a", shuffle, shuffle_block, shuffle_window)
    start, stop = sorted(min(border, num_bins) for border in borders)
    bins = schedule.bins_in(epoch, start, stop)
    assert bins.dtype == np.int64
    assert bins.tolist() == [schedule.bin_at(epoch, place) for place in range(start, stop)]


@given(
    num_bins=st.integers(1, 300),
    shuffle_block=st.integers(1, 20),
    epoch=st.integers(0, 3),
    changes=st.lists(st.tuples(st.integers(0, 80), st.integers(1, 12)), min_size=1, max_size=8),
)
def test_every_bin_once_where_windows_change_in_an_epoch(num_bins, shuffle_block, epoch, changes):
    """The first window size holds for the whole epoch as far as it is not changed; each change comes some bins after
    the one before, and finishes the window in progress, which holds the same bins as without the change."""
    order = Schedule(num_bins, 4, 5, "3f2a", shuffle_block=shuffle_block, shuffle_window=changes[0][1])
    done, bins = epoch * num_bins, []
    for length, window in changes:
        unchanged, place = order, order.place(done)
        order = replace(order, shuffle_window=window, begun=place)
        index = done - epoch * num_bins
        if place.window and index < num_bins:
            lengths = [min(shuffle_block, num_bins - block * shuffle_block) for block in blocks_in_order(order, epoch)]
            end = sum(lengths[: place.first_block + place.window])
            assert sum(lengths[: place.first_block]) < index < end
            assert order.bins_in(epoch, index, end).tolist() == unchanged.bins_in(epoch, index, end).tolist()
        taken = order.bins_in(epoch, index, min(index + length, num_bins)).tolist()
        assert taken == [order.bin_at(epoch, index + number) for number in range(len(taken))]
        bins, done = bins + taken, done + len(taken)
        if done == (epoch + 1) * num_bins:
            break
    rest = order.bins_in(epoch, done - epoch * num_bins, num_bins).tolist()
    assert sorted(bins + rest) == list(range(num_bins))
    following = order.bins_in(epoch + 1, 0, num_bins).tolist()
    assert following == replace(order, begun=Taken()).bins_in(epoch + 1, 0, num_bins).tolist()


def blocks_in_order(order: Schedule, epoch: int) -> list[int]:
    """The blocks in the order in which windows take them; with windows of one block, one block comes after another."""
    alone = replace(order, shuffle_window=1, begun=Taken()).bins_in(epoch, 0, order.num_bins) // order.shuffle_block
    return list(dict.fromkeys(alone.tolist()))


@pytest.mark.parametrize("start", [0, 65_000, 499_999_000, BILLION - 3000])
def test_ranges_of_a_billion_bins(start):
    schedule = Schedule(BILLION, 64, seed=0, fingerprint="3f2a")
    places = range(start, start + 3000, 61)
    assert schedule.bins_in(2, start, start + 3000)[::61].tolist() == [schedule.bin_at(2, place) for place in places]


def test_reads_stay_in_the_blocks_of_a_window():
    """One window of a billion bins is 8 whole blocks of 64, from 8 far places, in mixed order."""
    schedule = Schedule(BILLION, 512, 0, "3f2a", shuffle_block=64, shuffle_window=8)
    bins = schedule.bins(1_000_000)
    blocks = {bin // 64 for bin in bins}
    assert sorted(bins) == sorted(block * 64 + i for block in blocks for i in range(64))
    assert len(blocks) == 8
    assert max(blocks) - min(blocks) > 1_000_000
    assert len({bin // 64 for bin in bins[:64]}) > 4


def test_padding_is_at_the_end_of_the_epoch_only():
    schedule = Schedule(num_bins=10, global_batch_bins=4, seed=0, fingerprint="3f2a")
    assert schedule.steps_per_epoch == 3
    assert [schedule.bins(step).count(None) for step in range(6)] == [0, 0, 2, 0, 0, 2]
    assert schedule.bins(2)[2:] == [None, None]
    assert Schedule(8, 4, 0, "3f2a").bins(1).count(None) == 0
    assert Schedule(1, 3, 0, "3f2a").bins(5) == [0, None, None]


def test_position():
    schedule = Schedule(num_bins=10, global_batch_bins=4, seed=0, fingerprint="3f2a")
    assert [schedule.position(step) for step in (0, 2, 3, 3000)] == [(0, 0), (0, 2), (1, 0), (1000, 0)]


def test_unshuffled_is_the_prepared_order():
    schedule = Schedule(num_bins=5, global_batch_bins=3, seed=9, fingerprint="3f2a", shuffle=False)
    assert [schedule.bins(step) for step in range(3)] == [[0, 1, 2], [3, 4, None], [0, 1, 2]]


# --- what the order depends on ------------------------------------------------------------------------------


def test_epochs_seeds_and_data_sets_have_their_own_order():
    orders = [
        tuple(epoch_bins(Schedule(200, 8, seed, fingerprint), epoch))
        for seed in (0, 1)
        for fingerprint in ("3f2a", "77b0")
        for epoch in range(3)
    ]
    assert len(set(orders)) == len(orders)
    assert all(abs(np.corrcoef(order, range(200))[0, 1]) < 0.3 for order in orders)


def test_every_bin_reaches_every_place():
    """Over many epochs, the place of a bin is uniform: chi-square far from a shuffle that favours places."""
    num_bins, epochs = 12, 3000
    counts = np.zeros((num_bins, num_bins))
    for epoch in range(epochs):
        schedule = Schedule(num_bins, num_bins, 0, "3f2a", shuffle_block=5, shuffle_window=8)
        for place, bin in enumerate(schedule.bins(epoch)):
            counts[place, bin] += 1
    expected = epochs / num_bins
    degrees = (num_bins - 1) ** 2
    assert ((counts - expected) ** 2 / expected).sum() < degrees + 5 * (2 * degrees) ** 0.5


def test_global_batch_does_not_change_the_order():
    """Another global batch re-cuts the same order: a cursor's meaning changes, the order of bins does not."""
    assert epoch_bins(Schedule(100, 7, 3, "3f2a"), 4) == epoch_bins(Schedule(100, 32, 3, "3f2a"), 4)


# --- dealing to ranks ---------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    num_bins=st.integers(1, 60),
    global_batch_bins=st.integers(1, 24),
    world_size=st.integers(1, 12),
    micro_batch_bins=st.integers(1, 6),
    step=st.integers(0, 100),
)
def test_ranks_together_hold_exactly_the_global_batch(num_bins, global_batch_bins, world_size, micro_batch_bins, step):
    schedule = Schedule(num_bins, global_batch_bins, 1, "3f2a")
    together = dealt(schedule, step, world_size, micro_batch_bins)
    assert together[:global_batch_bins] == schedule.bins(step)
    assert set(together[global_batch_bins:]) <= {None}
    accumulation = schedule.micro_batches_per_rank(world_size, micro_batch_bins)
    assert len(together) == accumulation * world_size * micro_batch_bins
    assert (accumulation - 1) * world_size * micro_batch_bins < global_batch_bins


def test_dealing_as_documented():
    schedule = Schedule(num_bins=100, global_batch_bins=10, seed=0, fingerprint="3f2a", shuffle=False)
    assert schedule.rank_bins(1, rank=0, world_size=2, micro_batch_bins=2) == [[10, 11], [14, 15], [18, 19]]
    assert schedule.rank_bins(1, rank=1, world_size=2, micro_batch_bins=2) == [
        [12, 13],
        [16, 17],
        [None, None],
    ]


def test_4096_ranks_and_a_resume_at_1000():
    schedule = Schedule(BILLION, 4096, seed=0, fingerprint="3f2a")
    step = 123_456
    assert dealt(schedule, step, 4096, 1) == schedule.bins(step)
    assert dealt(schedule, step, 1000, 1)[:4096] == schedule.bins(step)


def test_numpy_integers_are_integers():
    values = Schedule(np.int64(50), np.int32(4), np.int64(3), "3f2a")
    assert values == Schedule(50, 4, 3, "3f2a")
    assert values.rank_bins(np.int64(2), np.int64(1), np.int64(2)) == Schedule(50, 4, 3, "3f2a").rank_bins(2, 1, 2)
    assert all(type(bin) is int for bin in chain(values.bins(np.int64(1))))


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bins": 0}, "num_bins must be at least 1, got 0"),
        ({"global_batch_bins": -3}, "global_batch_bins must be at least 1, got -3"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"shuffle_block": 0}, "shuffle_block must be at least 1, got 0"),
        ({"shuffle_window": 0}, "shuffle_window must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_quoted(change, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"num_bins": 9, "global_batch_bins": 2, "seed": 0, "fingerprint": "3f2a"} | change)


def test_bad_places_are_quoted():
    schedule = Schedule(9, 2, 0, "3f2a")
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        schedule.bins(-1)
    with pytest.raises(ValueError, match=r"rank must be from 0 to 3 \(world_size - 1\), got 4"):
        schedule.rank_bins(0, rank=4, world_size=4)
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        schedule.rank_bins(0, rank=0, world_size=0)
    with pytest.raises(ValueError, match="micro_batch_bins must be at least 1, got 0"):
        schedule.micro_batches_per_rank(2, 0)
    with pytest.raises(ValueError, match=r"index must be from 0 to 8 \(num_bins - 1\), got 9"):
        schedule.bin_at(0, 9)
    with pytest.raises(TypeError, match=r"step must be an integer, got 1\.5"):
        schedule.bins(1.5)
    with pytest.raises(ValueError, match="start and stop must lie in order from 0 to 9, got 3 and 10"):
        schedule.bins_in(0, 3, 10)
