"""Slots of a stream are whose the weights say, at every moment, and where each dataset's slot is, is known both ways.

The oracle counts slots one by one.
"""

import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.schedule import shares as module
from mmray.schedule.shares import Shares, exact_shares

weights = st.one_of(st.floats(0.002, 1), st.integers(1, 50).map(float), st.sampled_from([0.0, 0.1, 0.7, 1 / 3, 0.001]))
streams = st.builds(
    lambda values, window, length: Shares(exact_shares(values), window, length),
    st.lists(weights, min_size=1, max_size=9).filter(any),
    st.sampled_from([1, 3, 64, 100, 512]),
    st.one_of(st.none(), st.integers(1, 3000)),
)


def counted(shares: Shares, slots: int) -> np.ndarray:
    """Number of slots of each dataset among the first 0, 1, … slots, int64 [slots + 1, datasets]."""
    datasets, _ = shares.at(np.arange(slots))
    return np.concatenate(
        [[np.zeros(len(shares.shares), int)], np.cumsum(np.eye(len(shares.shares), dtype=int)[datasets], 0)]
    )


def window_ends(shares: Shares, slots: int) -> list[int]:
    """Ends of windows, by the words of the docstring: every `window_slots`, the last one holds what is left over."""
    ends = list(range(shares.window_slots, slots + 1, shares.window_slots))
    if shares.length is not None and slots == shares.length:
        ends = [end for end in ends if shares.length - end >= shares.window_slots] + [shares.length]
    return ends


@settings(max_examples=300)
@given(shares=streams)
def test_counts_are_those_of_the_weights(shares: Shares) -> None:
    """To less than one slot at the ends of windows, to less than three after any slot."""
    slots = shares.length or min(3 * shares.window_slots, 4000)
    counts = counted(shares, slots)
    asked = np.outer(np.arange(slots + 1), [float(share) for share in shares.shares])
    assert np.abs(counts - asked).max() < 3
    for end in window_ends(shares, slots):
        assert all(abs(Fraction(int(n)) - share * end) < 1 for n, share in zip(counts[end], shares.shares)), end
    some = np.random.default_rng(0).integers(0, slots + 1, 20)
    assert [list(shares.counts(int(slot))) for slot in some] == counts[some].tolist()


@settings(max_examples=200)
@given(shares=streams, places=st.lists(st.integers(0, 10**15), min_size=1, max_size=20))
def test_each_slot_and_its_number_are_inverse(shares: Shares, places: list[int]) -> None:
    slots = np.asarray([place % shares.length if shares.length else place for place in places])
    datasets, numbers = shares.at(slots)
    for slot, dataset, number in zip(slots.tolist(), datasets.tolist(), numbers.tolist()):
        assert shares.counts(slot)[dataset] == number
        assert shares.slot_of(dataset, number) == slot


@settings(max_examples=100)
@given(shares=streams, start=st.integers(0, 2000), count=st.integers(1, 300))
def test_numbers_of_a_dataset_follow_one_another(shares: Shares, start: int, count: int) -> None:
    slots = np.arange(start, start + count) if shares.length is None else np.arange(min(shares.length, count))
    datasets, numbers = shares.at(slots)
    for dataset in set(datasets.tolist()):
        of_dataset = numbers[datasets == dataset]
        assert (np.diff(of_dataset) == 1).all()


def test_the_documented_example() -> None:
    shares = Shares(exact_shares([5, 2, 1]), window=8)
    assert shares.at(np.arange(16))[0].tolist() == [0, 1, 0, 0, 2, 0, 1, 0] * 2


def test_order_is_pinned() -> None:
    """Golden values. If this fails, every mixture's cursor means something else: do not edit, add a new order."""
    shares = Shares(exact_shares([0.7, 0.2, 0.07, 0.03]), window=16)
    assert "".join(map(str, shares.at(np.arange(40))[0])) == GOLDEN
    assert shares.window_slots == 48
    datasets, numbers = shares.at(np.arange(10**15, 10**15 + 8))
    assert (datasets.tolist(), numbers.tolist()) == GOLDEN_FAR


def test_weights_are_taken_as_they_are_written() -> None:
    assert exact_shares([0.1, 0.9]) == (Fraction(1, 10), Fraction(9, 10))
    assert exact_shares([7, 3]) == exact_shares([0.7, 0.3])
    assert exact_shares([1, 0]) == (1, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, -1], r"a weight is a number from 0 on, got -1"),
        ([float("nan")], r"a weight is a number from 0 on, got nan"),
        ([float("inf"), 1], r"a weight is a number from 0 on, got inf"),
        ([0, 0], r"one weight must be above 0"),
        (
            [1e-7, 1],
            r"weight 1e-07 is a share of 1e-07, below one bin in a million: raise it, or leave the dataset out",
        ),
    ],
)
def test_weights_that_mean_nothing_are_refused(values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exact_shares(values)


def test_what_a_stream_does_not_hold_is_refused() -> None:
    shares = Shares(exact_shares([1, 0, 1]), 4, 10)
    for dataset, number in ((1, 0), (0, 5), (2, -1)):
        with pytest.raises(IndexError, match=f"dataset {dataset} has no number {number} in this stream"):
            shares.slot_of(dataset, number)
    with pytest.raises(ValueError, match="shares must be from 0 on and have the sum 1"):
        Shares((Fraction(1, 2),), 4)
    with pytest.raises(ValueError, match="window and length must be at least 1, got 0 and None"):
        Shares((Fraction(1),), 0)


def test_a_place_costs_the_same_at_the_beginning_and_far_away() -> None:
    """64 datasets: the work is the nodes of one tree; it is counted in calls."""
    shares = Shares(exact_shares([1 + number % 7 for number in range(64)]), 4096)

    def calls(slot: int) -> int:
        counter = 0

        def count(_frame: object, event: str, _argument: object) -> None:
            nonlocal counter
            counter += event in ("call", "c_call")

        module._tree.cache_clear()
        sys.setprofile(count)
        try:
            (dataset,), (number,) = (values.tolist() for values in shares.at(np.asarray([slot])))
            shares.slot_of(dataset, number)
        finally:
            sys.setprofile(None)
        return counter

    calls(0)
    assert calls(10**15) < 2 * calls(5)


GOLDEN = "0100020010001002001000100300010020001001"
GOLDEN_FAR: tuple[list[int], list[int]] = (
    [0, 1, 0, 0, 1, 0, 0, 0],
    [
        700000000000000,
        200000000000000,
        700000000000001,
        700000000000002,
        200000000000001,
        700000000000003,
        700000000000004,
        700000000000005,
    ],
)
