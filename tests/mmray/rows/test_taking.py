"""Which rows are taken, and how often: against plain lists of all rows."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mmray.errors import UserError
from mmray.rows.settings import DatasetSettings, DataSettings
from mmray.rows.taking import Drawn, Taking, shares_of, takings

PAGES = {"files": "pages.jsonl", "kind": "pretrain"}


@given(st.integers(1, 400), st.data(), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_as_many_rows_as_asked_for_are_drawn_in_order_and_known_one_by_one(
    rows: int, data: st.DataObject, seed: int
) -> None:
    taken = data.draw(st.integers(1, rows))
    drawn = Drawn(rows, taken, seed)
    positions = drawn.positions(0, taken).tolist()
    assert positions == sorted(set(positions))
    assert positions[0] >= 0
    assert positions[-1] < rows
    assert [drawn.positions(number, number + 1).item() for number in range(taken)] == positions
    assert [drawn.before(row) for row in range(rows + 1)] == [
        sum(position < row for position in positions) for row in range(rows + 1)
    ]


@given(st.integers(1, 300), st.data())
@settings(deadline=None)
def test_every_part_of_a_set_has_its_share_of_the_drawn_rows(rows: int, data: st.DataObject) -> None:
    taken = data.draw(st.integers(1, rows))
    positions = Drawn(rows, taken, 5).positions(0, taken)
    for row in range(rows + 1):
        assert abs((positions < row).sum() - row * taken / rows) <= 1


def test_each_row_is_drawn_equally_often_over_seeds() -> None:
    counts = np.zeros(60)
    for seed in range(3000):
        counts[Drawn(60, 7, seed).positions(0, 7)] += 1
    expected = 3000 * 7 / 60
    assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)


def test_a_row_of_a_billion_is_known_at_once() -> None:
    drawn = Drawn(10**9, 10**8 + 7, 3)
    (position,) = drawn.positions(10**8, 10**8 + 1).tolist()
    assert drawn.before(position) == 10**8
    assert drawn.before(position + 1) == 10**8 + 1


def test_the_first_rows_are_the_first_rows() -> None:
    drawn = Drawn(10, 4)
    assert drawn.positions(0, 4).tolist() == [0, 1, 2, 3]
    assert [drawn.before(row) for row in range(11)] == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 4]


@given(st.integers(1, 50), st.integers(1, 200))
def test_every_row_is_taken_as_often_as_every_other_or_once_more(rows: int, taken: int) -> None:
    taking = Taking(rows, taken, 1)
    times = Counter[int]()
    for drawn in taking.passes:
        times.update(drawn.positions(0, drawn.taken).tolist())
    assert times.total() == taken
    assert {times[row] for row in range(rows)} <= {taken // rows, taken // rows + 1}
    assert taking.left_out == sum(times[row] == 0 for row in range(rows))
    assert taking.repeated == sum(max(0, times[row] - 1) for row in range(rows))


def decided(counts: list[int], *sets: dict[str, object], tokens: tuple[float, ...] = (), **data: object) -> list[int]:
    settings = DataSettings.model_validate({"train": [PAGES | each for each in sets], **data})
    return [taking.taken for taking in takings(settings.train, settings, counts, tokens)]


def test_the_numbers_of_rows_are_those_that_the_settings_say() -> None:
    assert decided([10, 10, 100], {"repeat": 2.5}, {"repeat": 1}, {"repeat": 0.1}) == [25, 10, 10]
    assert decided([10, 10], {"max_rows": 4}, {"max_rows": 400, "take": "first"}) == [4, 10]
    assert decided([10, 1000], {"weight": 1}, {"weight": 3}, rows=200) == [50, 150]
    assert decided([5, 5, 5], {"weight": 1}, {"weight": 1}, {"weight": 1}, rows=10) == [4, 3, 3]
    assert decided([7, 7], {}, {}) == []
    assert decided([7, 7], {}, {"repeat": 2}) == [7, 14]


def test_tenths_are_exact() -> None:
    """0.1 and 1.1 are no binary fractions."""
    assert decided([10**9 + 10], {"repeat": 0.1}) == [10**8 + 1]
    assert decided([30], {"repeat": 1.1}) == [33]


@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(5, 5000)), min_size=1, max_size=6), st.integers(10_000, 10**9))
@settings(deadline=None)
def test_weights_of_tokens_are_shares_of_tokens(sets: list[tuple[float, float]], rows: int) -> None:
    weights, tokens = zip(*sets, strict=True)
    total = sum(weights)
    small = min(rows * (w / t) / sum(w / t for w, t in sets) for w, t in sets)
    if small < 100:
        return
    taken = decided(
        [1000] * len(sets), *({"weight": weight} for weight in weights), tokens=tokens, rows=rows, weigh_by="tokens"
    )
    assert sum(taken) == rows
    counted = [count * length for count, length in zip(taken, tokens, strict=True)]
    for weight, count in zip(weights, counted, strict=True):
        assert count / sum(counted) == pytest.approx(weight / total, rel=0.03)


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (4, {"repeat": 0.1}, r"data\.train\[0\]: repeat: 0\.1 takes none of its 4 rows; raise it"),
        (0, {"weight": 1}, "its files hold no row; leave the set out"),
    ],
)
def test_a_set_of_which_nothing_would_be_taken_is_refused(
    rows: int, changes: dict[str, object], message: str
) -> None:  # fmt: skip
    with pytest.raises(UserError, match=message):
        decided([rows], changes, **({"rows": 9} if "weight" in changes else {}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": [PAGES | {"repeat": 2, "max_rows": 3}]}, "repeat and max_rows each say how many rows"),
        ({"train": [PAGES | {"repeat": 2, "weight": 3}], "rows": 3}, "repeat and weight each say"),
        ({"train": [PAGES | {"take": "first"}]}, "set max_rows, or leave take out"),
        ({"train": [PAGES | {"repeat": 0}]}, "greater than 0"),
        ({"train": [PAGES | {"repeat": math.inf}]}, "repeat"),
        ({"train": [PAGES | {"weight": math.nan}], "rows": 9}, "weight"),
        ({"train": [PAGES | {"weight": 1}]}, "set data.rows"),
        ({"train": [PAGES | {"weight": 1}, PAGES], "rows": 9}, r"train\[1\] has no weight"),
        ({"train": [PAGES], "rows": 9}, "give every set of train a weight, or leave rows out"),
        ({"train": [PAGES], "weigh_by": "tokens"}, "give every set of train a weight, or leave it out"),
        ({"train": [PAGES], "eval": [PAGES | {"weight": 1}]}, r"eval\[0\]\.weight: .* use max_rows or repeat"),
        ({"train": [PAGES], "eval": [PAGES | {"repeat": 1.5}]}, "an evaluation counts each row once at most"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_the_remedy(data: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataSettings.model_validate(data)


def test_an_evaluation_may_take_some_rows() -> None:
    data = DataSettings.model_validate({"train": [PAGES], "eval": [PAGES | {"max_rows": 5}, PAGES | {"repeat": 0.5}]})
    assert [taking.taken for taking in takings(data.eval, data, [100, 10], split="eval")] == [5, 5]


def test_unset_settings_leave_no_trace_in_the_record() -> None:
    data = DataSettings.model_validate({"train": [PAGES], "seed": 3})
    assert data.how_many_record(data.train) == {}
    assert not {"repeat", "max_rows", "take", "weight"} & set(data.train[0].record())
    assert DatasetSettings.model_validate(PAGES | {"repeat": 2}).record()["repeat"] == 2


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=12), st.integers(0, 9000), st.integers(0, 1))
def test_shares_are_exact_and_in_proportion(sizes: list[int], count: int, least: int) -> None:
    shares = shares_of(count, sizes, least=least)
    filled, total = sum(size > 0 for size in sizes), sum(sizes)
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    if least and count < filled:
        assert [share > 0 for share in shares] == [size > 0 for size in sizes]
        return
    assert sum(shares) == min(count, total)
    if least:
        assert all(share >= 1 for share, size in zip(shares, sizes, strict=True) if size)
    elif count < total:
        assert all(abs(share * total - count * size) < total for share, size in zip(shares, sizes, strict=True))
