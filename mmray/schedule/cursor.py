"""Records the place of a run: the number of global batches consumed, and the order that this number refers to.

Promise: a cursor that passes `check` continues with exactly the global batches not yet consumed, in the same
order, whatever the number of workers, with nothing replayed. The schedule is a pure function of the step, so
nothing else needs saving; the other fields serve to refuse a cursor of another order. A cursor file exists whole
or not at all.

A run may continue on other data (`continue_on`). Its count of steps goes on, and the schedule of the new data begins at
the step of the change. The cursor keeps a list of all data so far, which says what any step was trained on. Of a
mixture it keeps datasets and weights too, and `taken_now` says how far each dataset is: that follows from the step
alone, and a mixture takes up each dataset where the run left it.
"""

import json
import operator
import os
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from mmray.errors import UserError
from mmray.schedule.balance import BalanceSettings
from mmray.schedule.balanced import BalancedSchedule
from mmray.schedule.mixture import WINDOW_BATCHES, MixedDataset, MixedSchedule, Mixture
from mmray.schedule.order import Order, Taken
from mmray.schedule.schedule import DEFAULT_SHUFFLE_BLOCK, DEFAULT_SHUFFLE_WINDOW, Schedule
from mmray.storage import replacing

FORMAT, MIXTURE_FORMAT = 2, 3
"""Version of the format, and of cursors of runs that trained on a mixture, which earlier versions cannot read."""


@dataclass(frozen=True)
class DataSpan:
    """Consecutive steps of a run on one prepared data set or mixture, up to the beginning of the next span."""

    first_step: int
    """Global batches that the run had consumed when the span began."""
    fingerprint: str
    num_bins: int
    prepared: str
    """Path of the prepared data set; "" when it is not known."""
    mixture: Mixture | None = None
    """Datasets and weights of a mixture; None for one data set."""
    taken: tuple[Taken, ...] = ()
    """How far the run was in each dataset of the mixture before the span."""


