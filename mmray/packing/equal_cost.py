"""Packing to equal cost: bins that take alike long to train on, within the same capacities.

With one bin a rank a step takes as long as its costliest bin, and bins filled to the same capacities differ by a factor
of two in time. Here a window's samples, the costliest first, each go into the bin that costs least so far and has room
(Graham, "Bounds on Multiprocessing Timing Anomalies", 1969). How many bins there are is what `pack_2d` needs, or up
to a quarter more where with these the costs are closer: the fewest with which the costliest of 8 bins drawn by chance
is at most 5 % over the mean. Where no number gives that, the one with which steps of 8 such bins take the least time.

Given up: shapes are mixed, bins are not filled to the last token, and costs must be the model's. What a single sample
costs more than a bin of others can hold stays unequal: give bins room for more than the longest row. Each window finds
its number of bins by itself; windows of rows of a few sizes may find numbers that are some percent apart.
"""

import numpy as np

from mmray.base.compiled import compiled
from mmray.packing.pack import pack_2d

MAX_COST_RATIO = 1.05
MAX_BIN_RATIO = 1.25
"""Bins against the fewest."""
DRAWN_BINS = 8


def pack_equal_cost(
    tokens: np.ndarray, visual_tokens: np.ndarray, costs: np.ndarray, pair_cost: float, *,
    token_capacity: int, visual_capacity: int,
) -> list[list[int]]:  # fmt: skip
    """Put samples into bins of like cost that hold at most token_capacity tokens and visual_capacity visual tokens.

    tokens, visual_tokens: of each sample, int64 [n]; costs: what each adds to its bin, float64 [n]; pair_cost: what a
    bin costs beside, per token squared. Returns the bins as `pack_2d` does; the same input gives the same bins. Raises
    ValueError, with index and value, for a sample over a capacity.
    """
    least = pack_2d(tokens, visual_tokens, token_capacity=token_capacity, visual_capacity=visual_capacity)
    fewest, order = len(least), np.argsort(-(costs + pair_cost * tokens * tokens), kind="stable")
    best, best_seconds, num_bins = least, np.inf, fewest
    while num_bins <= MAX_BIN_RATIO * fewest or not np.isfinite(best_seconds):
        bin_of_sample, bin_costs = _placed(
            tokens, visual_tokens, costs, pair_cost, order, num_bins, token_capacity, visual_capacity
        )
        if len(bin_costs):
            costliest = expected_costliest(bin_costs)
            if num_bins * costliest < best_seconds:
                best, best_seconds = _as_lists(bin_of_sample), num_bins * costliest
            if costliest <= MAX_COST_RATIO * bin_costs.mean():
                return _as_lists(bin_of_sample)
        num_bins += max(1, fewest // 50)
    return best


def expected_costliest(costs: np.ndarray, drawn: int = DRAWN_BINS) -> float:
    """The mean cost of the costliest of so many bins drawn by chance. costs: of all bins, float64 [n]."""
    below = (np.arange(len(costs) + 1) / len(costs)) ** drawn  # chance that all are among the k cheapest
    return float((np.diff(below) * np.sort(costs)).sum())


@compiled()
def _placed(
    tokens: np.ndarray, visual: np.ndarray, costs: np.ndarray, pair_cost: float, order: np.ndarray, num_bins: int,
    token_capacity: int, visual_capacity: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The bin of each sample, int64 [n], and the cost of each bin, float64 [bins]; none where a sample has no room."""
    bin_of_sample = np.empty(len(tokens), dtype=np.int64)
    bin_tokens, bin_visual = np.zeros(num_bins, dtype=np.int64), np.zeros(num_bins, dtype=np.int64)
    sums, bin_costs = np.zeros(num_bins), np.zeros(num_bins)
    for sample in order:
        least = -1
        for number in range(num_bins):
            has_room = (
                bin_tokens[number] + tokens[sample] <= token_capacity
                and bin_visual[number] + visual[sample] <= visual_capacity
            )
            if has_room and (least < 0 or bin_costs[number] < bin_costs[least]):
                least = number
        if least < 0:
            return bin_of_sample, np.zeros(0)
        bin_of_sample[sample] = least
        bin_tokens[least] += tokens[sample]
        bin_visual[least] += visual[sample]
        sums[least] += costs[sample]
        bin_costs[least] = sums[least] + pair_cost * bin_tokens[least] * bin_tokens[least]
    return bin_of_sample, bin_costs


def _as_lists(bin_of_sample: np.ndarray) -> list[list[int]]:
    """The samples of each bin that has any, bins in the order of their first."""
    bins: dict[int, list[int]] = {}
    for sample, number in enumerate(bin_of_sample.tolist()):
        bins.setdefault(number, []).append(sample)
    return list(bins.values())
