"""Balanced batches keep the schedule's laws (every bin once, a pure function, one order for any number of ranks) and
carry equal cost. Their bins are those of the shuffled order; sorted across batches, they come in random order.
"""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.batches.micro_batch import Place
from mmray.batches.plan import BatchMaker, BatchPlan
from mmray.schedule.balance import BalanceSettings
from mmray.schedule.balanced import BalancedSchedule, BoundSchedule
from mmray.schedule.loads import Loads
from mmray.schedule.schedule import Schedule, mix_many
from tests.mmray.preparing import Preparation, write_rows

BILLION = 10**9
SHAPES = np.asarray(["1x1", "2x3", "3x2", "mixed", "text"])
TOKENS_ONLY = {"token_pair": 0, "trained_token": 0, "visual_token": 0, "visual_pair": 0, "whole_row_attention": False}
SORTED = TOKENS_ONLY | {"across_batches": True}


def loads_of(bins: np.ndarray) -> Loads:
    """Loads from a hash of the bin's number: 2,000 to 10,191 tokens, one of five shapes."""
    draws = mix_many(np.asarray(bins).astype(np.uint64) + np.uint64(1))
    tokens = 2000 + (draws % np.uint64(8192)).astype(np.int64)
    nothing = np.zeros_like(tokens)
    return Loads(tokens, nothing, nothing, nothing, nothing, SHAPES[(draws >> np.uint64(40)) % np.uint64(5)])


def costs_of(bins: np.ndarray) -> np.ndarray:
    return loads_of(bins).tokens.astype(np.float64)


def balanced(num_bins: int, global_batch_bins: int, seed: int = 0, loads=loads_of, **balance) -> BoundSchedule:
    order = Schedule(num_bins, global_batch_bins, seed, "3f2a")
    return BalancedSchedule(order, BalanceSettings(**SORTED | balance)).bound_to(loads)


def fair(num_bins: int, global_batch_bins: int, seed: int = 0, **order) -> BoundSchedule:
    plain = Schedule(num_bins, global_batch_bins, seed, "3f2a", **order)
    return BalancedSchedule(plain, BalanceSettings(**TOKENS_ONLY)).bound_to(loads_of)


def epoch_of(order: BoundSchedule, epoch: int = 0) -> list[list[int | None]]:
    steps = order.schedule.steps_per_epoch
    return [order.bins(epoch * steps + step) for step in range(steps)]


def full_batches(order: BoundSchedule, epoch: int = 0) -> np.ndarray:
    """int64 [steps, bins]: the batches without padding."""
    return np.asarray([batch for batch in epoch_of(order, epoch) if None not in batch])


def heaviest(costs: np.ndarray) -> np.ndarray:
    """costs [..., ranks]: the heaviest rank against the mean."""
    return costs.max(axis=-1) / costs.mean(axis=-1)


# --- every bin once -----------------------------------------------------------------------------------------


def check_epoch(order: BoundSchedule, epoch: int) -> None:
    batches = epoch_of(order, epoch)
    bins = [bin for batch in batches for bin in batch]
    padding = len(bins) - order.schedule.num_bins
    assert 0 <= padding < order.schedule.global_batch_bins
    assert bins[len(bins) - padding :] == [None] * padding
    assert sorted(bins[: len(bins) - padding]) == list(range(order.schedule.num_bins))
    assert {len(batch) for batch in batches} == {order.schedule.global_batch_bins}


@pytest.mark.parametrize("one_shape", [False, True])
def test_every_bin_once_at_every_size(one_shape):
    """All sizes to 300 step by step, to 2,500 (with shapes: a seventh of them) by windows."""
    for num_bins in range(1, 301):
        check_epoch(balanced(num_bins, 8, window_batches=5, one_shape_per_batch=one_shape), epoch=num_bins % 3)
    for num_bins in range(301, 2501, 7 if one_shape else 1):
        order = balanced(num_bins, 8, one_shape_per_batch=one_shape)
        schedule, steps = order.schedule, range(order.schedule.steps_per_epoch)
        windows = dict.fromkeys(schedule.order.window(step, schedule.window_batches) for step in steps)
        bins = [order._arranged(window) for window in windows]
        np.testing.assert_array_equal(np.sort(np.concatenate(bins)), np.arange(num_bins))