@dataclass(frozen=True)
class Cursor:
    """A place in a schedule: `Cursor.at(schedule)` is its beginning, `cursor.step` the next step to run."""

    step: int
    """Global batches consumed since the run began, over all epochs."""
    fingerprint: str
    """Fingerprint of the prepared data set."""
    seed: int
    global_batch_bins: int
    num_bins: int
    shuffle: bool = True
    shuffle_block: int = DEFAULT_SHUFFLE_BLOCK
    shuffle_window: int = DEFAULT_SHUFFLE_WINDOW
    balance: dict[str, Any] | None = None
    """The job's `balance` settings, with whole_row_attention decided, when they choose the bins of a global batch
    (`balance.across_batches`); None: the bins of a batch are those of the shuffled order."""
    prepared: str = ""
    """Path of the prepared data set, for people; the fingerprint is what counts."""
    first_step: int = 0
    """Global batches that were consumed before the first one of this data set."""
    earlier: tuple[DataSpan, ...] = ()
    """The data sets before this one."""
    mixture: Mixture | None = None
    """Datasets and weights of a mixture; None for one data set."""
    taken: tuple[Taken, ...] = ()
    """How far the run was in each dataset of the mixture before its first step."""

    @classmethod
    def at(cls, schedule: Order | BalancedSchedule, step: int = 0, *, prepared: str = "") -> Self:
        """The cursor of a run over `schedule` that has consumed `step` global batches.

        prepared: path of the prepared data set.
        """
        balance = schedule.balance.order_record() if isinstance(schedule, BalancedSchedule) else None
        order = schedule.order if isinstance(schedule, BalancedSchedule) else schedule
        names = (field.name for field in fields(cls) if field.name != "first_step" and hasattr(order, field.name))
        values = {name: getattr(order, name) for name in names}
        return cls(step=step, balance=balance, prepared=prepared, **values)

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", operator.index(self.step))
        if self.step < 0:
            raise ValueError(f"step must be at least 0, got {self.step}")
        starts = [span.first_step for span in self.spans]
        if starts[0] != 0 or starts != sorted(set(starts)) or self.step < starts[-1]:
            raise ValueError(f"step {self.step} and data sets that begin at steps {starts} do not fit together")

    @property
    def spans(self) -> tuple[DataSpan, ...]:
        """All data of the run so far, in order; the last span is the current one."""
        current = (self.first_step, self.fingerprint, self.num_bins, self.prepared, self.mixture, self.taken)
        return *self.earlier, DataSpan(*current)

    @property
    def _datasets(self) -> tuple[MixedDataset, ...]:
        return () if self.mixture is None else self.mixture.datasets

    def order_of(self, span: DataSpan) -> Order:
        """The order of the bins of one of the spans; its step 0 is the span's first."""
        if span.mixture is None:
            shuffling = self.shuffle, self.shuffle_block, self.shuffle_window
            return Schedule(span.num_bins, self.global_batch_bins, self.seed, span.fingerprint, *shuffling)
        batches = WINDOW_BATCHES if self.balance is None else self.balance["window_batches"]
        return MixedSchedule(span.mixture, self.global_batch_bins, self.seed, span.first_step, span.taken, batches)

    def taken_before(self) -> dict[str, Taken]:
        """How far the run was in each dataset of the mixture, by its fingerprint, before its first step."""
        return dict(zip((dataset.fingerprint for dataset in self._datasets), self.taken))

    def taken_now(self) -> dict[str, Taken]:
        """How far the run is in each of its datasets, by their fingerprints; in one that it left, how far it was."""
        taken: dict[str, Taken] = {}
        stops = [*(span.first_step for span in self.spans[1:]), self.step]
        for span, stop in zip(self.spans, stops):
            order, steps = self.order_of(span), stop - span.first_step
            taken |= (order if self.balance is None else self._sorted(order)).taken_at(steps)
        return taken

    def skipped_bins(self) -> int:
        """Number of bins that the change to the current data skips in their epochs.

        With sorting across batches, those left in the window of the earlier data; a mixture that takes up its datasets
        begins behind them.
        """
        if self.balance is None or self.mixture is None or not self.earlier:
            return 0
        steps = self.first_step - self.earlier[-1].first_step
        order = self.order_of(self.earlier[-1])
        counted = [counting.taken_at(steps) for counting in (self._sorted(order), order)]
        with_window, trained = (sum(place.bins for place in places.values()) for places in counted)
        return with_window - trained

    def _sorted(self, order: Order) -> BalancedSchedule:
        """An order with the cursor's sorting across batches."""
        return BalancedSchedule(order, BalanceSettings(**(self.balance or {}), across_batches=True))

    def advance(self, steps: int = 1) -> Self:
        """The cursor after `steps` more global batches."""
        return replace(self, step=self.step + steps)

    def continue_on(self, schedule: Order | BalancedSchedule, prepared: str) -> Self:
        """The cursor of the same run at the beginning of other data.

        schedule: the order of the new data; prepared: path of the new data.
        """
        start = type(self).at(schedule, self.step, prepared=prepared)
        spans = self.spans if self.step > self.first_step else self.earlier  # none on which no step was trained
        return replace(start, first_step=self.step, earlier=spans)

    def check(self, schedule: Order | BalancedSchedule) -> None:
        """Raise UserError, naming both values and the remedy, when the cursor belongs to another order."""
        job = Cursor.at(schedule)
        for name, remedy in _DATA_REMEDIES.items():
            self._compare(name, getattr(self, name), getattr(job, name), remedy)
        self.check_order(schedule)

    def check_order(self, schedule: Order | BalancedSchedule) -> None:
        """Raise UserError, as `check` does, when the settings of the order differ; the data may differ."""
        job = Cursor.at(schedule)
        for name, remedy in _ORDER_REMEDIES.items():
            self._compare(name, getattr(self, name), getattr(job, name), remedy)
        states = [cursor.balance is not None for cursor in (self, job)]
        remedy = f"set balance.across_batches to {json.dumps(states[0])} in the job file"
        self._compare("balance.across_batches", states[0], states[1], remedy)
        saved, job_balance = self.balance or {}, job.balance or {}
        for name in sorted(saved.keys() | job_balance.keys()):
            remedy = f"set balance.{name} to {json.dumps(saved.get(name))} in the job file"
            self._compare(f"balance.{name}", saved.get(name), job_balance.get(name), remedy)

    def _compare(self, name: str, saved: Any, job_value: Any, remedy: str) -> None:
        if saved != job_value:
            raise UserError(
                f"the checkpoint stands at step {self.step} of another order: its {name} is {saved!r}, "
                f"this job's is {job_value!r}; {remedy}, or start from step 0 in a new output folder"
            )

    def to_json(self) -> str:
        """The cursor as one JSON object, with the version of its format.

        Of a mixture it also tells, for people, the epochs and the bins of each dataset that are done.
        """
        mixtures = [span.mixture for span in self.spans if span.mixture]
        saved = _plain(self) | {"earlier": [_plain(span) for span in self.earlier]}
        progress = {"progress": self._progress()} if self.mixture else {}
        return json.dumps({"format": MIXTURE_FORMAT if mixtures else FORMAT, **saved, **progress}, indent=1) + "\n"

    def _progress(self) -> dict[str, dict[str, int]]:
        taken, progress = self.taken_now(), {}
        for dataset in self._datasets:
            epochs, bins = divmod(taken[dataset.fingerprint].bins, dataset.num_bins)
            progress[dataset.name] = {"epochs": epochs, "bins": bins, "of": dataset.num_bins}
        return progress

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the cursor that `to_json` wrote. Raises ValueError, saying what is wrong, for anything else."""
        saved = json.loads(text)
        version = saved.pop("format", None) if isinstance(saved, dict) else None
        if version not in (1, FORMAT, MIXTURE_FORMAT):
            raise ValueError(f'no object with "format": {FORMAT}')
        saved.pop("progress", None)
        if version == 1:  # had one data set only, and at first no balance
            saved = {"balance": None, "prepared": "", "first_step": 0, "earlier": []} | saved
        earlier = saved.get("earlier")
        if not isinstance(earlier, list):
            raise ValueError(f"earlier is {earlier!r}")
        saved["earlier"] = tuple(_checked(DataSpan, span) for span in earlier)
        return _checked(cls, saved)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the cursor's file, whole or not at all.

        Raises OSError if the folder does not exist or cannot be written; an older file then stays as it was.
        """
        with replacing(Path(path)) as beside:
            beside.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read the cursor in a file. Raises UserError, naming the file, when it is missing or not a cursor."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such cursor file; resume from a complete checkpoint") from None
        except ValueError as error:
            raise UserError(f"{path} is no cursor of this version ({error}); resume from another checkpoint") from error


