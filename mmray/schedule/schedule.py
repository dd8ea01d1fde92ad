"""Computes the training order: which bins make up each global batch, as a pure function of the step.

Promise: the order depends on (fingerprint, seed, epoch) and on nothing else that changes between runs: not on
the number of ranks, not on where a run was interrupted, not on the machine. Every epoch holds every bin
exactly once; its last global batch is padded with None, nothing is dropped. Building a schedule and seeking
to any step cost microseconds and constant memory, for thirty bins as for 10^9.

Why not shuffle an array of indices: 10^9 bins are 8 GB and minutes of work, in every process that asks, to
learn one step. Here a keyed permutation (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002)
computes any single element: an index is written as two digits of about sqrt(n), eight Feistel rounds add to
each digit a keyed hash of the other, and the few results at or above n are sent round again ("cycle walking";
the digits' product exceeds n by less than about sqrt(n), so it is rare). Given up for it: about 10 µs a bin
in plain Python, 0.6 ms for a global batch of 64 bins; a rank computes its own share alone. Ranges of places are
computed with numpy, at about 0.1 µs a bin.

Reads stay local. The prepared bins are taken in blocks of `shuffle_block` neighbours (about one file). The
blocks are put in random order, and each `shuffle_window` consecutive blocks are shuffled as one. With the
defaults, 64 blocks of 1,024, a data set of up to 65,536 bins is shuffled whole, and a larger one mixes 64
random places at a time. Measured on 10^6 bins, 1,000 steps of 64 bins: 64 distinct blocks are read (128 where
a window ends between) against 977, that is all of them, in a shuffle of single bins.

Order is a compatibility promise: a checkpoint's cursor is one integer whose meaning is this order. It must
never change between versions for the same arguments; tests/mmray/schedule/test_schedule.py pins it. Another order needs
a new class or a new argument, never an edit here.
"""

import hashlib
import json
import operator
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

import numpy as np

from mmray.base.words import counted
from mmray.schedule.order import NOTHING_TAKEN, Order, Taken, Window, at_least

_MASK_64 = (1 << 64) - 1
_ROUNDS = 8  # two passes of Luby and Rackoff's four; eight 64-bit keys are one full blake2b digest
_SPLITMIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))

DEFAULT_SHUFFLE_BLOCK = 1024
DEFAULT_SHUFFLE_WINDOW = 64


