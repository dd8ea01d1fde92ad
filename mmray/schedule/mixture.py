"""Mixes several prepared datasets into one order: by weights, which may change at steps, each in epochs of its own.

Slot g of the stream of bins (step g // global_batch_bins of the mixture) belongs to a dataset by `Shares`, and is the
dataset's bin number n; that is place n % bins of its epoch n // bins, in an order that `Schedule` gives the dataset. So
each dataset is reshuffled at each pass and every one of its epochs holds each of its bins once, at whatever weights; no
batch is padded, since a mixture has no end.

Reads stay as local as those of one dataset. Of a dataset with share s, 64 · s blocks are shuffled together, rounded up:
over all datasets the 64 of one alone, and hardly more. Where the share changes, the window in progress is finished, and
the blocks behind it make windows of the new size.

A stage has weights of its own, and windows and shares begin anew with it, while the datasets go on where they are. A
run that goes on with other weights or datasets does the same: it begins another `MixedSchedule` whose `taken` says how
far each dataset is.

The bins of all datasets are counted through: bin b of a dataset is number b plus the bins of the datasets before it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate
from math import ceil
from typing import Any, Self

import numpy as np

from mmray.base.words import counted
from mmray.schedule.order import NOTHING_TAKEN, Order, Taken, Window, at_least
from mmray.schedule.schedule import DEFAULT_SHUFFLE_WINDOW, Schedule
from mmray.schedule.shares import Shares, exact_shares

WINDOW_BATCHES = 64
"""Number of global batches after which the counts of a mixture are those of its weights, to less than one bin."""
_STEPS_KEPT = 4
_ONE_BY_ONE = 16
"""Number of bins below which computing them one by one is faster than as arrays."""


@dataclass(frozen=True)
class MixedDataset:
    """One dataset of a mixture."""

    prepared: str
    """Path of the prepared dataset, for people; the fingerprint is what counts."""
    name: str
    """Name in metrics and charts."""
    fingerprint: str
    num_bins: int
    weight: float


@dataclass(frozen=True)
class WeightStage:
    """Weights, one for each dataset, up to a step."""

    until: int
    """Number of steps of the run after which the stage ends."""
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Mixture:
    """Datasets and their weights over the steps of a run."""

    datasets: tuple[MixedDataset, ...]
    stages: tuple[WeightStage, ...] = ()
    """Stages with other weights than those of the datasets, which apply after the last of them."""

    @property
    def num_bins(self) -> int:
        """Number of bins of all datasets."""
        return sum(dataset.num_bins for dataset in self.datasets)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the datasets, their shares and stages, 16 hex digits; names and paths do not count."""
        parts = [[dataset.fingerprint, dataset.num_bins] for dataset in self.datasets]
        shares = [[until, [str(share) for share in exact_shares(weights)]] for until, weights in self._weights]
        text = json.dumps(["mmray mixture 1", parts, shares])
        return f"mixture-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"

    @property
    def _weights(self) -> list[tuple[int | None, tuple[float, ...]]]:
        last = tuple(dataset.weight for dataset in self.datasets)
        return [*((stage.until, stage.weights) for stage in self.stages), (None, last)]

    def shares_from(self, step: int) -> list[tuple[int | None, tuple[Fraction, ...]]]:
        """The shares of the datasets from a step of the run on: (number of steps, shares); None for without end."""
        parts: list[tuple[int | None, tuple[Fraction, ...]]] = []
        for until, weights in self._weights:
            if until is None or until > step:
                parts.append((None if until is None else until - step, exact_shares(weights)))
                step = step if until is None else until
        return parts

    def record(self) -> dict[str, Any]:
        """The mixture as plain JSON."""
        stages = {"stages": [asdict(stage) for stage in self.stages]} if self.stages else {}
        return {"datasets": [asdict(dataset) for dataset in self.datasets]} | stages

    @classmethod
    def from_record(cls, record: Any) -> Self:
        """The mixture that `record` gave. Raises ValueError, saying what is wrong, for anything else."""
        try:
            datasets = tuple(MixedDataset(**dataset) for dataset in record["datasets"])
            stages = [WeightStage(stage["until"], tuple(stage["weights"])) for stage in record.get("stages", ())]
            mixture = cls(datasets, tuple(stages))
            mixture.shares_from(0)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no mixture: {error}") from error
        return mixture