@pytest.mark.parametrize("num_bins", [2999, 4096, 4097])
def test_every_bin_once_in_batches_of_any_size(num_bins):
    for size in (1, 7, 64, 5000):
        check_epoch(balanced(num_bins, size, one_shape_per_batch=num_bins % 2 == 0), epoch=1)


@settings(max_examples=100, deadline=None)
@given(
    num_bins=st.integers(1, 400),
    groups=st.integers(1, 5),
    group_bins=st.integers(1, 8),
    window_batches=st.integers(1, 12),
    tolerance=st.sampled_from([0.0, 0.05, 10.0]),
    one_shape=st.booleans(),
    shuffle_block=st.integers(1, 40),
    epoch=st.integers(0, 3),
)
def test_every_bin_once_with_any_settings(
    num_bins, groups, group_bins, window_batches, tolerance, one_shape, shuffle_block, epoch
):
    plain = Schedule(num_bins, groups * group_bins, 5, "3f2a", shuffle_block=shuffle_block, shuffle_window=3)
    balance = BalanceSettings(
        window_batches=window_batches, tolerance=tolerance, group_bins=group_bins, one_shape_per_batch=one_shape,
        whole_row_attention=True, across_batches=True,
    )  # fmt: skip
    check_epoch(BalancedSchedule(plain, balance).bound_to(loads_of), epoch)


# --- a fair sample ------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    num_bins=st.integers(1, 400),
    global_batch_bins=st.integers(1, 40),
    shuffle=st.booleans(),
    shuffle_block=st.integers(1, 40),
    epoch=st.integers(0, 3),
)
def test_a_batch_holds_the_bins_of_the_shuffled_order(num_bins, global_batch_bins, shuffle, shuffle_block, epoch):
    """Cost decides who runs a bin and when, never in which batch it is; the heaviest comes first."""
    order = fair(num_bins, global_batch_bins, 5, shuffle=shuffle, shuffle_block=shuffle_block, shuffle_window=3)
    check_epoch(order, epoch)
    plain = order.schedule.order
    for step in range(epoch * plain.steps_per_epoch, (epoch + 1) * plain.steps_per_epoch):
        bins = [bin for bin in order.bins(step) if bin is not None]
        assert sorted(bins) == sorted(bin for bin in plain.bins(step) if bin is not None)
        costs = costs_of(np.asarray(bins)).tolist()
        assert costs == sorted(costs, reverse=True)


def test_batches_differ_as_chance_has_it():
    """Total cost of batches of 8: the spread of sums of 8 bins drawn by chance; sorted across batches, 8 times it."""
    cost = costs_of(np.arange(20_000)).std()
    drawn, sorted_ = (costs_of(full_batches(make(20_000, 8))).sum(axis=1).std() for make in (fair, balanced))
    assert 0.93 < drawn / (cost * 8**0.5) < 1.07
    assert sorted_ > 2.5 * drawn


