"""A mixture holds every bin of every dataset once in each of the dataset's epochs, at the shares that are asked for,
whatever the number of ranks and wherever the run is interrupted or its mixture changed.

The oracle walks through all slots one by one and counts.
"""

import itertools
import pickle
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.schedule.balance import BalanceSettings
from mmray.schedule.balanced import BalancedSchedule
from mmray.schedule.cursor import Cursor
from mmray.schedule.loads import Loads
from mmray.schedule.mixture import MixedDataset, MixedSchedule, Mixture, WeightStage, mixture_differences, shares_at
from mmray.schedule.order import Taken
from mmray.schedule.schedule import Schedule, mix_many

FAIR = BalanceSettings(whole_row_attention=True)
SORTED = BalanceSettings(whole_row_attention=True, across_batches=True, window_batches=4)


def dataset(number: int, num_bins: int, weight: float) -> MixedDataset:
    return MixedDataset(f"/data/{number}/train", f"set{number}", f"f{number}", num_bins, weight)


def mixture_of(*datasets: tuple[int, float], stages: tuple[WeightStage, ...] = ()) -> Mixture:
    parts = tuple(dataset(number, bins, weight) for number, (bins, weight) in enumerate(datasets))
    return Mixture(parts, stages)


def loads_of(bins: np.ndarray) -> Loads:
    """The loads of any bins, from a hash of theirs."""
    draws = (mix_many(bins.astype(np.uint64) + np.uint64(9)) % np.uint64(4000)).astype(np.int64)
    return Loads(draws + 100, draws // 2, draws // 3, draws**2, draws**2 // 9, np.asarray(["a"] * len(bins)))


def bins_of(taken: dict[str, Taken]) -> dict[str, int]:
    return {name: place.bins for name, place in taken.items()}


positive = st.sampled_from([0.01, 0.1, 0.2, 0.7, 1.0, 3.0, 1 / 3])


@st.composite
def mixtures(draw: st.DrawFn, numbers: tuple[int, ...] = (0, 1, 2, 3)) -> Mixture:
    """Some of the datasets 0 to 3, whose sizes are fixed, with weights and up to two stages."""
    chosen = draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=4, unique=True))
    weights = st.lists(st.one_of(st.just(0.0), positive), min_size=len(chosen), max_size=len(chosen)).filter(any)
    ends = sorted(draw(st.sets(st.integers(1, 60), max_size=2)))
    stages = tuple(WeightStage(end, tuple(draw(weights))) for end in ends)
    parts = tuple(dataset(n, (37, 11, 5, 90)[n], weight) for n, weight in zip(chosen, draw(weights)))
    return Mixture(parts, stages)


@settings(max_examples=150)
@given(
    parts=st.lists(st.tuples(mixtures(), st.integers(1, 40)), min_size=1, max_size=4),
    batch=st.sampled_from([1, 3, 4, 8]),
    interruptions=st.sets(st.integers(0, 150), max_size=5),
    workers=st.lists(st.integers(1, 5), min_size=6, max_size=6),
    balance=st.sampled_from([None, FAIR]),
)
def test_each_epoch_of_each_dataset_holds_each_bin_once(
    parts: list[tuple[Mixture, int]],
    batch: int,
    interruptions: set[int],
    workers: list[int],
    balance: BalanceSettings | None,
) -> None:
    """Over mixtures that follow one another, each for some steps, with a cursor that is written and read at the
    interruptions, after each of which the number of workers is another."""
    cursor: Cursor | None = None
    streams: dict[str, list[int]] = defaultdict(list)
    world_sizes = iter(workers * 40)
    world_size = next(world_sizes)
    for mixture, steps in parts:
        fresh = cursor is None or cursor.mixture is None or cursor.mixture.fingerprint != mixture.fingerprint
        if cursor is None:
            schedule = MixedSchedule(mixture, batch, seed=5)
            cursor = Cursor.at(schedule)
        elif fresh:
            before = cursor.taken_now()
            assert all(before[name].bins == len(stream) for name, stream in streams.items())
            taken = tuple(before.get(part.fingerprint, Taken()) for part in mixture.datasets)
            schedule = MixedSchedule(mixture, batch, 5, cursor.step, taken)
            cursor = cursor.continue_on(schedule, "/elsewhere")
        for _ in range(steps):
            if cursor.step in interruptions:
                cursor = Cursor.from_json(cursor.to_json())
                order = cursor.order_of(cursor.spans[-1])
                assert isinstance(order, MixedSchedule)
                assert order == schedule
                schedule, world_size = order, next(world_sizes)
            bound = schedule if balance is None else BalancedSchedule(schedule, balance).bound_to(loads_of)
            step = cursor.step - cursor.first_step
            ranks = [bound.rank_bins(step, rank, world_size) for rank in range(world_size)]
            dealt = Counter(bin for rank in ranks for micro in rank for bin in micro if bin is not None)
            bins = schedule.bins(step)
            assert dealt == Counter(bins), "ranks hold the batch"
            assert None not in bins
            assert len(bins) == batch
            for number in bins:
                part = max(n for n, first in enumerate(schedule._first_bins[:-1]) if number >= first)
                streams[mixture.datasets[part].fingerprint].append(number - schedule._first_bins[part])
            cursor = cursor.advance()
    for fingerprint, stream in streams.items():
        num_bins = (37, 11, 5, 90)[int(fingerprint[1:])]
        alone = Schedule(num_bins, batch, 5, fingerprint)
        assert stream == [alone.bin_at(*divmod(n, num_bins)) for n in range(len(stream))]
        for start in range(0, len(stream) - num_bins + 1, num_bins):
            assert sorted(stream[start : start + num_bins]) == list(range(num_bins))


