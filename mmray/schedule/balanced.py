"""Computes a training order with equal work for all ranks: deals the bins of each global batch by their cost.

A step ends when its slowest rank does. The bins of a global batch are those of `Schedule`, a fair sample of the data.
They are sorted by cost, the heaviest first, and dealt to ranks back and forth. So the bins that run at the same time
are neighbours in cost, and the rank with the heaviest bin of one pass gets the lightest of the next. For five bins of
costs 9, 7, 4, 3, 1 and two ranks: rank 0 gets 9, 3, 1 and rank 1 gets 7, 4. With 8 bins a rank the slowest of 8 ranks
is 0 to 5 % over the mean on the mixtures of benchmarks/bench_packing.py. With one bin a rank there is no second pass,
and bins must be packed to equal cost (`packing.mode: equal_cost`).

`balance.across_batches` chooses by cost which bins form a batch. The shuffled order is cut into windows of
`window_batches` global batches or somewhat more. A window's bins are sorted by cost, those of equal cost (`tolerance`)
at random; they are cut into groups, the groups are put in random order, and each global batch is the next few groups.
So every global batch holds bins of one cost, or of few, and the slowest of 8 ranks is 2 % over the mean with one bin
each. Given up for it: a batch is not a sample of all data, batches of pages and batches of text alternate, and the loss
in learning is far larger than the time saved (docs/training.md).

The promises of `Schedule` hold: the order is a pure function of (data set, seed, epoch, step) and the balance settings,
each epoch has each bin once, only the epoch's last global batch is padded, and the bins of a global batch do not depend
on the number of ranks. One batch, or one window, is computed at a time: a seek to any step costs that (1.5 ms of
arithmetic for 4,096 bins, and reading their loads) and constant memory. No other files are read than in the plain
order.

Sorting by cost needs the costs, which are in the prepared dataset. A `BalancedSchedule` is settings alone, small and
picklable; in each process `bound_to(prepared.loads)` gives the order.
"""

import hashlib
import json
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from mmray.base.words import counted
from mmray.schedule.balance import BalanceSettings
from mmray.schedule.loads import Loads
from mmray.schedule.order import Order, Taken, Window
from mmray.schedule.schedule import mix_many

ReadLoads = Callable[[np.ndarray], Loads]
"""Reads the loads of bins by their numbers, int64 [n]; returns the same in every process."""

_WINDOWS_KEPT = 4
"""Number of windows whose order is cached: the current one, the next, and those of readers slightly behind."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's step between numbers of one stream


@dataclass(frozen=True)
class BalancedSchedule:
    """The settings of a balanced order: a shuffled order, and how its bins become global batches of equal work.

    Raises ValueError for balance settings that do not fit the order, or with `whole_row_attention` undecided.
    """

    order: Order
    balance: BalanceSettings

    def __post_init__(self) -> None:
        if self.balance.whole_row_attention is None:
            raise ValueError("balance.whole_row_attention is not decided; use for_attention")
        if self.order.global_batch_bins % (self.balance.group_bins or 1):
            raise ValueError(
                f"balance.group_bins ({self.balance.group_bins}) must divide "
                f"global_batch_bins ({self.order.global_batch_bins})"
            )

    def _repr_html_(self) -> str:
        from mmray.display.notebook import Fact, card  # pages and their templates: only where one is shown

        order, balance = self.order, self.balance
        groups = "" if balance.group_bins is None else f", in groups of {balance.group_bins:,}"
        shapes = ", one shape in each" if balance.one_shape_per_batch else ""
        across = balance.sorts_batches
        sorting = Fact(
            "sorted by cost", f"{counted(balance.window_batches, 'step')} together, {balance.tolerance:.0%} is equal"
        ) if across else Fact("dealt by cost", "the heaviest first, back and forth")  # fmt: skip
        return card(
            f"Balanced schedule: {counted(self.steps_per_epoch, 'step')} an epoch",
            f"data {order.fingerprint}, seed {order.seed}",
            [
                Fact(
                    "bins",
                    f"{order.num_bins:,}, {order.global_batch_bins:,}{' of like cost' if across else ''} a step"
                    f"{groups}{shapes}",
                ),
                sorting,
                Fact("its bins", "bound_to(prepared.loads).bins(step)"),
            ],
        )

    @property
    def num_bins(self) -> int:
        return self.order.num_bins

    @property
    def global_batch_bins(self) -> int:
        return self.order.global_batch_bins

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in an epoch, the padded one included."""
        return self.order.steps_per_epoch

    @property
    def window_batches(self) -> int:
        """Number of global batches whose bins are rearranged together."""
        return self.balance.window_batches if self.balance.sorts_batches else 1

    def taken_at(self, step: int) -> dict[str, Taken]:
        """How far each dataset is before a step, by its fingerprint.

        With sorting across batches, in the middle of a window, all bins of the window count as taken.
        """
        window = self.order.window(step, self.window_batches)
        return self.order.taken_at(window.first if window.first == step else window.stop)

    def micro_batches_per_rank(self, world_size: int, micro_batch_bins: int = 1) -> int:
        """Number of micro-batches that each rank runs in a step, as `Schedule.micro_batches_per_rank`."""
        return self.order.micro_batches_per_rank(world_size, micro_batch_bins)

    def bound_to(self, loads: ReadLoads) -> "BoundSchedule":
        """Make the order itself.

        loads: reads the loads of the data set with the schedule's fingerprint (`PreparedDataset.loads`).
        """
        return BoundSchedule(self, loads)