Saved = TypeVar("Saved")
_KINDS: dict[str, Any] = {"balance": dict | None, "earlier": tuple, "taken": tuple}


def _plain(span: "Cursor | DataSpan") -> dict[str, Any]:
    """The fields as plain values; those of mixtures only where there is one."""
    values = {field.name: getattr(span, field.name) for field in fields(span)}
    mixture, taken = values.pop("mixture"), values.pop("taken")
    return (
        values
        if mixture is None
        else values | {"mixture": mixture.record(), "taken": [list(astuple(place)) for place in taken]}
    )


def _checked(kind: type[Saved], values: Any) -> Saved:
    """Make a dataclass from plain values. Raises ValueError when one is missing, unknown or of another type."""
    types = {field.name: field.type for field in fields(kind)}  # type: ignore[arg-type]
    if isinstance(values, dict):
        mixture, taken = values.get("mixture"), values.get("taken", [])
        try:
            places = tuple(Taken(*map(operator.index, place)) for place in taken)
        except TypeError:
            raise ValueError(f"taken is {taken!r}") from None
        read = None if mixture is None else Mixture.from_record(mixture)
        values = values | {"mixture": read, "taken": places}
    if not isinstance(values, dict) or values.keys() != types.keys():
        keys = sorted(values) if isinstance(values, dict) else values
        raise ValueError(f"keys {keys}, expected {sorted(types)}")
    for name, value in values.items():
        expected = _KINDS.get(name, types[name])
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            raise ValueError(f"{name} is {value!r}")
    return kind(**values)


# What the meaning of a step depends on, in the order in which differences are reported.
_DATA_REMEDIES = {
    "fingerprint": "point the job at the prepared data set the checkpoint was trained on",
    "num_bins": "restore the prepared data set, which has other bins under the same fingerprint",
}
_ORDER_REMEDIES = {
    name: f"put {name} back to the value of the run that wrote the checkpoint"
    for name in ("seed", "global_batch_bins", "shuffle", "shuffle_block", "shuffle_window")
}