@dataclass(frozen=True)
class MixedSchedule(Order):
    """The order of a mixture from a step of its run on.

    Raises ValueError, with the value, for counts below their least, and TypeError for a value that is no integer.
    """

    mixture: Mixture
    global_batch_bins: int
    """Bins of one optimizer step, over all ranks and micro-batches."""
    seed: int
    first_step: int = 0
    """Step of the run at which this order begins; its own steps count from 0."""
    taken: tuple[Taken, ...] = ()
    """How far the run is in each dataset before; (): none was taken."""
    window_batches: int = WINDOW_BATCHES
    """Number of global batches of a window, at whose end counts are those of the weights to less than one bin."""

    def __post_init__(self) -> None:
        least = {"global_batch_bins": 1, "seed": 0, "first_step": 0, "window_batches": 1}
        for name, minimum in least.items():
            object.__setattr__(self, name, at_least(minimum, name, getattr(self, name)))
        taken = self.taken or (NOTHING_TAKEN,) * len(self.mixture.datasets)
        if len(taken) != len(self.mixture.datasets):
            raise ValueError(f"taken has {len(taken)} places, the mixture {len(self.mixture.datasets)} datasets")
        object.__setattr__(self, "taken", taken)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _repr_html_(self) -> str:
        from mmray.display.notebook import Fact, card  # pages and their templates: only where one is shown

        shares = exact_shares([dataset.weight for dataset in self.mixture.datasets])
        facts = [
            Fact(dataset.name, f"{float(share):.2%}, {counted(dataset.num_bins, 'bin')}", float(share))
            for dataset, share in zip(self.mixture.datasets, shares)
        ]
        title = f"Mixture of {counted(len(facts), 'dataset')}, {counted(self.global_batch_bins, 'bin')} a step"
        return card(title, f"seed {self.seed}, {len(self._stages):,} stages", facts)

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Identifies datasets and weights (`Mixture.fingerprint`)."""
        return self.mixture.fingerprint

    @property
    def num_bins(self) -> int:  # type: ignore[override]
        """Number of bins of all datasets."""
        return self.mixture.num_bins

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches with as many bins as all datasets have; an epoch of none of them."""
        return -(-self.num_bins // self.global_batch_bins)

    def window(self, step: int, batches: int) -> Window:
        """The window of a step: windows begin with each stage, and its last one holds what is left over."""
        number, stage = self._stage_of(at_least(0, "step", step))
        index = (step - stage.first_step) // batches
        if stage.steps is None:
            first = stage.first_step + index * batches
            return Window(first, first + batches, (number, index))
        last = max(1, stage.steps // batches) - 1
        index = min(index, last)
        first = stage.first_step + index * batches
        stop = stage.first_step + stage.steps if index == last else first + batches
        return Window(first, stop, (number, index))

    def bins_of(self, first: int, stop: int) -> np.ndarray:
        """The bins of the steps `first` to `stop` - 1 of one stage, int64 [n], in order."""
        _, stage = self._stage_of(first)
        places = np.arange((first - stage.first_step) * self.global_batch_bins,
                           (stop - stage.first_step) * self.global_batch_bins)  # fmt: skip
        datasets, numbers = stage.shares.at(places)
        bins = np.empty(len(places), dtype=np.int64)
        for dataset in np.unique(datasets).tolist():
            chosen = datasets == dataset
            order = stage.orders[dataset]
            start = order.begun.bins + int(numbers[chosen][0])
            bins[chosen] = self._first_bins[dataset] + _bins_from(order, start, int(chosen.sum()))
        return bins

    def slots(self, step: int, slots: range) -> list[int | None]:
        """The bins in some slots of a global batch; None past its end."""
        bins = self._bins_of_step(step)
        return [bins[slot] if slot < len(bins) else None for slot in slots]

    def taken_at(self, step: int) -> dict[str, Taken]:
        """How far the run is in each dataset before a step, by its fingerprint."""
        _, stage = self._stage_of(at_least(0, "step", step))
        places = stage.taken_after((step - stage.first_step) * self.global_batch_bins)
        return dict(zip((dataset.fingerprint for dataset in self.mixture.datasets), places))

    def place_of(self, dataset: int, number: int) -> tuple[int, int]:
        """The step, and the slot in it, that holds bin number `number` of a dataset, counted over all its epochs.

        The inverse of `bins`. Raises IndexError where this order does not hold it.
        """
        for stage in self._stages:
            rank = number - stage.orders[dataset].begun.bins
            if rank < 0:
                break
            try:
                step, slot = divmod(stage.shares.slot_of(dataset, rank), self.global_batch_bins)
            except IndexError:
                continue
            return stage.first_step + step, slot
        raise IndexError(f"bin number {number} of dataset {dataset} is not in this order")

    @cached_property
    def _bins_of_step(self) -> Any:
        return lru_cache(maxsize=_STEPS_KEPT)(lambda step: self.bins_of(step, step + 1).tolist())

    @cached_property
    def _first_bins(self) -> list[int]:
        """The number of each dataset's first bin."""
        return [0, *accumulate(dataset.num_bins for dataset in self.mixture.datasets)]

    @cached_property
    def _stages(self) -> list["_Stage"]:
        stages, first_step, taken = [], 0, self.taken
        window = self.window_batches * self.global_batch_bins
        for steps, shares in self.mixture.shares_from(self.first_step):
            slots = None if steps is None else steps * self.global_batch_bins
            orders = tuple(map(self._order, self.mixture.datasets, shares, taken))
            stage = _Stage(first_step, steps, Shares(shares, window, slots), orders)
            stages.append(stage)
            if steps is not None and slots is not None:
                first_step += steps
                taken = stage.taken_after(slots)
        return stages

    def _order(self, dataset: MixedDataset, share: Fraction, taken: Taken) -> Schedule:
        """The order of a dataset at a share, from a place on."""
        order = Schedule(dataset.num_bins, self.global_batch_bins, self.seed, dataset.fingerprint, begun=taken)
        return replace(order, shuffle_window=max(1, ceil(share * DEFAULT_SHUFFLE_WINDOW)))

    def _stage_of(self, step: int) -> tuple[int, "_Stage"]:
        number = max(index for index, stage in enumerate(self._stages) if stage.first_step <= step)
        return number, self._stages[number]


@dataclass(frozen=True)
class _Stage:
    """A stage as steps of the order: its first step, number of steps (None: no end), shares, and the order of each
    dataset, from the place on at which the stage takes it up."""

    first_step: int
    steps: int | None
    shares: Shares
    orders: tuple[Schedule, ...]

    def taken_after(self, slots: int) -> tuple[Taken, ...]:
        """How far each dataset is after some slots of the stage."""
        counts = self.shares.counts(slots)
        return tuple(order.place(order.begun.bins + count) for order, count in zip(self.orders, counts))


def _bins_from(order: Schedule, start: int, count: int) -> np.ndarray:
    """The bins of a dataset from number `start` of its stream on, int64 [count]."""
    parts = []
    if count < _ONE_BY_ONE:
        places = (divmod(number, order.num_bins) for number in range(start, start + count))
        return np.asarray([order.bin_at(epoch, place) for epoch, place in places], dtype=np.int64)
    while count:
        epoch, place = divmod(start, order.num_bins)
        length = min(count, order.num_bins - place)
        parts.append(order.bins_in(epoch, place, place + length))
        start, count = start + length, count - length
    return np.concatenate(parts)


def mixture_differences(old: Mixture, new: Mixture) -> list[str]:
    """Lines that say in which datasets, shares and stages two mixtures differ, for a person."""
    lines = []
    shares = [exact_shares([dataset.weight for dataset in mixture.datasets]) for mixture in (old, new)]
    before, after = (
        {dataset.fingerprint: (dataset, share) for dataset, share in zip(mixture.datasets, of_mixture)}
        for mixture, of_mixture in zip((old, new), shares)
    )
    for fingerprint, (dataset, share) in before.items():
        if fingerprint not in after:
            lines.append(f"{dataset.name} ({dataset.prepared}) leaves, its share was {float(share):.4%}")
        elif share != after[fingerprint][1]:
            lines.append(f"{dataset.name}: share {float(share):.4%} -> {float(after[fingerprint][1]):.4%}")
    for fingerprint, (dataset, share) in after.items():
        if fingerprint not in before:
            lines.append(f"{dataset.name} ({dataset.prepared}) joins with a share of {float(share):.4%}")
    if old.stages != new.stages:
        stages = [[[stage.until, list(stage.weights)] for stage in mixture.stages] for mixture in (old, new)]
        lines.append(f"stages: {stages[0]} -> {stages[1]}")
    return lines or ["the datasets stand in another order"]


def shares_at(record: Mapping[str, Any], steps: Sequence[int]) -> np.ndarray:
    """The share asked for of each dataset in some steps of a run, counted from 1, float64 [steps, datasets].

    record: as `Mixture.record` gave it.
    """
    mixture = Mixture.from_record(record)
    borders = [stage.until for stage in mixture.stages]
    shares = np.asarray([[float(share) for share in part] for _, part in mixture.shares_from(0)])
    return shares[np.searchsorted(borders, np.asarray(steps, dtype=np.int64), side="left")]
