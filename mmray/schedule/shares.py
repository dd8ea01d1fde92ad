"""Shares the slots of an endless stream out to datasets by their weights: which slot is whose, and the inverse.

Promises, for any weights that are fractions, and with no state:

- At the end of every window each dataset has as many slots as its weight asks for, to less than one slot.
- After every single slot it is less than three slots from that.
- A dataset takes its slots in order: slot numbers grow with the number of the bin within the dataset.
- Both ways, slot to (dataset, number) and back, cost the same at slot 10^15 as at slot 0, and constant memory.

At the ends of windows, running sums of the weights are rounded. Let W_j be the sum of the first j + 1 weights; the
first j + 1 datasets have round(W_j · x) of the first x slots, so that dataset j has round(W_j · x) - round(W_(j-1) · x)
of them. That is the weight's part rounded down or up, the sum over all datasets is x, and it never decreases from one
window to the next, as long as each dataset has at least one slot a window. That is how long windows are made.

Within a window the counts are whole numbers, and slots are shared out by a binary tree over the datasets, as by
Bresenham's line: of the first i slots of a node that has `left` slots for its left child among `total`, the left child
has (i · left + total // 2) // total. The tree is Huffman's, of the weights, in which a node has at least twice the
weight of each grandchild: so the errors of the nodes above a dataset, each of half a slot, shrink on the way down.

    weights 5 : 2 : 1, windows of 8 slots    0 1 0 0 2 0 1 0 │ 0 1 0 0 2 0 1 0 │ …

Why not draw the dataset of each slot at random: after 1,000 draws a set of 1 % has between 4 and 18 bins, and to learn
how many of its bins went before slot 10^9 one must draw 10^9 times. Why not the greedy rule (give the slot to whoever
is furthest behind), which keeps within one slot at all times: it too is known only by doing it from the beginning.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from math import ceil

import numpy as np

LEAST_SHARE = Fraction(1, 1_000_000)
"""Smallest share that a dataset with a weight may have: the length of a window is one over it."""


def exact_shares(weights: Sequence[float]) -> tuple[Fraction, ...]:
    """The shares of some weights, which are taken as they are written: 0.1 is a tenth. Their sum is 1.

    Raises ValueError, quoting the weight, for one below 0, for weights that are all 0, and for a share below
    LEAST_SHARE, unless it is 0.
    """
    exact = [Fraction(repr(float(weight))) if np.isfinite(weight) else Fraction(-1) for weight in weights]
    if wrong := [weight for weight, fraction in zip(weights, exact) if fraction < 0]:
        raise ValueError(f"a weight is a number from 0 on, got {wrong[0]}")
    total = sum(exact)
    if not total:
        raise ValueError("one weight must be above 0")
    shares = tuple(fraction / total for fraction in exact)
    for weight, share in zip(weights, shares):
        if 0 < share < LEAST_SHARE:
            raise ValueError(
                f"weight {weight:g} is a share of {float(share):.2g}, below one bin in a million: raise it, or leave "
                "the dataset out"
            )
    return shares


@dataclass(frozen=True)
class Shares:
    """The shares of datasets in a stream of slots.

    >>> shares = Shares(exact_shares([5, 2, 1]), window=8)
    >>> shares.at(np.arange(8))[0].tolist()
    [0, 1, 0, 0, 2, 0, 1, 0]
    >>> shares.slot_of(dataset=1, number=3)
    14
    """

    shares: tuple[Fraction, ...]
    """Share of each dataset; their sum is 1."""
    window: int
    """Number of slots of a window, at least, where each dataset with a share has a slot; else it is made longer."""
    length: int | None = None
    """Number of slots of the whole stream; None: it has no end."""

    def __post_init__(self) -> None:
        if sum(self.shares) != 1 or min(self.shares) < 0:
            raise ValueError(
                f"shares must be from 0 on and have the sum 1, got {[str(share) for share in self.shares]}"
            )
        if self.window < 1 or (self.length is not None and self.length < 1):
            raise ValueError(f"window and length must be at least 1, got {self.window} and {self.length}")

    @cached_property
    def window_slots(self) -> int:
        """Number of slots of a window: the smallest multiple of `window` in which every dataset has a slot."""
        rarest = min(share for share in self.shares if share)
        return self.window * ceil(1 / (rarest * self.window))

    def counts(self, slots: int) -> tuple[int, ...]:
        """Number of slots that each dataset has among the first `slots`."""
        if not slots:
            return (0,) * len(self.shares)
        window = self._window_of(slots - 1)
        tree = self._tree(window)
        start = self._start(window)
        before, inside = self._whole(window), tree.counts(slots - start)
        return tuple(first + more for first, more in zip(before, inside))

    def at(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The dataset of each slot, and the number of the slot within its dataset.

        slots: int64 [n], in any order. Returns int64 [n] twice.
        """
        datasets, numbers = np.empty(len(slots), dtype=np.int64), np.empty(len(slots), dtype=np.int64)
        windows = np.minimum(slots // self.window_slots, self._last_window)
        for window in np.unique(windows).tolist():
            chosen = np.flatnonzero(windows == window)
            inside = slots[chosen] - self._start(window)
            datasets[chosen], ranks = self._tree(window).at(inside)
            numbers[chosen] = np.asarray(self._whole(window), dtype=np.int64)[datasets[chosen]] + ranks
        return datasets, numbers

    def slot_of(self, dataset: int, number: int) -> int:
        """The slot that holds number `number`, from 0, of a dataset: the inverse of `at`.

        Raises IndexError where the stream ends before, or the dataset has no share.
        """
        if not self.shares[dataset] or number < 0 or (self.length and number >= self.counts(self.length)[dataset]):
            raise IndexError(f"dataset {dataset} has no number {number} in this stream")
        # The window whose first slot has `number` or fewer before it: that of the weight's own place, or a neighbour.
        window = min(int(number / self.shares[dataset]) // self.window_slots, self._last_window)
        while self._whole(window)[dataset] > number:
            window -= 1
        while self._whole(window + 1)[dataset] <= number:
            window += 1
        return self._start(window) + self._tree(window).slot_of(dataset, number - self._whole(window)[dataset])

    @cached_property
    def _last_window(self) -> int:
        """Number of the last window, which holds what is left over; of an endless stream, one that is never reached."""
        return (1 << 62) if self.length is None else max(1, self.length // self.window_slots) - 1

    def _window_of(self, slot: int) -> int:
        return min(slot // self.window_slots, self._last_window)

    def _start(self, window: int) -> int:
        """The first slot of a window; of the one after the last, the end of the stream."""
        if self.length is not None and window > self._last_window:
            return self.length
        return window * self.window_slots

    def _whole(self, window: int) -> tuple[int, ...]:
        """Number of slots that each dataset has before a window."""
        return _rounded(self.shares, self._start(window))

    def _tree(self, window: int) -> "_Tree":
        return _tree(self.shares, self._start(window), self._start(window + 1))


def _rounded(shares: tuple[Fraction, ...], slots: int) -> tuple[int, ...]:
    """The shares of a number of slots as whole numbers of the same sum, each rounded down or up."""
    borders = [(2 * above * slots + below) // (2 * below) for above, below in _sums(shares)]
    return tuple(stop - first for first, stop in pairwise(borders))


@lru_cache(maxsize=64)
def _sums(shares: tuple[Fraction, ...]) -> tuple[tuple[int, int], ...]:
    """The sums of the first 0, 1, … shares, as (numerator, denominator)."""
    return tuple(part.as_integer_ratio() for part in accumulate(shares, initial=Fraction(0)))


@lru_cache(maxsize=64)
def _tree(shares: tuple[Fraction, ...], start: int, stop: int) -> "_Tree":
    before, after = _rounded(shares, start), _rounded(shares, stop)
    return _Tree(_pairs(shares), tuple(last - first for first, last in zip(before, after)))


@lru_cache(maxsize=64)
def _pairs(shares: tuple[Fraction, ...]) -> tuple[tuple[int, int], ...]:
    """Huffman's tree of the datasets: children of each inner node, the root last.

    Nodes 0 to len(shares) - 1 are the datasets, and node len(shares) + k is the one with children pairs[k].
    """
    heap = [(share, number) for number, share in enumerate(shares)]
    heapq.heapify(heap)
    pairs: list[tuple[int, int]] = []
    while len(heap) > 1:
        (small, right), (large, left) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (small + large, len(shares) + len(pairs)))
        pairs.append((left, right))
    return tuple(pairs)


class _Tree:
    """The slots of one window, shared out to datasets that have whole numbers of them."""

    def __init__(self, pairs: tuple[tuple[int, int], ...], counts: tuple[int, ...]) -> None:
        """pairs: children of each inner node (`_pairs`); counts: number of slots of each dataset."""
        self._pairs, self._num_datasets = pairs, len(counts)
        self._totals = list(counts)
        self._parents: dict[int, int] = {}
        for left, right in pairs:
            self._parents |= {left: len(self._totals), right: len(self._totals)}
            self._totals.append(self._totals[left] + self._totals[right])

    def at(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The dataset of each slot of the window, and its number among the dataset's slots in it, int64 [n] twice."""
        datasets, numbers = np.empty(len(slots), dtype=np.int64), np.empty(len(slots), dtype=np.int64)
        waiting = [(len(self._totals) - 1, np.arange(len(slots)), slots)]
        while waiting:
            node, places, inside = waiting.pop()
            if node < self._num_datasets:
                datasets[places], numbers[places] = node, inside
                continue
            left, right = self._pairs[node - self._num_datasets]
            before = (inside * self._totals[left] + self._totals[node] // 2) // self._totals[node]
            after = ((inside + 1) * self._totals[left] + self._totals[node] // 2) // self._totals[node]
            is_left = after > before
            if is_left.any():
                waiting.append((left, places[is_left], before[is_left]))
            if not is_left.all():
                waiting.append((right, places[~is_left], (inside - before)[~is_left]))
        return datasets, numbers

    def counts(self, slots: int) -> list[int]:
        """Number of slots of each dataset among the first `slots` of the window."""
        among = [0] * len(self._totals)
        among[-1] = slots
        for index in range(len(self._pairs) - 1, -1, -1):
            (left, right), node = self._pairs[index], self._num_datasets + index
            total = max(self._totals[node], 1)
            among[left] = (among[node] * self._totals[left] + total // 2) // total
            among[right] = among[node] - among[left]
        return among[: self._num_datasets]

    def slot_of(self, dataset: int, number: int) -> int:
        """The slot of the window that is number `number` of a dataset in it."""
        node, place = dataset, number
        while (parent := self._parents.get(node)) is not None:
            left, right = self._pairs[parent - self._num_datasets]
            total = self._totals[parent]
            if node == left:  # the first i with (i + 1) · left + total // 2 >= (place + 1) · total
                place = -((total // 2 - (place + 1) * total) // self._totals[left]) - 1
            else:  # the first i with (i + 1) · right > place · total + total // 2
                place = (place * total + total // 2) // self._totals[right]
            node = parent
        return place
