"""pack_2d: its laws on random items, and its bins against quadratic first-fit-decreasing on mixtures."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.packing import pack as packing
from mmray.packing.pack import lower_bound, pack_2d

TOKEN_CAPACITY, VISUAL_CAPACITY = 16384, 8192
CAPACITIES = {"token_capacity": TOKEN_CAPACITY, "visual_capacity": VISUAL_CAPACITY}


def assert_is_packing(bins, tokens, visual_tokens, token_capacity, visual_capacity):
    """Every index once, no bin over a capacity, the documented order."""
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(tokens)))
    for bin_ in bins:
        assert bin_ == sorted(bin_)
        assert sum(tokens[i] for i in bin_) <= token_capacity
        assert sum(visual_tokens[i] for i in bin_) <= visual_capacity
    assert [bin_[0] for bin_ in bins] == sorted(bin_[0] for bin_ in bins)


def quadratic_ffd(tokens, visual_tokens, token_capacity, visual_capacity):
    """First-fit-decreasing by max(tokens / capacity, visual / capacity): every bin is looked at."""

    def size(i):
        return max(tokens[i] / token_capacity, visual_tokens[i] / max(visual_capacity, 1))

    bins, rooms = [], []
    for i in sorted(range(len(tokens)), key=size, reverse=True):
        place = 0
        while place < len(bins) and (rooms[place][0] < tokens[i] or rooms[place][1] < visual_tokens[i]):
            place += 1
        if place == len(bins):
            bins.append([])
            rooms.append([token_capacity, visual_capacity])
        bins[place].append(i)
        rooms[place][0] -= tokens[i]
        rooms[place][1] -= visual_tokens[i]
    return bins


# ---- Mixtures: (tokens, visual_tokens) of n rows ----


def ocr_like(rng, n):
    visual = rng.choice([1, 2, 4, 6, 7, 9], n) * 256
    return visual + np.minimum(rng.lognormal(6, 0.9, n).astype(int) + 20, 6000), visual


def ocr_any_size(rng, n):
    visual = rng.integers(50, 8000, n)
    return visual + np.minimum(rng.lognormal(6, 1, n).astype(int), 7000), visual


def few_sizes(rng, n):
    sizes = np.array([[5462, 2731], [4097, 2049], [8200, 100], [300, 4000], [3300, 1700], [2800, 1400]])
    return tuple(sizes[rng.integers(0, len(sizes), n)].T)


def text_only(rng, n):
    return np.minimum(rng.lognormal(6.5, 1.2, n).astype(int) + 1, TOKEN_CAPACITY), np.zeros(n, dtype=int)


def text_beside_images(rng, n):
    is_text = rng.random(n) < 0.5
    tokens = np.where(is_text, rng.integers(500, 9000, n), rng.integers(50, 600, n))
    return tokens, np.where(is_text, 0, rng.integers(1000, 5000, n))


def both_beside_both(rng, n):
    is_text = rng.random(n) < 0.5
    tokens = np.where(is_text, rng.integers(3000, 16000, n), rng.integers(600, 5000, n))
    return tokens, np.where(is_text, rng.integers(0, 300, n), rng.integers(500, 4500, n))


MIXTURES = [ocr_like, ocr_any_size, few_sizes, text_only, text_beside_images, both_beside_both]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mixture", MIXTURES)
def test_never_more_bins_than_quadratic_ffd(mixture, seed):
    tokens, visual = (sizes.tolist() for sizes in mixture(np.random.default_rng(seed), 1500))
    bins = pack_2d(tokens, visual, **CAPACITIES)
    assert_is_packing(bins, tokens, visual, TOKEN_CAPACITY, VISUAL_CAPACITY)
    ffd = quadratic_ffd(tokens, visual, TOKEN_CAPACITY, VISUAL_CAPACITY)
    assert lower_bound(tokens, visual, **CAPACITIES) <= len(bins) <= len(ffd)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_classical_order_packs_exactly_like_quadratic_ffd(mixture):
    sizes = np.stack(mixture(np.random.default_rng(7), 1500), axis=1)
    capacity = np.array([TOKEN_CAPACITY, VISUAL_CAPACITY])
    classical = next(packing._orders(sizes, capacity))
    ffd = quadratic_ffd(*sizes.T.tolist(), TOKEN_CAPACITY, VISUAL_CAPACITY)
    expected = np.empty(len(sizes), dtype=int)
    for number, bin_ in enumerate(ffd):
        expected[bin_] = number
    levels = packing._levels(sizes[:, 1])
    bin_of_item = packing._first_fit(sizes, classical, capacity, levels, packing._STEPS_PER_ROW)
    np.testing.assert_array_equal(bin_of_item, expected)


def test_another_order_saves_bins_where_text_meets_images():
    tokens, visual = (sizes.tolist() for sizes in text_beside_images(np.random.default_rng(0), 1500))
    ffd = quadratic_ffd(tokens, visual, TOKEN_CAPACITY, VISUAL_CAPACITY)
    assert len(pack_2d(tokens, visual, **CAPACITIES)) < 0.95 * len(ffd)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_with_the_allowance_spent_bins_still_hold(mixture):
    sizes = np.stack(mixture(np.random.default_rng(3), 1500), axis=1)
    capacity = np.array([TOKEN_CAPACITY, VISUAL_CAPACITY])
    classical = next(packing._orders(sizes, capacity))
    bin_of_item = packing._first_fit(sizes, classical, capacity, packing._levels(sizes[:, 1]), 0)
    assert_is_packing(packing._as_lists(bin_of_item), *sizes.T.tolist(), TOKEN_CAPACITY, VISUAL_CAPACITY)


def test_many_rows():
    tokens, visual = ocr_any_size(np.random.default_rng(0), 30_000)
    bins = pack_2d(tokens, visual, **CAPACITIES)
    assert_is_packing(bins, tokens.tolist(), visual.tolist(), TOKEN_CAPACITY, VISUAL_CAPACITY)
    assert len(bins) < 1.01 * lower_bound(tokens, visual, **CAPACITIES)


@given(
    capacities=st.tuples(st.integers(1, 40), st.integers(0, 40)),
    data=st.data(),
    num_items=st.integers(0, 90),
)
def test_laws_on_random_items(capacities, data, num_items):
    tokens, visual = (
        data.draw(st.lists(st.integers(0, capacity), min_size=num_items, max_size=num_items)) for capacity in capacities
    )
    token_capacity, visual_capacity = capacities
    arguments = {"token_capacity": token_capacity, "visual_capacity": visual_capacity}
    bins = pack_2d(tokens, visual, **arguments)
    assert_is_packing(bins, tokens, visual, *capacities)
    assert lower_bound(tokens, visual, **arguments) <= len(bins)
    assert len(bins) <= len(quadratic_ffd(tokens, visual, *capacities))
    assert pack_2d(np.array(tokens, dtype=np.int32), np.array(visual, dtype=np.int32), **arguments) == bins


# ---- Edges ----


def test_no_items():
    assert pack_2d([], [], **CAPACITIES) == []
    assert lower_bound([], [], **CAPACITIES) == 0


def test_both_capacities_bind():
    arguments = {"token_capacity": 10, "visual_capacity": 4}
    assert pack_2d([1, 1, 1], [4, 4, 4], **arguments) == [[0], [1], [2]]
    assert pack_2d([5, 5, 5], [0, 0, 0], **arguments) == [[0, 1], [2]]
    assert pack_2d([9, 9, 1, 1], [0, 0, 4, 4], **arguments) == [[0, 2], [1, 3]]
    assert pack_2d([10, 10], [4, 4], **arguments) == [[0], [1]]


def test_text_only_with_and_without_visual_capacity():
    for visual_capacity in (0, 8):
        arguments = {"token_capacity": 10, "visual_capacity": visual_capacity}
        assert pack_2d([7, 3, 5, 5], [0, 0, 0, 0], **arguments) == [[0, 1], [2, 3]]
        assert lower_bound([7, 3, 5, 5], [0, 0, 0, 0], **arguments) == 2


def test_items_of_no_size_share_a_bin():
    assert pack_2d([0, 0, 0], [0, 0, 0], **CAPACITIES) == [[0, 1, 2]]


def test_indices_are_python_ints():
    bins = pack_2d(np.array([3, 4]), np.array([1, 1]), **CAPACITIES)
    assert all(type(index) is int for bin_ in bins for index in bin_)


def test_lower_bound_is_the_larger_of_both_sums():
    arguments = {"token_capacity": 10, "visual_capacity": 4}
    assert lower_bound([5, 5, 1], [0, 0, 1], **arguments) == 2
    assert lower_bound([1, 1, 1], [4, 4, 1], **arguments) == 3
    assert lower_bound([10], [4], **arguments) == 1


@pytest.mark.parametrize("function", [pack_2d, lower_bound])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [1, 11, 12]}, "item 1: tokens is 11; token_capacity allows 0 to 10"),
        ({"visual_tokens": [0, 0, 5]}, "item 2: visual_tokens is 5; visual_capacity allows 0 to 4"),
        ({"visual_tokens": [1, 0, 0], "visual_capacity": 0}, "item 0: visual_tokens is 1; visual_capacity"),
        ({"tokens": [1, -2, 3]}, "item 1: tokens is -2"),
        ({"tokens": [1.0, 2.0, 3.0]}, r"tokens is float64 of shape \(3,\)"),
        ({"tokens": [[1, 2, 3]]}, r"tokens is int64 of shape \(1, 3\)"),
        ({"tokens": [True, False, True]}, "tokens is bool"),
        ({"tokens": [1, 2]}, "tokens has 2 items, visual_tokens 3"),
        ({"token_capacity": 0}, "token_capacity is 0"),
        ({"token_capacity": 2**31}, "token_capacity is 2147483648"),
        ({"visual_capacity": -1}, "visual_capacity is -1"),
    ],
)
def test_refused(function, change, message):
    arguments = {"tokens": [1, 2, 3], "visual_tokens": [0, 0, 4], "token_capacity": 10, "visual_capacity": 4}
    with pytest.raises(ValueError, match=message):
        function(**{**arguments, **change})
