"""The protocol of an order: what the rest of mmray asks of a schedule, of one dataset as of a mixture."""

import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Window:
    """Consecutive steps whose bins may be rearranged among them.

    first: the first step; stop: the step after the last; key: tells the window from all others of its order.
    """

    first: int
    stop: int
    key: tuple[int, int]


@dataclass(frozen=True)
class Taken:
    """How far a run is in a dataset."""

    bins: int = 0
    """Number of its bins that were taken, over all its epochs."""
    first_block: int = 0
    """In the epoch's order of blocks, the first block of the window in progress."""
    window: int = 0
    """Number of blocks of this window; 0: none is in progress, and the next one begins at `first_block`."""


NOTHING_TAKEN = Taken()


class Order(ABC):
    """A pure function of the step: the bins of each global batch, and how they are dealt to ranks.

    Bins are numbers from 0 to num_bins - 1; those of several datasets are counted through, one dataset after another.
    Steps count from 0 at the order's own beginning.
    """

    fingerprint: str
    seed: int
    num_bins: int
    global_batch_bins: int

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Number of global batches in which as many bins are trained on as there are."""

    @abstractmethod
    def window(self, step: int, batches: int) -> Window:
        """The window of about `batches` global batches that holds a step."""

    @abstractmethod
    def bins_of(self, first: int, stop: int) -> np.ndarray:
        """The bins of the steps `first` to `stop` - 1 of one window, int64 [n], in order and without padding."""

    @abstractmethod
    def taken_at(self, step: int) -> dict[str, Taken]:
        """How far each dataset is before a step, by its fingerprint."""

    @abstractmethod
    def slots(self, step: int, slots: range) -> list[int | None]:
        """The bins in some slots of a global batch; None past its end, and where the batch is padded."""

    def bins(self, step: int) -> list[int | None]:
        """The bin numbers of global batch `step`, `global_batch_bins` long; None is an empty padding bin.

        Padding is at the end of an epoch's last global batch and nowhere else.
        """
        return self.slots(step, range(self.global_batch_bins))

    def micro_batches_per_rank(self, world_size: int, micro_batch_bins: int = 1) -> int:
        """Number of micro-batches that each rank runs in a step (gradient accumulation); equal for all ranks."""
        share = at_least(1, "world_size", world_size) * at_least(1, "micro_batch_bins", micro_batch_bins)
        return -(-self.global_batch_bins // share)

    def rank_bins(self, step: int, rank: int, world_size: int, micro_batch_bins: int = 1) -> list[list[int | None]]:
        """The micro-batches of one rank in global batch `step`, in the order it runs them.

        Bins are dealt alike for any world size: slot s of bins(step) goes to micro-batch s // (world_size * m) of
        rank (s // m) % world_size, at place s % m, where m is micro_batch_bins. So reading micro-batch 0 of
        ranks 0, 1, 2, ..., then micro-batch 1 of all ranks, and so on, gives bins(step), followed only by
        padding where the global batch does not divide evenly. Every rank gets micro_batches_per_rank(...)
        lists of m entries; a list may be all padding.

        Returns ceil(global_batch_bins / (world_size * m)) lists of m bin numbers or None. Computes this
        rank's bins alone, so that a rank of 4,096 pays for its own share. Raises ValueError for a rank out of
        range.
        """
        num_micro_batches = self.micro_batches_per_rank(world_size, micro_batch_bins)
        if not 0 <= operator.index(rank) < world_size:
            raise ValueError(f"rank must be from 0 to {world_size - 1} (world_size - 1), got {rank}")
        starts = ((k * world_size + rank) * micro_batch_bins for k in range(num_micro_batches))
        return [self.slots(step, range(start, start + micro_batch_bins)) for start in starts]


def at_least(minimum: int, name: str, value: Any) -> int:
    """`value` as an int. Raises TypeError if it is no integer, ValueError, quoting it, if it is too small."""
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)