@settings(max_examples=100)
@given(mixture=mixtures(), batch=st.sampled_from([1, 4, 8]), window=st.sampled_from([2, 8, 64]))
def test_counts_are_within_one_bin_of_the_weights_at_the_end_of_every_window(
    mixture: Mixture, batch: int, window: int
) -> None:
    """Of each stage; in a stage of a rare dataset windows are as long as it takes to hold one of its bins."""
    schedule = MixedSchedule(mixture, batch, 0, window_batches=window)
    start, before = 0, schedule.taken
    for steps, shares in mixture.shares_from(0):
        slots = window * batch * -(-1 // (min(share for share in shares if share) * window * batch))
        total = 2 * slots if steps is None else steps * batch
        ends = [*range(slots, total - slots + 1, slots), total]
        for end in [end for end in ends if end % batch == 0]:
            taken = schedule.taken_at(start + end // batch)
            counts = [taken[part.fingerprint].bins - place.bins for part, place in zip(mixture.datasets, before)]
            assert all(abs(Fraction(count) - share * end) < 1 for count, share in zip(counts, shares))
        if steps is not None:
            start += steps
            before = tuple(schedule.taken_at(start).values())


@settings(max_examples=60)
@given(mixture=mixtures(), batch=st.sampled_from([1, 4]), number=st.integers(0, 500))
def test_where_a_bin_is_and_what_is_there_are_inverse(mixture: Mixture, batch: int, number: int) -> None:
    schedule = MixedSchedule(mixture, batch, 0, taken=tuple(map(Taken, range(len(mixture.datasets)))))
    for index, part in enumerate(mixture.datasets):
        if not part.weight:
            continue
        step, slot = schedule.place_of(index, index + number)
        expected = Schedule(part.num_bins, batch, 0, part.fingerprint).bin_at(*divmod(index + number, part.num_bins))
        assert schedule.bins(step)[slot] == schedule._first_bins[index] + expected
    with pytest.raises(IndexError, match="bin number -1 of dataset 0 is not in this order"):
        schedule.place_of(0, -1)


def test_sorting_across_batches_rearranges_windows_of_the_mixture() -> None:
    """The bins of a window are those of the plain mixture, also of a stage's last one; no window reaches into the next
    stage."""
    mixture = mixture_of((50, 0.7), (20, 0.3), stages=(WeightStage(10, (1, 1)),))
    plain = MixedSchedule(mixture, 8, 0, window_batches=4)
    bound = BalancedSchedule(plain, SORTED).bound_to(loads_of)
    borders = [0, 4, 10, 14, 18, 22]
    assert [plain.window(step, 4).first for step in range(22)] == [
        max(b for b in borders if b <= step) for step in range(22)
    ]
    for first, stop in itertools.pairwise(borders):
        window = [bin for step in range(first, stop) for bin in bound.bins(step)]
        assert Counter(window) == Counter(bin for step in range(first, stop) for bin in plain.bins(step))
        assert any(Counter(bound.bins(step)) != Counter(plain.bins(step)) for step in range(first, stop))
    sorted_cursor = Cursor.at(bound.schedule, 6)
    assert sorted_cursor.taken_now() == plain.taken_at(10), "in the middle of a window all of it counts as taken"
    assert Cursor.from_json(sorted_cursor.to_json()).order_of(sorted_cursor.spans[-1]) == plain


def test_bins_that_a_change_of_sorted_batches_skips_are_counted() -> None:
    """Of a window of four batches the change lets one pass: the bins of the other three, by what the run received."""
    mixture = mixture_of((500, 0.7), (200, 0.3))
    plain = MixedSchedule(mixture, 8, 0, window_batches=4)
    bound = BalancedSchedule(plain, SORTED).bound_to(loads_of)
    cursor = Cursor.at(bound.schedule, 9)
    taken = tuple(cursor.taken_now().values())
    window = {bin for step in range(8, 12) for bin in plain.bins(step)}
    for step, skipped in ((9, len(window - set(bound.bins(8)))), (12, 0)):
        other = BalancedSchedule(MixedSchedule(mixture_of((500, 1), (200, 1)), 8, 0, step, taken, 4), SORTED)
        moved = Cursor.at(bound.schedule, step).continue_on(other, "x")
        assert Cursor.from_json(moved.to_json()).skipped_bins() == skipped
    assert Cursor.at(plain, 9).continue_on(MixedSchedule(mixture, 8, 0, 9, taken), "x").skipped_bins() == 0
    assert cursor.skipped_bins() == 0


def test_one_dataset_goes_on_in_a_mixture_and_back() -> None:
    """A run on one dataset alone is continued on a mixture with it, which begins where the dataset stands; a padded
    last batch counts as what it holds. A dataset that left is taken up again where it was."""
    alone = Schedule(10, 4, 0, "f0")
    cursor = Cursor.at(alone, 4)  # an epoch of 3 steps, and one more
    assert bins_of(cursor.taken_now()) == {"f0": 14}
    mixture = mixture_of((10, 1), (6, 1))
    schedule = MixedSchedule(mixture, 4, 0, 4, (cursor.taken_now()["f0"], Taken()))
    cursor = cursor.continue_on(schedule, "x").advance(3)
    assert bins_of(cursor.taken_now()) == {"f0": 14 + 6, "f1": 6}
    only = Mixture((dataset(1, 6, 1),))
    cursor = cursor.continue_on(MixedSchedule(only, 4, 0, 7, (cursor.taken_now()["f1"],)), "y").advance(2)
    assert bins_of(cursor.taken_now()) == {"f0": 20, "f1": 14}
    assert [span.first_step for span in cursor.spans] == [0, 4, 7]
    assert Cursor.from_json(cursor.to_json()) == cursor


def test_a_cursor_tells_how_far_each_dataset_is() -> None:
    saved = Cursor.at(MixedSchedule(mixture_of((10, 3), (6, 1)), 4, 0), 11).to_json()
    assert '"format": 3' in saved
    assert '"progress": {\n  "set0": {\n   "epochs": 3,\n   "bins": 3,\n   "of": 10\n  }' in saved
    assert '"format": 2' in Cursor.at(Schedule(10, 4, 0, "f0"), 11).to_json()
    assert "mixture" not in Cursor.at(Schedule(10, 4, 0, "f0"), 11).to_json()


def test_what_tells_mixtures_apart() -> None:
    """Shares and datasets do, names and paths and the unit of weights do not."""
    mixture = mixture_of((10, 0.7), (6, 0.3))
    for same in (
        mixture_of((10, 7), (6, 3)),
        replace(mixture, datasets=tuple(replace(part, prepared="/moved", name="x") for part in mixture.datasets)),
    ):
        assert same.fingerprint == mixture.fingerprint
    others = [
        mixture_of((10, 0.6), (6, 0.3)),
        mixture_of((10, 0.7), (7, 0.3)),
        mixture_of((10, 0.7)),
        replace(mixture, datasets=mixture.datasets[::-1]),
        replace(mixture, stages=(WeightStage(5, (1, 1)),)),
    ]
    assert len({mixture.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_differences_are_told_in_words() -> None:
    old = mixture_of((10, 0.7), (6, 0.3))
    new = Mixture((dataset(0, 10, 1), dataset(2, 5, 1)), (WeightStage(5, (1, 0)),))
    assert mixture_differences(old, new) == [
        "set0: share 70.0000% -> 50.0000%",
        "set1 (/data/1/train) leaves, its share was 30.0000%",
        "set2 (/data/2/train) joins with a share of 50.0000%",
        "stages: [] -> [[5, [1, 0]]]",
    ]
    assert mixture_differences(old, replace(old, datasets=old.datasets[::-1])) == [
        "the datasets stand in another order"
    ]


def test_shares_of_steps_follow_the_stages() -> None:
    mixture = mixture_of((10, 1), (6, 3), stages=(WeightStage(4, (1, 0)), WeightStage(6, (1, 1))))
    asked = shares_at(mixture.record(), [1, 4, 5, 6, 7, 100])
    assert asked.tolist() == [[1, 0], [1, 0], [0.5, 0.5], [0.5, 0.5], [0.25, 0.75], [0.25, 0.75]]
    assert [steps for steps, _ in mixture.shares_from(5)] == [1, None]


def test_a_billion_bins_of_64_datasets() -> None:
    """Any step from any process, both ways; what is computed is one batch, wherever it is."""
    mixture = mixture_of(*((10**9 // 64 + number, 1 + number % 7) for number in range(64)))
    schedule = MixedSchedule(mixture, 64, 0)
    assert len(pickle.dumps(schedule)) < 10_000
    travelled = pickle.loads(pickle.dumps(schedule))
    for step in (0, 10**6, 10**7 + 3, 10**12):
        bins = travelled.bins(step)
        assert bins == schedule.bins(step)
        assert len(set(bins)) == 64
        parts = np.searchsorted(schedule._first_bins, bins, side="right") - 1
        assert np.bincount(parts, minlength=64).max() <= 4, "every dataset at its share also within a batch"
    taken = schedule.taken_at(10**7)
    assert sum(place.bins for place in taken.values()) == 64 * 10**7
    step, slot = schedule.place_of(17, 12_345_678)
    expected = Schedule(10**9 // 64 + 17, 64, 0, "f17", shuffle_window=2).bin_at(0, 12_345_678)
    assert schedule.bins(step)[slot] == schedule._first_bins[17] + expected


SIZES = (1500, 5000, 30_000, 70_000)


@settings(max_examples=20)
@given(parts=st.lists(st.tuples(mixtures(), st.integers(1, 1500)), min_size=1, max_size=4))
def test_datasets_of_many_files_are_mixed_bin_by_bin_once(parts: list[tuple[Mixture, int]]) -> None:
    """Over stages and mixtures that follow one another. Each file that is begun is finished before long: at any time
    no more are open than the 64 of one dataset, one for each dataset, and those of a window of earlier weights."""
    cursor: Cursor | None = None
    streams: dict[str, list[np.ndarray]] = defaultdict(list)
    for small, steps in parts:
        datasets = tuple(replace(part, num_bins=SIZES[int(part.fingerprint[1:])]) for part in small.datasets)
        mixture = replace(small, datasets=datasets)
        taken = {} if cursor is None else cursor.taken_now()
        places = tuple(taken.get(part.fingerprint, Taken()) for part in datasets)
        schedule = MixedSchedule(mixture, 64, 5, 0 if cursor is None else cursor.step, places)
        cursor = Cursor.at(schedule) if cursor is None else cursor.continue_on(schedule, "/elsewhere")
        starts = sorted({0, steps, *(stage.until - schedule.first_step for stage in mixture.stages)})
        for start, stop in itertools.pairwise(step for step in starts if 0 <= step <= steps):
            bins = schedule.bins_of(start, stop)
            for part, first in zip(datasets, schedule._first_bins):
                streams[part.fingerprint].append(bins[(bins >= first) & (bins < first + part.num_bins)] - first)
        cursor = Cursor.from_json(cursor.advance(steps).to_json())
    for fingerprint, pieces in streams.items():
        stream, size = np.concatenate(pieces), SIZES[int(fingerprint[1:])]
        for epoch in np.split(stream, range(size, len(stream), size)):
            assert len(np.unique(epoch)) == len(epoch)
        assert all(len(epoch) == size for epoch in np.split(stream, range(size, len(stream), size))[:-1])


def test_a_run_of_one_dataset_finishes_its_window_in_a_mixture() -> None:
    """The bins that the run would have taken next come next, until its window of 64 files ends; then the windows are
    those of the share, and every bin of the epoch is taken once. A share that is raised mixes more files again."""
    alone = Schedule(200_704, 64, 0, "f0")
    cursor = Cursor.at(alone, 500)
    mixture = mixture_of((200_704, 0.125), (100_000, 0.875), stages=(WeightStage(20_000, (1, 0)),))
    schedule = MixedSchedule(replace(mixture, stages=()), 64, 0, 500, (cursor.taken_now()["f0"], Taken()))
    stream = taken_of(schedule, 0, 0, 10_500)
    window = 64 * 1024 - 32_000
    assert stream[:window].tolist() == alone.bins_in(0, 32_000, 64 * 1024).tolist()
    assert files_of(stream[window : window + 8 * 1024]) == 8
    cursor = cursor.continue_on(schedule, "x").advance(10_500)
    raised = MixedSchedule(mixture, 64, 0, 11_000, (cursor.taken_now()["f0"], Taken()))
    assert files_of(taken_of(raised, 0, 200, 210)) > 50
    rest = taken_of(raised, 0, 0, 3000)[: 200_704 - 32_000 - len(stream)]
    assert sorted([*alone.bins_in(0, 0, 32_000), *stream, *rest]) == list(range(200_704))


def taken_of(schedule: MixedSchedule, part: int, start: int, stop: int) -> np.ndarray:
    """The bins of one dataset in some steps of one stage."""
    first, end = schedule._first_bins[part : part + 2]
    bins = schedule.bins_of(start, stop)
    return bins[(bins >= first) & (bins < end)] - first


def files_of(bins: np.ndarray) -> int:
    return len(np.unique(bins // 1024))


def test_a_mixture_reads_as_few_files_as_one_dataset() -> None:
    """In any 1,000 steps hardly more distinct files than one dataset of as many bins, on average."""
    files = (2, 10, 293, 672)
    schedule = MixedSchedule(mixture_of(*((1024 * count, count) for count in files)), 64, 0)
    alone = Schedule(1024 * sum(files), 64, 0, "f0")
    orders = [order.bins_of(0, 15_000) for order in (schedule, alone)]
    means = [np.mean([files_of(order[64 * step :][: 64 * 1000]) for step in range(0, 14_000, 250)]) for order in orders]
    assert means[0] < 1.1 * means[1], means


def test_shares_hold_in_any_thousand_steps() -> None:
    """Of a million bins, by counting: inside the 99.9 % band of a full shuffle, and no dataset is away for long."""
    shares = (0.002, 0.01, 0.3, 0.688)
    schedule = MixedSchedule(mixture_of(*((round(share * 10**6), share) for share in shares)), 64, 0)
    parts = np.searchsorted(schedule._first_bins, schedule.bins_of(0, 10**6 // 64), side="right") - 1
    shuffled = np.random.default_rng(0).permutation(parts)
    for part, share in enumerate(shares):
        counts = np.concatenate([[0], np.cumsum(parts == part)])
        count = 64_000 * share
        band = 3.29 * (count * (1 - share) * (1 - 0.064)) ** 0.5
        assert np.abs(counts[64_000:] - counts[:-64_000] - count).max() < min(band, 6)
        gaps = [np.diff(np.flatnonzero(order == part)).max() for order in (parts, shuffled)]
        assert gaps[0] <= gaps[1]


def test_order_is_pinned() -> None:
    """Golden values. If this fails, every mixture's cursor means something else: do not edit, add a new order."""
    mixture = mixture_of((37, 0.7), (11, 0.2), (5, 0.1), stages=(WeightStage(3, (1, 1, 0)),))
    schedule = MixedSchedule(mixture, 4, 7, window_batches=2)
    assert [schedule.bins(step) for step in (0, 1, 2, 3, 4, 10**9)] == GOLDEN
    assert mixture.fingerprint == GOLDEN_FINGERPRINT


def test_values_that_do_not_fit_are_quoted() -> None:
    mixture = mixture_of((10, 1), (6, 1))
    for change, message in (
        ({"global_batch_bins": 0}, "global_batch_bins must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"taken": (Taken(1),)}, "taken has 1 places, the mixture 2 datasets"),
        ({"first_step": -1}, "first_step must be at least 0, got -1"),
    ):
        values = {"mixture": mixture, "global_batch_bins": 4, "seed": 0} | change
        with pytest.raises(ValueError, match=message):
            MixedSchedule(**values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no mixture: "):
        Mixture.from_record({"datasets": [{"weight": 1}]})


GOLDEN = [[17, 42, 31, 45], [27, 37, 4, 41], [24, 40, 25, 47], [9, 38, 35, 7], [49, 19, 2, 16], [51, 6, 29, 0]]
GOLDEN_FINGERPRINT = "mixture-c2aaf31d05272c1d"
