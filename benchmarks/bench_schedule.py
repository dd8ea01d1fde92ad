"""The order of training: equal work for all ranks, chance, files read, and the time of a seek in 10^9 bins.

The balance settings are a job's defaults, where the bins of a batch are those of the shuffled order; sorting across
batches stands beside them. Ranks are taken to wait for each other after every micro-batch, as ZeRO 2 and 3 make them: a
step's ratio is the sum over its micro-batches of the heaviest rank's cost, over the sum of the means. The epoch's last
batch, which may be padded, is left out. With one bin a rank bins are packed to equal cost, in windows of 8,192 rows.
"""

import functools
from collections.abc import Callable

import numpy as np

from benchmarks.bench_packing import MIXTURES, Mixture, Sizes, ocr_any_size, ocr_tiles, packed, text_only
from benchmarks.common import Result, best_seconds
from mmray.packing.equal_cost import CostedSamples, pack_equal_cost, planned_bin_cost
from mmray.rows.dealing import dealt
from mmray.schedule.balance import BalanceSettings
from mmray.schedule.balanced import BalancedSchedule, BoundSchedule, ReadLoads
from mmray.schedule.loads import Loads
from mmray.schedule.mixture import MixedDataset, MixedSchedule
from mmray.schedule.mixture import Mixture as WeightedDatasets
from mmray.schedule.schedule import Schedule, mix_many

RANKS = 8
NUM_ROWS = 25_000
DEFAULTS = BalanceSettings().for_attention("sdpa")
PACKED_ATTENTION = BalanceSettings().for_attention("flash_attention_2")
SORTED = DEFAULTS.across(True)
ROOMY = {"token_capacity": 24576, "visual_capacity": 16384}
"""Capacities of bins packed to equal cost: half more than the longest row, and two thirds of it visual."""
WINDOW_ROWS = 8192
SMOLVLM = {"token_pair": 1.6e-4, "trained_token": 0.27, "visual_token": 13.0, "visual_pair": 0.044}
"""Costs of SmolVLM-256M, as in docs/training.md."""

Order = Schedule | MixedSchedule | BoundSchedule


def run() -> list[Result]:
    results = []
    for mixture in MIXTURES:
        results += [ranks_of(mixture, DEFAULTS, bins_per_rank) for bins_per_rank in (4, 8)]
        results += [to_cost(mixture, balance) for balance in (DEFAULTS, PACKED_ATTENTION)]
    results += [ranks_of(mixture, PACKED_ATTENTION, 8) for mixture in (ocr_tiles, text_only)]
    results += [composition(mixture) for mixture in (ocr_tiles, MIXTURES[-1])]
    results += [other_costs(ocr_tiles), other_costs(ocr_any_size), *chance(), mixed_costs(), *one_shape()]
    results += [*shares(), files_read(), seek(), seek_of_large_batches()]
    return results + [*mixture_shares(), mixture_files(), mixture_seek()]


@functools.cache
def loads_of(mixture: Mixture) -> Loads:
    """The packed bins of a mixture, the text of each row trained."""
    rows = rows_of(mixture)
    return of_bins(rows, packed(rows.tokens, rows.visual_tokens))


