"""Packing to equal cost: bins that take equally long to train on, within the same capacities.

With one bin a rank, a step takes as long as its costliest bin, and bins filled to the same capacities differ by a
factor of two in time. Here the samples of a window, costliest first, each go into the cheapest bin that has room
(Graham, "Bounds on Multiprocessing Timing Anomalies", 1969). The number of bins is what `pack_2d` needs, or up to a
quarter more where that makes costs more equal: the fewest bins with which the costliest of 8 bins drawn at random is at
most 5 % over the mean. Where no number achieves that, the number with which steps of 8 such bins take the least time.

The price: shapes are mixed, bins are not filled to the last token, and costs must be those of the model. A sample that
costs more than a full bin of others stays unequal: give bins room for more than the longest row. Each window chooses
its number of bins independently; windows of rows of a few sizes may choose numbers that are some percent apart.
"""

import numpy as np

from mmray.base.compiled import compiled
from mmray.packing.pack import pack_2d

MAX_COST_RATIO = 1.05
"""Expected cost of the costliest bin of a step over the mean cost, at which bins count as equal."""
MAX_BIN_RATIO = 1.25
"""Most bins that are tried, over the number that `pack_2d` needs."""
DRAWN_BINS = 8
"""Bins of a step, drawn at random, of which the costliest decides the time of the step."""


def pack_equal_cost(
    tokens: np.ndarray, visual_tokens: np.ndarray, costs: np.ndarray, pair_cost: float, *,
    token_capacity: int, visual_capacity: int,
) -> list[list[int]]:  # fmt: skip
    """Packs samples into bins of similar cost within a capacity of tokens and one of visual tokens.

    tokens, visual_tokens: the tokens and visual tokens of each sample, int64 [n].
    costs: the cost that each sample adds to its bin, float64 [n].
    pair_cost: the further cost of a bin, for each of its tokens squared.
    token_capacity, visual_capacity: the most tokens and visual tokens of a bin.

    Returns the bins as `pack_2d` does; the same input gives the same bins.
    Raises ValueError, with index and value, for a sample over a capacity.
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
    """Returns the expected cost of the costliest of `drawn` bins chosen at random. costs: those of all bins,
    float64 [n]."""
    below = (np.arange(len(costs) + 1) / len(costs)) ** drawn  # chance that all are among the k cheapest
    return float((np.diff(below) * np.sort(costs)).sum())


@compiled()
def _placed(
    tokens: np.ndarray, visual: np.ndarray, costs: np.ndarray, pair_cost: float, order: np.ndarray, num_bins: int,
    token_capacity: int, visual_capacity: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Returns the bin of each sample, int64 [n], and the cost of each bin, float64 [bins], which is empty where a
    sample has no room."""
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
    """Lists the samples of each non-empty bin, bins in the order of their first sample."""
    bins: dict[int, list[int]] = {}
    for sample, number in enumerate(bin_of_sample.tolist()):
        bins.setdefault(number, []).append(sample)
    return list(bins.values())
