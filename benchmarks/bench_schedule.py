"""The order of training: equal work for all ranks, chance, files read, and the time of a seek in 10^9 bins.

The balance settings are a job's defaults. Ranks are taken to wait for each other after every micro-batch, as ZeRO 2
and 3 make them: a step's ratio is the sum over its micro-batches of the heaviest rank's cost, over the sum of the
means. The epoch's last batch, which may be padded, is left out.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from benchmarks.bench_packing import MIXTURES, Mixture, ocr_any_size, ocr_tiles, packed, text_only
from benchmarks.common import Result, best_seconds
from mmray.schedule.balance import BalanceSettings
from mmray.schedule.balanced import BalancedSchedule, BoundSchedule, LoadsOf
from mmray.schedule.loads import Loads
from mmray.schedule.schedule import Schedule, mix_many

RANKS = 8
NUM_ROWS = 25_000
DEFAULTS = BalanceSettings().for_attention("sdpa")
PACKED_ATTENTION = BalanceSettings().for_attention("flash_attention_2")
LENGTH_ALONE = DEFAULTS.model_copy(
    update={"token_pair": 0.0, "trained_token": 0.0, "visual_token": 0.0, "visual_pair": 0.0}
)
SMOLVLM = {"token_pair": 1.6e-4, "trained_token": 0.27, "visual_token": 13.0, "visual_pair": 0.044}
"""Costs of SmolVLM-256M, as in docs/training.md."""

Order = Schedule | BoundSchedule


def run() -> list[Result]:
    results = []
    for mixture in MIXTURES:
        results += [ranks_of(mixture, DEFAULTS, bins_per_rank) for bins_per_rank in (1, 4)]
    results += [ranks_of(mixture, PACKED_ATTENTION, 1) for mixture in (ocr_tiles, text_only)]
    results += [other_costs(ocr_tiles), other_costs(ocr_any_size), *chance(), mixed_costs(), *one_shape()]
    return results + [files_read(), seek(), seek_of_large_batches()]


@functools.cache
def loads_of(mixture: Mixture) -> Loads:
    """The packed bins of a mixture, the text of each row trained."""
    tokens, visual = mixture(np.random.default_rng(0), NUM_ROWS)
    tile = np.minimum(visual, 256) if mixture is ocr_tiles else visual
    bins = packed(tokens, visual)
    rows = np.concatenate([np.asarray(members) for members in bins])
    starts = np.cumsum([0] + [len(members) for members in bins])[:-1]
    columns = [tokens, visual, tokens - visual, tokens**2, visual * tile]
    counts = [np.add.reduceat(column[rows].astype(np.int64), starts) for column in columns]
    shapes = np.asarray([f"{count % 5}" for count in counts[1] // 256])
    return Loads(*counts, bucket=shapes)


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
        balanced_order(replace(loads, tokens=loads.tokens - loads.visual_tokens), bins_per_rank, LENGTH_ALONE),
        balanced_order(loads, bins_per_rank, LENGTH_ALONE),
        balanced_order(loads, bins_per_rank, balance),
    ]
    steps = [heaviest(step_costs(order, cost, RANKS * bins_per_rank)) for order in orders]
    before, text_length, length, after = (float(each.mean()) for each in steps)
    count = "1 bin" if bins_per_rank == 1 else f"{bins_per_rank} bins"
    attention = "sdpa" if balance is DEFAULTS else "flash attention"
    return Result(
        name=f"heaviest rank against the mean, {mixture.__name__}, {attention}, {RANKS} ranks, {count} a rank",
        ratio=after,
        explanation=f"plain order {before:.3f}; balanced by text length alone {text_length:.3f}, by text and "
        f"visual tokens alone {length:.3f}, by cost {after:.3f} (99 % of steps below "
        f"{np.quantile(steps[-1], 0.99):.3f}, the worst {steps[-1].max():.3f})",
        goal=1.05,
        lower_is_better=True,
    )


def other_costs(mixture: Mixture) -> Result:
    """What wrong costs cost: bins balanced for one model and attention, run on another."""
    loads = loads_of(mixture)
    orders: list[Order] = [plain_order(loads, 1), balanced_order(loads, 1)]
    truths = {
        "with flash attention": PACKED_ATTENTION,
        "on SmolVLM-256M": DEFAULTS.model_copy(update=SMOLVLM),
    }
    found = {}
    for name, truth in truths.items():
        cost = truth.costs(loads)
        found[name] = [float(heaviest(step_costs(order, cost, RANKS)).mean()) for order in orders]
    shown = "; ".join(f"{name} {after:.3f}, plain order {before:.3f}" for name, (before, after) in found.items())
    return Result(
        name=f"heaviest rank against the mean where the costs set are another model's, {mixture.__name__}",
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
    settings = DEFAULTS, DEFAULTS.model_copy(update={"group_bins": RANKS})
    whole, groups = (step_costs(balanced_order(loads, 8, each), cost, size) for each in settings)
    spread = [float(costs.sum(axis=(1, 2)).std() / costs.sum(axis=(1, 2)).mean()) for costs in (whole, groups)]
    return Result(
        name=f"spread of global batches' costs, group_bins: {RANKS} against null, {size} bins",
        ratio=spread[1] / spread[0],
        explanation=f"standard deviation {spread[1]:.1%} and {spread[0]:.1%} of the mean (ocr_tiles); heaviest rank "
        f"{heaviest(groups).mean():.3f} and {heaviest(whole).mean():.3f}",
        lower_is_better=True,
    )


def one_shape() -> list[Result]:
    loads = loads_of(ocr_tiles)
    balanced = balanced_order(loads, 4, DEFAULTS.model_copy(update={"one_shape_per_batch": True}))
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
        explanation=f"{1e3 * deep:.1f} ms against {1e3 * first:.1f} ms to build the schedule and compute its window of "
        f"4,096 bins, reading of loads not counted; {1e3 * plain:.1f} ms without balance",
        goal=1.5,
        lower_is_better=True,
    )


def seek_of_large_batches() -> Result:
    few, many = (best_seconds(seeking(10**9, size, 10**5, simulated), repeats=3) for size in (64, 4096))
    return Result(
        name="seek with 4,096 bins a batch against 64, 10^9 bins, balanced",
        ratio=many / few,
        explanation=f"{1e3 * many:.0f} ms, once in 64 steps, against {1e3 * few:.1f} ms; a window has 64 times as many",
        lower_is_better=True,
    )


def seeking(num_bins: int, size: int, step: int, loads: LoadsOf) -> Callable[[], object]:
    def work() -> object:
        order = Schedule(num_bins, size, seed=0, fingerprint="benchmark")
        return BalancedSchedule(order, DEFAULTS).bound_to(loads).bins(step)

    return work