@dataclass(frozen=True)
class Schedule(Order):
    """The order of a prepared data set's bins over all epochs.

    >>> schedule = Schedule(num_bins=10, global_batch_bins=4, seed=0, fingerprint="3f2a")
    >>> schedule.steps_per_epoch
    3
    >>> len(schedule.bins(step=2)), schedule.bins(step=2).count(None)
    (4, 2)

    Raises ValueError, with the value, for a count below 1 or a seed below 0, and TypeError for a value that
    is no integer.
    """

    num_bins: int
    """Bins of the prepared data set; bin numbers are 0 to num_bins - 1."""
    global_batch_bins: int
    """Bins of one optimizer step, over all ranks and micro-batches."""
    seed: int
    """Any integer from 0; another seed is another order."""
    fingerprint: str
    """The prepared data set's fingerprint; another data set is another order."""
    shuffle: bool = True
    """False: bins in the order they were prepared, in every epoch."""
    shuffle_block: int = DEFAULT_SHUFFLE_BLOCK
    """Neighbouring bins that stay near each other in time, so that reads stay local: about one file's."""
    shuffle_window: int = DEFAULT_SHUFFLE_WINDOW
    """Number of blocks, from random places of the data set, that are shuffled together."""
    begun: Taken = NOTHING_TAKEN
    """Place from which a mixture takes up the data set. A window that was begun with another `shuffle_window` is
    finished as it is. The order of the same epoch before this place is not known."""

    def __post_init__(self) -> None:
        least = {"num_bins": 1, "global_batch_bins": 1, "seed": 0, "shuffle_block": 1, "shuffle_window": 1}
        for name, minimum in least.items():
            value = at_least(minimum, name, getattr(self, name))
            object.__setattr__(self, name, value)  # a numpy integer becomes an int: keys are derived from it

    def _repr_html_(self) -> str:
        from mmray.display.notebook import Fact, card  # pages and their templates: only where one is shown

        order = "in random order" if self.shuffle else "in the order they were prepared"
        slots = range(min(self.global_batch_bins, 12))
        more = ", …" if self.global_batch_bins > len(slots) else ""

        def bins(step: int) -> str:
            return ", ".join("empty" if number is None else f"{number:,}" for number in self.slots(step, slots)) + more

        return card(
            f"Schedule: {counted(self.steps_per_epoch, 'step')} an epoch",
            f"data {self.fingerprint}, seed {self.seed}",
            [
                Fact("bins", f"{self.num_bins:,}, {order}, {self.global_batch_bins:,} a step"),
                *(Fact(f"step {step}", bins(step)) for step in range(min(3, self.steps_per_epoch))),
            ],
        )

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in an epoch, the padded one included."""
        return -(-self.num_bins // self.global_batch_bins)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, step in epoch), both from 0, of global batch `step`, which counts from 0 over the run."""
        return divmod(at_least(0, "step", step), self.steps_per_epoch)

    def bin_at(self, epoch: int, index: int) -> int:
        """The bin at place `index` (0 to num_bins - 1) of `epoch`'s order; over all places every bin once."""
        epoch, index = at_least(0, "epoch", epoch), operator.index(index)
        if not 0 <= index < self.num_bins:
            raise ValueError(f"index must be from 0 to {self.num_bins - 1} (num_bins - 1), got {index}")
        return self._order(epoch).bin_at(index) if self.shuffle else index

    def bins_in(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The bins at places `start` to `stop` - 1 of `epoch`'s order, int64 [n]: `bin_at` for many places at once."""
        epoch, start, stop = at_least(0, "epoch", epoch), operator.index(start), operator.index(stop)
        if not 0 <= start <= stop <= self.num_bins:
            raise ValueError(f"start and stop must lie in order from 0 to {self.num_bins}, got {start} and {stop}")
        return self._order(epoch).bins_in(start, stop) if self.shuffle else np.arange(start, stop, dtype=np.int64)

    def window(self, step: int, batches: int) -> Window:
        """The window of a step. Windows divide the epoch evenly, so that none is much smaller than the others."""
        epoch, batch = self.position(step)
        num_windows = max(1, self.steps_per_epoch // batches)
        window = ((batch + 1) * num_windows - 1) // self.steps_per_epoch
        first, stop = (number * self.steps_per_epoch // num_windows for number in (window, window + 1))
        return Window(step - batch + first, step - batch + stop, (epoch, window))

    def bins_of(self, first: int, stop: int) -> np.ndarray:
        """The bins of the steps `first` to `stop` - 1 of one epoch, int64 [n], in order and without padding."""
        epoch, batch = self.position(first)
        end = min((batch + stop - first) * self.global_batch_bins, self.num_bins)
        return self.bins_in(epoch, batch * self.global_batch_bins, end)

    def taken_at(self, step: int) -> dict[str, Taken]:
        """How far the dataset is before a step, by its fingerprint."""
        epoch, batch = self.position(step)
        return {
            self.fingerprint: self.place(epoch * self.num_bins + min(batch * self.global_batch_bins, self.num_bins))
        }

    def place(self, bins: int) -> Taken:
        """The place behind a number of bins, counted over all epochs."""
        epoch, index = divmod(bins, self.num_bins)
        return Taken(bins, *self._order(epoch).window_begun(index)) if index and self.shuffle else Taken(bins)

    def slots(self, step: int, slots: range) -> list[int | None]:
        """The bins in some slots of a global batch; None past its end and past the epoch's."""
        epoch, step_in_epoch = self.position(step)
        start = step_in_epoch * self.global_batch_bins
        end = min(start + self.global_batch_bins, self.num_bins)
        places = (start + slot for slot in slots)
        if not self.shuffle:
            return [place if place < end else None for place in places]
        order = self._order(epoch)
        return [order.bin_at(place) if place < end else None for place in places]

    def _order(self, epoch: int) -> "_EpochOrder":
        is_begun = epoch == self.begun.bins // self.num_bins
        begun = (self.begun.first_block, self.begun.window) if is_begun else (0, 0)
        sizes = self.num_bins, self.shuffle_block, self.shuffle_window
        return _epoch_order(*sizes, begun, self.fingerprint, self.seed, epoch)


@dataclass(frozen=True)
class _EpochOrder:
    """The block shuffle of one epoch: maps a place in the order to a bin number.

    A window is consecutive blocks of the order of blocks. It is written as (first block, number of blocks); the last
    window of an epoch may lack some of these.
    """

    num_bins: int
    block: int  # bins
    window: int  # blocks
    begun: tuple[int, int]  # a window from which on the others follow
    key: tuple[str, int, int]  # fingerprint, seed, epoch
    blocks: "_Permutation"  # place in the order of blocks -> block number
    short_place: int  # where the last block, the only one that may be short, stands in the order of blocks

    def bin_at(self, place: int) -> int:
        start, _, mixed = self._mixed(place)
        place = start + mixed[place - start]
        block_place = self._block_place(place)
        return self.blocks[block_place] * self.block + place - self._block_start(block_place)

    def bins_in(self, first: int, stop: int) -> np.ndarray:
        """The bins at places `first` to `stop` - 1, int64 [n]."""
        pieces = [np.zeros(0, dtype=np.int64)]
        while first < stop:
            start, end, mixed = self._mixed(first)
            pieces.append(start + mixed.many(np.arange(first - start, min(stop, end) - start)))
            first = min(stop, end)
        places = np.concatenate(pieces)
        missing = self.blocks.size * self.block - self.num_bins
        block_places = places // self.block
        after = (block_places >= self.short_place) & (places >= (block_places + 1) * self.block - missing)
        block_places += after
        starts = block_places * self.block - np.where(block_places > self.short_place, missing, 0)
        distinct, which = np.unique(block_places, return_inverse=True)
        return self.blocks.many(distinct)[which] * self.block + places - starts

    def window_begun(self, place: int) -> tuple[int, int]:
        """The window that is in progress before a place; where none is, that of no blocks before the next one."""
        first, blocks = self._window(place)
        return first, 0 if self._block_start(first) == place else blocks

    def _mixed(self, place: int) -> tuple[int, int, "_Permutation"]:
        """The window of a place: its first place, the place behind its last one, and the order of its bins."""
        first, blocks = self._window(place)
        start, end = self._block_start(first), self._block_start(min(first + blocks, self.blocks.size))
        # Windows of one size begin at least that size apart, so that these numbers tell them from one another.
        return start, end, _permutation(end - start, *self.key, "window", first // blocks)

    def _window(self, place: int) -> tuple[int, int]:
        block_place, begun_stop = self._block_place(place), sum(self.begun)
        if block_place < begun_stop:
            return self.begun
        return begun_stop + (block_place - begun_stop) // self.window * self.window, self.window

    def _block_place(self, place: int) -> int:
        """The place, in the order of blocks, of the block that holds a place."""
        block_place = place // self.block
        is_later = place >= self._block_start(block_place + 1)  # the short block came earlier
        return block_place + is_later

    def _block_start(self, block_place: int) -> int:
        """The first place of a block's bins. block_place: place of the block in the order of blocks."""
        missing = self.blocks.size * self.block - self.num_bins  # what the short block lacks
        return block_place * self.block - (missing if block_place > self.short_place else 0)


@lru_cache(maxsize=16)
def _epoch_order(
    num_bins: int, block: int, window: int, begun: tuple[int, int], fingerprint: str, seed: int, epoch: int
) -> _EpochOrder:
    num_blocks = -(-num_bins // block)
    blocks = _permutation(num_blocks, fingerprint, seed, epoch, "blocks", 0)
    short_place = blocks.place_of(num_blocks - 1)
    return _EpochOrder(num_bins, block, window, begun, (fingerprint, seed, epoch), blocks, short_place)


@dataclass(frozen=True)
class _Permutation:
    """A keyed permutation of range(size), computed element by element; see the module docstring.

    An index x is the pair (x // columns, x % columns); rows * columns is at least size and less than size +
    rows.
    """

    size: int
    rows: int
    columns: int
    keys: tuple[int, ...]  # _ROUNDS of 64 bits

    def __getitem__(self, index: int) -> int:
        while True:
            row, column = divmod(index, self.columns)
            for i in range(0, _ROUNDS, 2):
                row = (row + _mix(column ^ self.keys[i])) % self.rows
                column = (column + _mix(row ^ self.keys[i + 1])) % self.columns
            index = row * self.columns + column
            if index < self.size:
                return index

    def many(self, indices: np.ndarray) -> np.ndarray:
        """Permute many indices, int64 [n]; for sizes below 2^62."""
        values = np.asarray(indices, dtype=np.uint64)
        left = np.arange(len(values))
        rows, columns = np.uint64(self.rows), np.uint64(self.columns)
        while len(left):
            row, column = np.divmod(values[left], columns)
            for i in range(0, _ROUNDS, 2):
                row = (row + mix_many(column ^ np.uint64(self.keys[i])) % rows) % rows
                column = (column + mix_many(row ^ np.uint64(self.keys[i + 1])) % columns) % columns
            values[left] = row * columns + column
            left = left[values[left] >= self.size]
        return values.astype(np.int64)

    def place_of(self, value: int) -> int:
        """The index that is mapped to `value`."""
        while True:
            row, column = divmod(value, self.columns)
            for i in range(_ROUNDS - 2, -1, -2):
                column = (column - _mix(row ^ self.keys[i + 1])) % self.columns
                row = (row - _mix(column ^ self.keys[i])) % self.rows
            value = row * self.columns + column
            if value < self.size:
                return value


@lru_cache(maxsize=256)
def _permutation(size: int, fingerprint: str, seed: int, epoch: int, purpose: str, number: int) -> _Permutation:
    """The permutation of range(size) that belongs to this key; `purpose` and `number` part one epoch's."""
    key = json.dumps(["mmray schedule 1", fingerprint, seed, epoch, purpose, number])
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    keys = tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))
    rows = isqrt(size - 1) + 1
    return _Permutation(size, rows, -(-size // rows), keys)


def _mix(value: int) -> int:
    """Mix 64 bits: the finalizer of SplitMix64 (Steele, Lea, Flood 2014; constants by Stafford)."""
    for shift, factor in _SPLITMIX:
        value = ((value ^ (value >> shift)) * factor) & _MASK_64
    return value ^ (value >> 31)


def mix_many(values: np.ndarray) -> np.ndarray:
    """Mix the 64 bits of each element of an array, uint64 [n]."""
    for shift, factor in _SPLITMIX:
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))