@functools.cache
def rows_of(mixture: Mixture) -> Loads:
    """The loads of each row, as if it had a bin of its own."""
    tokens, visual = (sizes.astype(np.int64) for sizes in sizes_of(mixture))
    tile = np.minimum(visual, 256) if mixture is ocr_tiles else visual
    shapes = np.asarray([f"{count % 5}" for count in visual // 256])
    trained = np.maximum(tokens - visual, 0)
    return Loads(tokens, visual, trained, tokens**2, visual * tile, bucket=shapes)


def sizes_of(mixture: Mixture) -> Sizes:
    return mixture(np.random.default_rng(0), NUM_ROWS)


def of_bins(rows: Loads, bins: list[list[int]]) -> Loads:
    """The loads of bins of these rows."""
    members = np.concatenate([np.asarray(each) for each in bins])
    starts = np.cumsum([0] + [len(each) for each in bins])[:-1]
    columns = [rows.tokens, rows.visual_tokens, rows.trained_tokens, rows.sample_pairs, rows.visual_pairs]
    counts = [np.add.reduceat(column[members], starts) for column in columns]
    return Loads(*counts, bucket=np.asarray([f"{count % 5}" for count in counts[1] // 256]))


@functools.cache
def loads_to_cost(mixture: Mixture, balance: BalanceSettings) -> Loads:
    """The bins of a mixture packed to equal cost."""
    rows, parts, bin_cost = rows_of(mixture), [], None
    for start in range(0, NUM_ROWS, WINDOW_ROWS):
        window = rows.take(np.arange(start, min(start + WINDOW_ROWS, NUM_ROWS)))
        samples = CostedSamples(window.tokens, window.visual_tokens, *balance.sample_costs(window), **ROOMY)
        bin_cost = planned_bin_cost(samples) if bin_cost is None else bin_cost
        parts.append(of_bins(window, pack_equal_cost(samples, bin_cost)))
    return Loads.joined(parts)


def plain_order(loads: Loads, bins_per_rank: int) -> Schedule:
    return Schedule(len(loads), RANKS * bins_per_rank, seed=0, fingerprint="benchmark")


def balanced_order(loads: Loads, bins_per_rank: int, balance: BalanceSettings = DEFAULTS) -> BoundSchedule:
    return BalancedSchedule(plain_order(loads, bins_per_rank), balance).bound_to(loads.take)


def step_costs(order: Order, cost: np.ndarray, size: int, world_size: int = RANKS) -> np.ndarray:
    """float64 [steps, micro-batches, ranks] of the first epoch's full batches, one bin a micro-batch."""
    steps = range(len(cost) // size)
    dealt = [[order.rank_bins(step, rank, world_size) for rank in range(world_size)] for step in steps]
    return cost[np.asarray(dealt)[..., 0]].swapaxes(1, 2)


def heaviest(costs: np.ndarray) -> np.ndarray:
    """Of each step: time with ranks that wait after every micro-batch, against equal ranks."""
    return costs.max(axis=2).sum(axis=1) / costs.mean(axis=2).sum(axis=1)


def ranks_of(mixture: Mixture, balance: BalanceSettings, bins_per_rank: int) -> Result:
    loads = loads_of(mixture)
    cost = balance.costs(loads)
    orders: list[Order] = [
        plain_order(loads, bins_per_rank),
        balanced_order(loads, bins_per_rank, balance.across(True)),
        balanced_order(loads, bins_per_rank, balance),
    ]
    steps = [heaviest(step_costs(order, cost, RANKS * bins_per_rank)) for order in orders]
    before, across, after = (float(each.mean()) for each in steps)
    return Result(
        name=f"heaviest rank against the mean, {mixture.__name__}, {attention(balance)}, {RANKS} ranks, "
        f"{bins_per_rank} bins a rank",
        ratio=after,
        explanation=f"plain order {before:.3f}; sorted across batches {across:.3f}; dealt by cost {after:.3f} (99 % of "
        f"steps below {np.quantile(steps[-1], 0.99):.3f}, the worst {steps[-1].max():.3f})",
        goal=1.05 if bins_per_rank == 8 else None,
        lower_is_better=True,
    )


def attention(balance: BalanceSettings) -> str:
    return "sdpa" if balance.whole_row_attention else "flash attention"


def to_cost(mixture: Mixture, balance: BalanceSettings) -> Result:
    """One bin a rank, bins packed to equal cost: the plain order is then equal enough."""
    before, after = loads_of(mixture), loads_to_cost(mixture, balance)
    costs = [step_costs(plain_order(loads, 1), balance.costs(loads), RANKS) for loads in (before, after)]
    fewest, equal = (heaviest(each) for each in costs)
    seconds = [float(each.max(axis=2).sum()) for each in costs]
    return Result(
        name=f"heaviest rank against the mean, {mixture.__name__}, {attention(balance)}, {RANKS} ranks, 1 bin a rank "
        "packed to equal cost",
        ratio=float(equal.mean()),
        explanation=f"packed to the fewest bins {fewest.mean():.3f}; {len(after):,} bins of at most "
        f"{ROOMY['token_capacity']:,} tokens, the longest {after.tokens.max():,}, against {len(before):,} of 16,384; "
        f"an epoch takes {seconds[1] / seconds[0]:.2f} of the time",
        goal=1.10,
        lower_is_better=True,
    )


def composition(mixture: Mixture) -> Result:
    """How far batches differ in their visual tokens, against what chance gives for as many bins."""
    loads, size = loads_of(mixture), RANKS
    whole = range(len(loads) // size)
    visual = loads.visual_tokens.astype(np.float64)
    drawn = float(visual.std() * size**0.5 * (1 - size / len(loads)) ** 0.5)
    spread = [
        float(np.std([visual[np.asarray(order.bins(step), dtype=np.int64)].sum() for step in whole])) / drawn
        for order in (balanced_order(loads, 1), balanced_order(loads, 1, SORTED))
    ]
    return Result(
        name=f"spread of a batch's visual tokens against that of a full shuffle, {mixture.__name__}, {size} bins",
        ratio=spread[0],
        explanation=f"{spread[1]:.2f} sorted across batches, where {size**0.5:.2f} is that of one bin",
        goal=1 + 4 / (2 * len(whole)) ** 0.5,
        lower_is_better=True,
    )


def other_costs(mixture: Mixture) -> Result:
    """What wrong costs cost: bins packed to equal cost for one model and attention, run on another."""
    loads = [loads_of(mixture), loads_to_cost(mixture, DEFAULTS)]
    truths = {
        "with flash attention": PACKED_ATTENTION,
        "on SmolVLM-256M": DEFAULTS.model_copy(update=SMOLVLM),
    }
    found = {}
    for name, truth in truths.items():
        steps = [heaviest(step_costs(plain_order(each, 1), truth.costs(each), RANKS)) for each in loads]
        found[name] = [float(each.mean()) for each in steps]
    shown = "; ".join(f"{name} {after:.3f}, fewest bins {before:.3f}" for name, (before, after) in found.items())
    return Result(
        name=f"heaviest rank against the mean where the costs set are another model's, {mixture.__name__}, 1 bin a "
        "rank packed to equal cost",
        ratio=max(after for _, after in found.values()),
        explanation=f"costs set: Qwen2-VL-2B, sdpa; run: {shown}",
        lower_is_better=True,
    )


def chance() -> list[Result]:
    """Rank correlation of a bin's place in the epoch with its cost, and with its place in the next epoch."""
    loads = loads_of(ocr_tiles)
    cost = DEFAULTS.costs(loads)
    balanced = balanced_order(loads, 1)
    epoch_steps = balanced.schedule.steps_per_epoch
    epochs = [
        np.asarray([bin for step in range(epoch_steps) for bin in balanced.bins(first + step) if bin is not None])
        for first in (0, epoch_steps)
    ]
    places = [np.argsort(epoch) for epoch in epochs]
    pairs = {"cost": (places[0], cost), "the place in the next epoch": (places[0], places[1])}
    return [
        Result(
            name=f"rank correlation of a bin's place with {name}, balanced",
            ratio=abs(rank_correlation(*pair)),
            explanation=f"Spearman's, absolute; ocr_tiles, {len(cost):,} bins; chance gives {len(cost) ** -0.5:.3f}",
            goal=5 * len(cost) ** -0.5,
            lower_is_better=True,
        )
        for name, pair in pairs.items()
    ]


def rank_correlation(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.corrcoef(*(np.argsort(np.argsort(values)) for values in (left, right)))[0, 1])


def mixed_costs() -> Result:
    """group_bins: how far apart the total costs of global batches are, with ranks equal all the same."""
    loads = loads_of(ocr_tiles)
    cost, size = DEFAULTS.costs(loads), RANKS * 8
    settings = SORTED, SORTED.model_copy(update={"group_bins": RANKS})
    whole, groups = (step_costs(balanced_order(loads, 8, each), cost, size) for each in settings)
    spread = [float(costs.sum(axis=(1, 2)).std() / costs.sum(axis=(1, 2)).mean()) for costs in (whole, groups)]
    return Result(
        name=f"spread of global batches' costs sorted across batches, group_bins: {RANKS} against null, {size} bins",
        ratio=spread[1] / spread[0],
        explanation=f"standard deviation {spread[1]:.1%} and {spread[0]:.1%} of the mean (ocr_tiles); heaviest rank "
        f"{heaviest(groups).mean():.3f} and {heaviest(whole).mean():.3f}",
        lower_is_better=True,
    )


def one_shape() -> list[Result]:
    loads = loads_of(ocr_tiles)
    balanced = balanced_order(loads, 4, SORTED.model_copy(update={"one_shape_per_batch": True}))
    batches = [balanced.bins(step) for step in range(balanced.schedule.steps_per_epoch)]
    shapes = [len({loads.bucket[bin] for bin in batch if bin is not None}) for batch in batches]
    costs = step_costs(balanced, DEFAULTS.costs(loads), RANKS * 4)
    return [
        Result(
            name="global batches of one shape, one_shape_per_batch, 5 shapes, 32 bins",
            ratio=float(np.mean(np.asarray(shapes) == 1)),
            explanation=f"{len(batches):,} batches; the others hold the shapes' leftovers of each window of 64; "
            f"heaviest rank {heaviest(costs).mean():.3f} of the mean",
        )
    ]


def shares(num_bins: int = 10**6, window_bins: int = 900, steps: int = 1000) -> list[Result]:
    """Sets of 0.2, 1 and 30 %, each bin of one: how far any 1,000 steps of 64 bins are from each one's share."""
    counts = [num_bins // 500, num_bins // 100, num_bins * 3 // 10]
    counts.append(num_bins - sum(counts))
    rng = np.random.default_rng(0)
    number = np.arange(len(counts), dtype=np.int8)
    before = np.repeat(number, counts)
    after = np.concatenate([rng.permutation(np.repeat(number, window)) for window in dealt(counts, window_bins)])
    order = Schedule(num_bins, 64, seed=0, fingerprint="benchmark").bins_in(0, 0, num_bins)
    ways = [(after, order), (before, order), (after, rng.permutation(num_bins))]
    results = []
    for place, name in enumerate(("0.2 %", "1 %", "30 %")):
        (far, longest), (far_before, longest_before), (far_chance, chance) = (
            share_of(sets[places] == place, steps * 64) for sets, places in ways
        )
        results.append(
            Result(
                name=f"any {steps:,} steps' bins of a set of {name} against its share, 10^6 bins",
                ratio=far,
                explanation=f"the worst, in standard deviations of a full shuffle, which has {far_chance:.1f}; sets "
                f"one after another {far_before:.0f}. Longest stretch without it: {longest:,} bins, {chance:,} in a "
                f"full shuffle, {longest_before:,} one after another",
                goal=4.0,
                lower_is_better=True,
            )
        )
    return results


def share_of(is_of_set: np.ndarray, bins: int) -> tuple[float, int]:
    """How far the worst of all stretches of so many bins is from the set's share; the longest stretch without it."""
    found, share = np.concatenate([[0], np.cumsum(is_of_set)]), is_of_set.mean()
    deviation = (bins * share * (1 - share) * (1 - bins / len(is_of_set))) ** 0.5
    places = np.concatenate([[-1], np.flatnonzero(is_of_set), [len(is_of_set)]])
    return float(np.abs(found[bins:] - found[:-bins] - bins * share).max() / deviation), int(np.diff(places).max()) - 1


def files_read(num_bins: int = 10**6, steps: int = 1000) -> Result:
    """Distinct files, of 1,024 bins, that 1,000 steps read."""
    plain = Schedule(num_bins, 64, seed=0, fingerprint="benchmark")
    balanced = BalancedSchedule(plain, DEFAULTS).bound_to(simulated)
    starts = range(0, plain.steps_per_epoch - steps, 5000)
    single = Schedule(num_bins, 64, seed=0, fingerprint="benchmark", shuffle_block=1, shuffle_window=num_bins)
    orders: list[Order] = [plain, balanced, single]
    found = [np.mean([distinct_files(order, start, start + steps) for start in starts]) for order in orders]
    return Result(
        name=f"distinct files read in {steps:,} steps, balanced against plain, 10^6 bins in blocks",
        ratio=float(found[1] / found[0]),
        explanation=f"{found[1]:.0f} against {found[0]:.0f} of {-(-num_bins // 1024)} files of 1,024 bins; "
        f"{found[2]:.0f} in a shuffle of single bins",
        goal=1.1,
        lower_is_better=True,
    )


def distinct_files(order: Order, start: int, stop: int) -> int:
    return len({bin // 1024 for step in range(start, stop) for bin in order.bins(step) if bin is not None})


def simulated(bins: np.ndarray) -> Loads:
    """The loads of any number of bins, from a hash of theirs."""
    draws = mix_many(bins.astype(np.uint64) + np.uint64(12345))
    visual = (draws % np.uint64(8192)).astype(np.int64)
    tokens = 16384 - (mix_many(draws) % np.uint64(4000)).astype(np.int64)
    shapes = np.asarray(["1x1", "2x3", "3x2"])[visual % 3]
    return Loads(tokens, visual, tokens - visual // 2, tokens**2 // 5, visual**2 // 8, shapes)


def seek() -> Result:
    """The first batch of a schedule just built, at its beginning and deep inside."""
    first, deep = (best_seconds(seeking(10**9, 64, step, simulated)) for step in (0, 10**7))
    plain = best_seconds(lambda: Schedule(10**9, 64, seed=0, fingerprint="benchmark").bins(10**7))
    return Result(
        name="seek to step 10^7 against step 0, 10^9 bins, 64 a batch, balanced",
        ratio=deep / first,
        explanation=f"{1e3 * deep:.1f} ms against {1e3 * first:.1f} ms to build the schedule and compute its batch, "
        f"reading of loads not counted; {1e3 * plain:.1f} ms without balance",
        goal=1.5,
        lower_is_better=True,
    )


def seek_of_large_batches() -> Result:
    few, many = (best_seconds(seeking(10**9, size, 10**5, simulated), repeats=3) for size in (64, 4096))
    return Result(
        name="seek with 4,096 bins a batch against 64, 10^9 bins, balanced",
        ratio=many / few,
        explanation=f"{1e3 * many:.0f} ms against {1e3 * few:.1f} ms; a batch has 64 times as many",
        lower_is_better=True,
    )


def seeking(num_bins: int, size: int, step: int, loads: ReadLoads) -> Callable[[], object]:
    def work() -> object:
        order = Schedule(num_bins, size, seed=0, fingerprint="benchmark")
        return BalancedSchedule(order, DEFAULTS).bound_to(loads).bins(step)

    return work


def mixture(weights: list[float], num_bins: list[int]) -> MixedSchedule:
    """Datasets of so many bins with these weights, 64 bins a step."""
    datasets = tuple(
        MixedDataset("", str(number), f"benchmark {number}", bins, weight)
        for number, (weight, bins) in enumerate(zip(weights, num_bins))
    )
    return MixedSchedule(WeightedDatasets(datasets), 64, seed=0)


def mixture_shares(steps: int = 1000) -> list[Result]:
    """Datasets of 0.2, 1 and 30 % of 10^6 bins mixed by these weights, against a draw by chance."""
    shares = [0.002, 0.01, 0.3, 0.688]
    schedule = mixture(shares, [round(share * 10**6) for share in shares])
    numbers = np.searchsorted(schedule._first_bins, schedule.bins_of(0, 10**6 // 64), side="right") - 1
    drawn = np.random.default_rng(0).choice(len(shares), len(numbers), p=shares)
    results = []
    for place, share in enumerate(shares[:3]):
        (far, longest), (far_chance, chance) = (share_of(of == place, steps * 64) for of in (numbers, drawn))
        results.append(
            Result(
                name=f"any {steps:,} steps' bins of a dataset of weight {share:.1%} against it, 10^6 bins",
                ratio=far / far_chance,
                explanation=f"the worst, in standard deviations of a draw by chance: {far:.2f}, drawn "
                f"{far_chance:.1f}. Longest stretch without it: {longest:,} bins, drawn {chance:,}",
                goal=0.5,
                lower_is_better=True,
            )
        )
    return results


def mixture_files(steps: int = 1000) -> Result:
    """Distinct files, of 1,024 bins, that 1,000 steps of a mixture read, against the same bins in one dataset."""
    counts = [2, 10, 293, 672]
    schedule = mixture([float(count) for count in counts], [1024 * count for count in counts])
    alone = Schedule(10**6, 64, seed=0, fingerprint="benchmark")
    starts = range(0, alone.steps_per_epoch - steps, 250)
    files_of = [
        schedule.bins_of(0, alone.steps_per_epoch - 1) // 1024,
        alone.bins_of(0, alone.steps_per_epoch - 1) // 1024,
    ]
    mixed, plain = (
        np.mean([len(np.unique(files[64 * start : 64 * (start + steps)])) for start in starts]) for files in files_of
    )
    return Result(
        name=f"distinct files read in {steps:,} steps, a mixture of four datasets against one, 10^6 bins",
        ratio=float(mixed / plain),
        explanation=f"{mixed:.0f} against {plain:.0f} on average, from any step on; datasets of 0.2, 1, 30 and 68.8 %",
        goal=1.5,
        lower_is_better=True,
    )


def mixture_seek() -> Result:
    """The first batch of a mixture of 64 datasets just built, at its beginning and deep inside; and the inverse."""

    def work(step: int) -> object:
        return mixture([1 + number % 7 for number in range(64)], [10**9 // 64] * 64).bins(step)

    first, deep = (best_seconds(functools.partial(work, step)) for step in (0, 10**7))
    schedule = mixture([1 + number % 7 for number in range(64)], [10**9 // 64] * 64)
    numbers = iter(range(10**8, 10**9))
    inverse = best_seconds(lambda: schedule.place_of(3, next(numbers)))
    return Result(
        name="seek to step 10^7 against step 0, a mixture of 64 datasets with 10^9 bins, 64 a batch",
        ratio=deep / first,
        explanation=f"{1e3 * deep:.1f} ms against {1e3 * first:.1f} ms to build it and compute its batch; "
        f"{1e6 * inverse:.0f} µs from a dataset's bin back to its step",
        goal=1.5,
        lower_is_better=True,
    )