def test_ranks_of_a_fair_batch_carry_equal_cost():
    """8 ranks of 8 bins each, also where they wait for each other after every micro-batch. Costs of one bin lie evenly
    from 0.3 to 1.7 of their mean."""
    order = fair(20_000, 64)
    dealt = [[order.rank_bins(step, rank, 8) for rank in range(8)] for step in range(20_000 // 64)]
    costs = costs_of(np.asarray(dealt)[..., 0]).swapaxes(1, 2)  # [steps, micro-batches, ranks]
    assert heaviest(costs.sum(axis=1)).mean() < 1.02
    waiting = costs.max(axis=2).sum(axis=1) / costs.mean(axis=2).sum(axis=1)
    assert waiting.mean() < 1.09


def test_one_batch_of_loads_is_read_for_a_step():
    asked: list[int] = []

    def counted(bins: np.ndarray) -> Loads:
        asked.append(len(bins))
        return loads_of(bins)

    schedule = fair(BILLION, 64).schedule
    assert len(schedule.bound_to(counted).bins(12_345_678)) == 64
    assert asked == [64]
    assert len(pickle.dumps(schedule)) < 2000


def test_the_fair_order_is_pinned():
    """Golden values, as below: which rank runs a bin is part of what a step did."""
    assert epoch_of(fair(10, 4)) == GOLDEN_FAIR
    assert [fair(BILLION, 4, 7).bins(step) for step in (0, 249_999_999, 10**12)] == GOLDEN_FAIR_LARGE


# --- a pure function ----------------------------------------------------------------------------------------


def test_order_is_pinned():
    """Golden values. If this fails, every checkpoint's cursor means something else: do not edit, add a new order."""
    assert epoch_of(balanced(10, 4)) == GOLDEN
    assert epoch_of(balanced(22, 4, seed=7, window_batches=2, group_bins=2, tolerance=0.5), epoch=3) == GOLDEN_GROUPS
    assert epoch_of(balanced(22, 4, seed=7, one_shape_per_batch=True)) == GOLDEN_SHAPES
    large = balanced(BILLION, 4, seed=7)
    assert [large.bins(step) for step in (0, 249_999_999, 10**12)] == GOLDEN_LARGE


def test_any_step_in_any_order_from_any_process():
    first = balanced(5000, 16)
    travelled = pickle.loads(pickle.dumps(first.schedule)).bound_to(loads_of)
    steps = np.random.default_rng(0).permutation(3 * first.schedule.steps_per_epoch)[:200].tolist()
    one_after_the_other = {step: first.bins(step) for step in range(3 * first.schedule.steps_per_epoch)}
    assert [travelled.bins(step) for step in steps] == [one_after_the_other[step] for step in steps]


def test_seeds_epochs_data_sets_and_settings_have_their_own_order():
    orders = [
        full_batches(balanced(2000, 8, seed, **change), epoch).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
        for change in ({}, {"window_batches": 32}, {"tolerance": 0.1}, {"group_bins": 4}, {"one_shape_per_batch": True})
    ]
    other = BalancedSchedule(Schedule(2000, 8, 0, "77b0"), BalanceSettings(**SORTED)).bound_to(loads_of)
    orders.append(full_batches(other).tolist())
    assert len({str(order) for order in orders}) == len(orders)


def test_a_schedule_is_small_when_pickled():
    assert len(pickle.dumps(balanced(BILLION, 4096).schedule)) < 2000


# --- equal work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bins_per_rank", "group_bins"), [(1, None), (4, None), (4, 8)])
def test_ranks_carry_equal_cost(bins_per_rank, group_bins):
    """8 ranks, also where they wait for each other after every micro-batch."""
    size = 8 * bins_per_rank
    order, plain = balanced(20_000, size, group_bins=group_bins), Schedule(20_000, size, 0, "3f2a")

    def rank_costs(schedule):
        steps = range(schedule.steps_per_epoch if isinstance(schedule, Schedule) else 20_000 // size)
        dealt = [[schedule.rank_bins(step, rank, 8) for rank in range(8)] for step in steps]
        return costs_of(np.asarray(dealt)[..., 0]).swapaxes(1, 2)  # [steps, micro-batches, ranks]

    before, after = rank_costs(plain), rank_costs(order)
    assert heaviest(before).mean() > 1.4
    assert heaviest(after).mean() < 1.03
    assert heaviest(after.sum(axis=1)).mean() < (1.03 if bins_per_rank == 1 else 1.01)
    assert np.quantile(heaviest(after), 0.99) < 1.05


def test_pages_of_any_size_by_cost_and_by_tokens_alone():
    """Bins all full of tokens, with vision that differs: their length says nothing."""
    rng = np.random.default_rng(3)
    tokens, visual = rng.integers(15_500, 16_384, 4000), rng.integers(0, 8192, 4000)
    loads = Loads(tokens, visual, tokens - visual, tokens**2 // 4, visual**2 // 4, SHAPES[visual % 5])
    true = BalanceSettings(across_batches=True).for_attention("flash_attention_2")

    def worst_of(balance: BalanceSettings) -> float:
        order = BalancedSchedule(Schedule(4000, 8, 0, "3f2a"), balance).bound_to(loads.take)
        return float(heaviest(true.costs(loads)[full_batches(order)]).mean())

    assert worst_of(BalanceSettings(**SORTED)) > 1.25
    assert worst_of(true) < 1.05


@given(tolerance=st.sampled_from([0.0, 0.02, 0.3]), num_bins=st.integers(50, 600), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_costs_of_two_batches_overlap_by_the_tolerance_at_most(tolerance, num_bins, seed):
    """One window: of two batches, all of one are cheaper than all of the other, give or take."""
    batches = full_batches(balanced(num_bins, 8, seed, tolerance=tolerance, window_batches=1000))
    costs = costs_of(batches)
    low, high = costs.min(axis=1), costs.max(axis=1)
    below = high[:, None] <= low[None, :] * (1 + tolerance)
    assert (below | below.T | np.eye(len(batches), dtype=bool)).all()


def test_tolerance_lets_chance_decide():
    """A small data set is one window. Strictly sorted, its batches would be the same in every epoch."""

    def pairs_kept(tolerance: float) -> float:
        epochs = [full_batches(balanced(640, 8, tolerance=tolerance), epoch) for epoch in (0, 1)]
        first, second = ({(a, b) for batch in epoch for a in batch for b in batch if a < b} for epoch in epochs)
        return len(first & second) / len(first)

    assert pairs_kept(0.0) > 0.95  # equal costs may change places
    assert pairs_kept(0.05) < 0.5


def test_a_wider_window_brings_costs_closer():
    spread = [
        heaviest(costs_of(full_batches(balanced(8192, 8, tolerance=0, window_batches=batches)))).mean() - 1
        for batches in (1, 8, 64)
    ]
    assert spread[0] > 4 * spread[1] > 16 * spread[2]


def test_groups_mix_costs_in_each_batch():
    """Groups of 8 like bins: batches of 64 differ much less in total, and ranks are as equal."""
    whole, groups = (costs_of(full_batches(balanced(20_000, 64, group_bins=bins))).sum(axis=1) for bins in (None, 8))
    assert groups.std() < 0.5 * whole.std()


# --- chance -------------------------------------------------------------------------------------------------


def test_position_says_nothing_about_cost():
    order = balanced(16_384, 8)
    bins = full_batches(order).ravel()
    ranks = np.argsort(np.argsort(costs_of(bins)))
    assert abs(np.corrcoef(np.arange(len(bins)), ranks)[0, 1]) < 0.04
    batch_costs = costs_of(full_batches(order)).mean(axis=1)
    assert abs(np.corrcoef(batch_costs[1:], batch_costs[:-1])[0, 1]) < 0.1  # nor does one batch about the next


def test_the_padded_batch_is_of_any_cost():
    """Its bins are neighbours in cost, drawn from the whole range: not always what sorting leaves over."""
    means = []
    for seed in range(60):
        last = epoch_of(balanced(403, 8, seed))[-1]
        costs = costs_of(np.asarray([bin for bin in last if bin is not None]))
        assert len(costs) == 3
        assert costs.max() < 1.15 * costs.min()
        means.append(costs.mean())
    assert min(means) < 3500
    assert max(means) > 8500


# --- shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_bins", [None, 4])
def test_one_shape_per_batch_but_for_leftovers(group_bins):
    order = balanced(4096, 8, one_shape_per_batch=True, window_batches=64, group_bins=group_bins)
    batches = epoch_of(order)
    for start in range(0, 512, 64):
        window = np.asarray(batches[start : start + 64])
        shapes = loads_of(window).bucket
        alone = [len(set(row)) == 1 for row in shapes]
        for shape, count in Counter(shapes.ravel().tolist()).items():
            assert sum(one and row[0] == shape for row, one in zip(shapes, alone)) >= count // 8
        assert alone.count(False) < len(SHAPES)
        for row in shapes:
            assert row.tolist() == sorted(row)  # leftovers of one shape stand together
    assert heaviest(costs_of(np.asarray(batches))).mean() < (1.08 if group_bins is None else 2)
    mixed = [len(set(row)) > 1 for row in loads_of(np.asarray(epoch_of(balanced(4096, 8)))).bucket]
    assert np.mean(mixed) > 0.9


def test_leftovers_come_at_any_time():
    order = balanced(4096, 8, one_shape_per_batch=True)
    mixed = [len(set(row)) > 1 for row in loads_of(np.asarray(epoch_of(order))).bucket]
    places = np.flatnonzero(mixed) % 64
    assert places.min() < 16
    assert places.max() > 48
    assert len(set(places.tolist())) > 8


# --- dealing to ranks ---------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    num_bins=st.integers(1, 60),
    global_batch_bins=st.integers(1, 24),
    world_size=st.integers(1, 12),
    micro_batch_bins=st.integers(1, 6),
    step=st.integers(0, 100),
)
def test_ranks_together_hold_exactly_the_global_batch(num_bins, global_batch_bins, world_size, micro_batch_bins, step):
    order = balanced(num_bins, global_batch_bins)
    ranks = [order.rank_bins(step, rank, world_size, micro_batch_bins) for rank in range(world_size)]
    accumulation = order.schedule.micro_batches_per_rank(world_size, micro_batch_bins)
    per_round = world_size * micro_batch_bins
    bins = order.bins(step)
    for number, together in enumerate(zip(*ranks, strict=True)):
        assert {len(micro_batch) for micro_batch in together} == {micro_batch_bins}
        expected = bins[number * per_round : (number + 1) * per_round]
        expected += [None] * (per_round - len(expected))
        held = [bin for micro_batch in together for bin in micro_batch]
        assert Counter(held) == Counter(expected)
    assert {len(micro_batches) for micro_batches in ranks} == {accumulation}


def test_dealing_as_documented():
    order = balanced(100, 10)
    bins = order.bins(4)
    costs = costs_of(np.asarray(bins))
    assert costs.tolist() == sorted(costs, reverse=True)
    assert order.rank_bins(4, 0, 3) == [[bins[0]], [bins[5]], [bins[6]], [None]]
    assert order.rank_bins(4, 2, 3) == [[bins[2]], [bins[3]], [bins[8]], [bins[9]]]
    assert order.rank_bins(4, 0, 2, micro_batch_bins=2) == [[bins[0], bins[3]], [bins[4], bins[7]], [bins[8], None]]
    assert order.rank_bins(4, 1, 2, micro_batch_bins=2) == [[bins[1], bins[2]], [bins[5], bins[6]], [bins[9], None]]


def test_a_billion_bins_on_4096_ranks_and_a_resume_at_1000():
    """Random seeks; each looks at the loads of one window, whatever the place."""
    asked: list[int] = []

    def counted(bins: np.ndarray) -> Loads:
        asked.append(len(bins))
        return loads_of(bins)

    order = balanced(BILLION, 4096, loads=counted, window_batches=8)
    plain = Schedule(BILLION, 4096, 0, "3f2a")
    for step in (123_456, 0, plain.steps_per_epoch - 1, 7 * plain.steps_per_epoch + 5):
        bins = order.bins(step)
        for world_size in (4096, 1000):
            ranks = (order.rank_bins(step, rank, world_size) for rank in range(world_size))
            dealt = [bin for micro_batches in ranks for micro_batch in micro_batches for bin in micro_batch]
            assert Counter(bin for bin in dealt if bin is not None) == Counter(bin for bin in bins if bin is not None)
        if None not in bins:
            assert heaviest(costs_of(np.asarray(bins))) < 1.5
    assert len(asked) == 4
    assert max(asked) < 2 * 8 * 4096


def test_windows_of_a_billion_bins_hold_the_bins_of_the_plain_order():
    order = balanced(BILLION, 16, window_batches=32)
    plain = Schedule(BILLION, 16, 0, "3f2a")
    windows = plain.steps_per_epoch // 32
    for window in np.random.default_rng(0).integers(0, windows, 5).tolist():
        first, stop = (each * plain.steps_per_epoch // windows for each in (window, window + 1))
        ours = [bin for step in range(first, stop) for bin in order.bins(step)]
        theirs = plain.bins_in(0, first * 16, stop * 16).tolist()
        assert 32 <= stop - first < 64
        assert ours != theirs
        assert sorted(ours) == sorted(theirs)


def test_the_same_files_are_read():
    """Distinct blocks of 1,024 bins in 500 steps of 64, plain and balanced."""
    plain = Schedule(10**6, 64, 0, "3f2a")
    order = BalancedSchedule(plain, BalanceSettings(**SORTED)).bound_to(loads_of)
    counts = [
        len({bin // 1024 for step in range(2000, 2500) for bin in each.bins(step) if bin is not None})
        for each in (plain, order)
    ]
    assert counts[1] <= 1.1 * counts[0]
    assert counts[1] < 150


# --- in a plan ----------------------------------------------------------------------------------------------


def test_a_plan_travels_without_what_it_opened(processors, processor_folders, tmp_path):
    """The driver, every actor and every rank open the dataset themselves and find the same batches."""
    rows = [{"id": str(number), "text": "word " * (1 + number % 37)} for number in range(200)]
    write_rows(tmp_path / "rows.jsonl", rows)
    dataset = {"files": (str(tmp_path / "rows.jsonl"),), "kind": "pretrain"}
    preparation = Preparation(processors["qwen2_vl"], dataset)
    prepared = preparation.write(tmp_path / "prepared")
    schedule = BalancedSchedule(
        Schedule(len(prepared), 4, 1, prepared.fingerprint), BalanceSettings().for_attention("sdpa")
    )
    plan = BatchPlan(
        prepared=prepared.path, processor=str(processor_folders["qwen2_vl"]), model_type=None, trust_remote_code=False,
        loss=preparation.loss, schedule=schedule, world_size=2, micro_batch_bins=1,
    )  # fmt: skip
    size = len(pickle.dumps(plan))
    places = [Place(step, rank, micro) for step in range(3) for rank in range(2) for micro in range(plan.micro_batches)]
    bins = [plan.bins(place) for place in places]
    assert len(pickle.dumps(plan)) == size < 5000
    actors = pickle.loads(pickle.dumps(plan))
    assert [actors.bins(place) for place in places] == bins
    expected = schedule.bound_to(prepared.loads)
    assert [bin for each in bins[: 2 * plan.micro_batches] for bin in each if bin is not None] != []
    assert {bin for each in bins[: 2 * plan.micro_batches] for bin in each} == set(expected.bins(0))
    rendered = BatchMaker(actors).render(places[0])
    assert rendered.bins.tolist() == [bin for bin in bins[0] if bin is not None]


# --- errors -------------------------------------------------------------------------------------------------


def test_settings_that_do_not_fit_are_quoted():
    with pytest.raises(ValueError, match=r"balance\.group_bins \(3\) must divide global_batch_bins \(8\)"):
        balanced(100, 8, group_bins=3)
    with pytest.raises(ValueError, match="whole_row_attention is not decided"):
        BalancedSchedule(Schedule(9, 2, 0, "3f2a"), BalanceSettings())
    with pytest.raises(ValueError, match=r"rank must be from 0 to 3 \(world_size - 1\), got 4"):
        balanced(9, 2).rank_bins(0, rank=4, world_size=4)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        balanced(9, 2).bins(-1)


GOLDEN = [[6, 8, 1, 5], [2, 0, 4, 9], [7, 3, None, None]]
GOLDEN_GROUPS = [[18, 1, 7, 15], [6, 8, 3, 2], [5, 17, 9, 12], [13, 11, 10, 16], [21, 14, 20, 19], [0, 4, None, None]]
GOLDEN_SHAPES = [[8, 19, 15, 0], [10, 18, 14, 7], [21, 20, 2, 9], [6, 13, 1, 5], [16, 3, 17, 4], [11, 12, None, None]]
GOLDEN_LARGE = [
    [152441751, 466958269, 996935933, 146724366],
    [891687922, 976452134, 798616623, 783102773],
    [76584651, 637389130, 975390011, 384025647],
]
GOLDEN_FAIR = [[8, 5, 7, 2], [1, 3, 0, 9], [6, 4, None, None]]
GOLDEN_FAIR_LARGE = [
    [843094617, 150230145, 943666259, 765861707],
    [980176088, 164315384, 158744327, 731661092],
    [173535235, 230328403, 578670638, 623688892],
]
