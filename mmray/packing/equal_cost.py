"""Packing to equal cost: bins that take equally long to train on, within the same capacities.

With one bin a rank, a step takes as long as its costliest bin, and bins filled to the same capacities differ by a
factor of two in time. Here the samples of a window, costliest first, each go into the cheapest bin that has room
(Graham, "Bounds on Multiprocessing Timing Anomalies", 1969). How much a bin shall cost is planned once, on the first
window of a dataset, so that bins of all windows cost the same (`planned_bin_cost`). It takes as many bins as `pack_2d`
needs, or up to a quarter more where that makes costs more equal: the fewest bins with which the costliest of 8 bins
drawn at random is at most 5 % over the mean, in the window and in each quarter of its samples alone. (With samples of a
few sizes, one window may come out equal by chance at a cost at which others do not.) Where no number achieves that, the
number with which steps of 8 such bins take the least time.

The price: shapes are mixed, bins are not filled to the last token, and costs must be those of the model. A sample that
costs more than a full bin of others stays unequal: give bins room for more than the longest row.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mmray.base.compiled import compiled
from mmray.packing.pack import pack_2d

MAX_COST_RATIO = 1.05
"""Expected cost of the costliest bin of a step over the mean cost, at which bins count as equal."""
MAX_BIN_RATIO = 1.25
"""Most bins that are tried, over the number that `pack_2d` needs."""
PARTS, LEAST_SAMPLES = 4, 1024
"""Number of parts of a window that are looked at alone, and the number of samples from which on they are."""
DRAWN_BINS = 8
"""Bins of a step, drawn at random, of which the costliest decides the time of the step."""


@dataclass(frozen=True)
class CostedSamples:
    """The samples of a window, and the capacities of its bins.

    tokens, visual_tokens: the tokens and visual tokens of each sample, int64 [n].
    costs: the cost that each sample adds to its bin, float64 [n].
    pair_cost: the further cost of a bin, for each of its tokens squared.
    token_capacity, visual_capacity: the most tokens and visual tokens of a bin.
    """

    tokens: np.ndarray
    visual_tokens: np.ndarray
    costs: np.ndarray
    pair_cost: float
    token_capacity: int
    visual_capacity: int

    @cached_property
    def fewest(self) -> list[list[int]]:
        """The bins of `pack_2d`. Raises ValueError, with index and value, for a sample over a capacity."""
        capacities = {"token_capacity": self.token_capacity, "visual_capacity": self.visual_capacity}
        return pack_2d(self.tokens, self.visual_tokens, **capacities)

    def part(self, number: int, parts: int) -> "CostedSamples":
        """Every `parts`-th sample, from sample `number` on."""
        places = slice(number, None, parts)
        columns = {name: getattr(self, name)[places] for name in ("tokens", "visual_tokens", "costs")}
        return replace(self, **columns)

    def bin_cost(self, num_bins: float) -> float:
        """The cost of each of some bins if all had equal shares of the samples."""
        return float(self.costs.sum() / num_bins + self.pair_cost * (self.tokens.sum() / num_bins) ** 2)

    def num_bins(self, bin_cost: float) -> int:
        """The number of bins that then cost `bin_cost`: the inverse of `bin_cost`, rounded."""
        linear, pairs = float(self.costs.sum()), self.pair_cost * float(self.tokens.sum()) ** 2
        root = (linear * linear + 4 * pairs * bin_cost) ** 0.5
        return round((linear + root) / (2 * bin_cost))  # solves bin_cost · n² - linear · n - pairs = 0

    def placed(self, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
        """The bin of each sample, int64 [n], and the cost of each bin, float64 [bins]: empty without room for all."""
        order = np.argsort(-(self.costs + self.pair_cost * self.tokens * self.tokens), kind="stable")
        return _placed(
            self.tokens, self.visual_tokens, self.costs, self.pair_cost, order, num_bins, self.token_capacity,
            self.visual_capacity,
        )  # fmt: skip

    def inequality(self, num_bins: int) -> float:
        """The expected cost of the costliest bin of a step over the mean cost; infinite where samples lack room."""
        _, costs = self.placed(num_bins)
        return expected_costliest(costs) / float(costs.mean()) if len(costs) else np.inf


def planned_bin_cost(samples: CostedSamples) -> float:
    """Chooses the cost of the bins of all windows by the samples of one, of which there is at least one."""
    fewest = len(samples.fewest)
    parts = [samples.part(number, PARTS) for number in range(PARTS)] if len(samples.tokens) >= LEAST_SAMPLES else []
    best = samples.bin_cost(fewest)
    best_time = np.inf
    for num_bins in range(fewest, int(MAX_BIN_RATIO * fewest) + 1, _step(fewest)):
        bin_cost = samples.bin_cost(num_bins)
        inequality = max([samples.inequality(num_bins), *(part.inequality(part.num_bins(bin_cost)) for part in parts)])
        if num_bins * bin_cost * inequality < best_time:
            best, best_time = bin_cost, num_bins * bin_cost * inequality
        if inequality <= MAX_COST_RATIO:
            return bin_cost
    return best


def pack_equal_cost(samples: CostedSamples, bin_cost: float) -> list[list[int]]:
    """Packs samples into bins of a cost, as far as both capacities allow it.

    bin_cost: the cost of a bin, from `planned_bin_cost`.

    Returns the bins as `pack_2d` does; the same input gives the same bins. Raises ValueError, with index and value, for
    a sample over a capacity.
    """
    fewest = len(samples.fewest)
    num_bins = min(max(fewest, samples.num_bins(bin_cost)), int(MAX_BIN_RATIO * fewest))
    while fewest:
        bin_of_sample, costs = samples.placed(num_bins)
        if len(costs):
            return _as_lists(bin_of_sample)
        num_bins += _step(fewest)
    return []


def _step(fewest: int) -> int:
    """The distance between numbers of bins that are tried."""
    return max(1, fewest // 100)


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