class BoundSchedule:
    """Computes the bins of each step of a balanced schedule from their loads."""

    def __init__(self, schedule: BalancedSchedule, loads: ReadLoads) -> None:
        self.schedule = schedule
        self._loads = loads
        self._window = lru_cache(maxsize=_WINDOWS_KEPT)(self._arranged)

    def bins(self, step: int) -> list[int | None]:
        """The bin numbers of global batch `step`, the heaviest first; None, at the end, is an empty padding bin."""
        window = self.schedule.order.window(step, self.schedule.window_batches)
        size = self.schedule.global_batch_bins
        start = (step - window.first) * size
        bins: list[int | None] = list(self._window(window)[start : start + size].tolist())
        return bins + [None] * (size - len(bins))

    def rank_bins(self, step: int, rank: int, world_size: int, micro_batch_bins: int = 1) -> list[list[int | None]]:
        """The micro-batches of one rank in global batch `step`, in the order it runs them.

        Bins are dealt back and forth: pass j takes bins(step)[j * world_size : (j + 1) * world_size] and gives them to
        ranks 0, 1, 2, ... where j is even, and to the last rank first where it is odd. Micro-batch k holds what a rank
        gets in passes k * m to (k + 1) * m - 1, where m is micro_batch_bins; None where bins(step) has ended.

        Returns ceil(global_batch_bins / (world_size * m)) lists of m bin numbers or None. Raises ValueError for a rank
        out of range.
        """
        num_micro_batches = self.schedule.micro_batches_per_rank(world_size, micro_batch_bins)
        if not 0 <= operator.index(rank) < world_size:
            raise ValueError(f"rank must be from 0 to {world_size - 1} (world_size - 1), got {rank}")
        bins = self.bins(step)

        def dealt(turn: int) -> int | None:
            slot = turn * world_size + (rank if turn % 2 == 0 else world_size - 1 - rank)
            return bins[slot] if slot < len(bins) else None

        starts = (k * micro_batch_bins for k in range(num_micro_batches))
        return [[dealt(turn) for turn in range(start, start + micro_batch_bins)] for start in starts]

    def _arranged(self, window: Window) -> np.ndarray:
        """The bins of a window's global batches, one batch after the other, int64 [n]; in each the heaviest first."""
        order, balance = self.schedule.order, self.schedule.balance
        size = order.global_batch_bins
        bins = order.bins_of(window.first, window.stop)
        loads = self._loads(bins)
        random = _Random(order.fingerprint, order.seed, *window.key)
        cost = balance.costs(loads)
        shape = np.zeros(len(bins), dtype=np.int64)
        if balance.one_shape_per_batch:
            shape = np.unique(loads.bucket, return_inverse=True)[1]
        likeness = cost * (1 + balance.tolerance * random.fractions(len(bins)))
        by_likeness = np.lexsort((likeness, shape))
        batch = np.empty(len(bins), dtype=np.int64)
        batch[by_likeness] = _batches(shape[by_likeness], size, balance.group_bins or size, random)
        return bins[np.lexsort((-cost, shape, batch))]


def _batches(shape: np.ndarray, size: int, group: int, random: "_Random") -> np.ndarray:
    """The number of each bin's batch in a window, int64 [n]; batches are numbered in the order they are run.

    shape: int64 [n]; bins are sorted by shape, and by cost within each shape.
    """
    order = _in_groups(shape, group, random)
    pure, mixed = _whole_batches(shape[order], size)
    order = order[np.concatenate([pure, mixed])]
    full, short = divmod(len(order), size)
    place = np.append(np.argsort(random.fractions(full)), full)  # of each batch; the short one stays last
    batch = np.empty(len(order), dtype=np.int64)
    batch[order] = np.repeat(place, [size] * full + [short])
    return batch


def _in_groups(shape: np.ndarray, group: int, random: "_Random") -> np.ndarray:
    """The order of bins in groups of neighbours, int64 [n]: shape by shape, the groups of each shape in random order.

    When the group size does not divide the number of a shape's bins, a group at a random place in cost is short and
    comes last.
    """
    pieces = []
    borders = np.flatnonzero(np.diff(shape, prepend=-1, append=-1)).tolist()
    for start, stop in pairwise(borders):
        full, short = divmod(stop - start, group)
        sizes = np.full(full + 1, group)
        short_group = int(random.fractions(1)[0] * (full + 1))
        sizes[short_group] = short
        place = np.argsort(random.fractions(full + 1))
        place[short_group] = full + 1
        pieces.append(start + np.argsort(np.repeat(place, sizes), kind="stable"))
    return np.concatenate(pieces)


def _whole_batches(shape: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the bins that fill whole batches of one shape, and places of the leftovers of all shapes."""
    _, first, counts = np.unique(shape, return_index=True, return_counts=True)
    place_in_shape = np.arange(len(shape)) - np.repeat(first, counts)
    is_pure = place_in_shape < np.repeat(counts // size * size, counts)
    return np.flatnonzero(is_pure), np.flatnonzero(~is_pure)


class _Random:
    """A keyed stream of random numbers (SplitMix64) that never changes between versions of numpy."""

    def __init__(self, *key: Any) -> None:
        digest = hashlib.blake2b(json.dumps(["mmray balance 1", *key]).encode(), digest_size=8).digest()
        self._state = int.from_bytes(digest, "little")
        self._taken = 0

    def fractions(self, count: int) -> np.ndarray:
        """The next numbers of the stream, float64 [count], each at least 0 and below 1."""
        numbers = np.arange(self._taken + 1, self._taken + count + 1, dtype=np.uint64)
        self._taken += count
        return (mix_many(np.uint64(self._state) + numbers * _GOLDEN) >> np.uint64(11)) * 2.0**-53
