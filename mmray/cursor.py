"""Where a run stands: one integer, the number of global batches consumed, and what that integer refers to.

Promise: a cursor that passes `check` continues with exactly the global batches not yet consumed, in the same
order, whatever the number of workers, with nothing replayed. The schedule is a pure function of the step, so
nothing else needs saving; the other fields are there to refuse a cursor that would mean another order. A
cursor file exists whole or not at all.
"""

import json
import operator
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from mmray.balanced_schedule import BalancedSchedule
from mmray.errors import UserError
from mmray.schedule import DEFAULT_SHUFFLE_BLOCK, DEFAULT_SHUFFLE_WINDOW, Schedule

FORMAT = 1


@dataclass(frozen=True)
class Cursor:
    """A place in a schedule: `Cursor.at(schedule)` is its beginning, `cursor.step` the next step to run."""

    step: int
    """Global batches consumed since the run began, over all epochs."""
    fingerprint: str
    """Of the prepared data set."""
    seed: int
    global_batch_bins: int
    num_bins: int
    shuffle: bool = True
    shuffle_block: int = DEFAULT_SHUFFLE_BLOCK
    shuffle_window: int = DEFAULT_SHUFFLE_WINDOW
    balance: dict[str, Any] | None = None
    """The job's `balance` settings, whole_row_attention decided; None: an order that is not balanced."""

    @classmethod
    def at(cls, schedule: Schedule | BalancedSchedule, step: int = 0) -> Self:
        """The cursor of a run over `schedule` that has consumed `step` global batches."""
        balance = schedule.balance.model_dump() if isinstance(schedule, BalancedSchedule) else None
        order = schedule.order if isinstance(schedule, BalancedSchedule) else schedule
        names = (field.name for field in fields(cls) if field.name not in ("step", "balance"))
        return cls(step=step, balance=balance, **{name: getattr(order, name) for name in names})

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", operator.index(self.step))
        if self.step < 0:
            raise ValueError(f"step must be at least 0, got {self.step}")

    def advance(self, steps: int = 1) -> Self:
        """The cursor after `steps` more global batches."""
        return replace(self, step=self.step + steps)

    def check(self, schedule: Schedule | BalancedSchedule) -> None:
        """Raises UserError, naming both values and the remedy, if the cursor belongs to another order."""
        job = Cursor.at(schedule)
        for name, remedy in _REMEDIES.items():
            self._compare(name, getattr(self, name), getattr(job, name), remedy)
        remedy = "set balance: null" if self.balance is None else "take balance: null out of the job file"
        states = ["off" if each.balance is None else "on" for each in (self, job)]
        self._compare("balance", states[0], states[1], remedy)
        saved, given = self.balance or {}, job.balance or {}
        for name in sorted(saved.keys() | given.keys()):
            remedy = f"set balance.{name} to {json.dumps(saved.get(name))} in the job file"
            self._compare(f"balance.{name}", saved.get(name), given.get(name), remedy)

    def _compare(self, name: str, saved: Any, given: Any, remedy: str) -> None:
        if saved != given:
            raise UserError(
                f"the checkpoint stands at step {self.step} of another order: its {name} is {saved!r}, "
                f"this job's is {given!r}; {remedy}, or start from step 0 in a new output folder"
            )

    def to_json(self) -> str:
        """One JSON object, with the version of its format."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The cursor that `to_json` wrote. Raises ValueError, saying what is wrong, for anything else."""
        saved = json.loads(text)
        if not isinstance(saved, dict) or saved.pop("format", None) != FORMAT:
            raise ValueError(f'no object with "format": {FORMAT}')
        saved.setdefault("balance", None)  # written before there was any balance
        types = {field.name: field.type for field in fields(cls)}
        if saved.keys() != types.keys():
            raise ValueError(f"keys {sorted(saved)}, expected {sorted(types)}")
        for name, value in saved.items():
            if not (isinstance(value, dict | None) if name == "balance" else type(value) is types[name]):
                raise ValueError(f"{name} is {value!r}")
        return cls(**saved)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the cursor's file, whole or not at all: a temporary file beside it, synced, then renamed.

        Raises OSError if the folder does not exist or cannot be written; an older file then stays as it was.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        try:
            with temporary.open("x", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """The cursor in a file. Raises UserError, naming the file, if it is missing or no cursor."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such cursor file; resume from a complete checkpoint") from None
        except ValueError as error:
            raise UserError(f"{path} is no cursor of this version ({error}); resume from another checkpoint") from error


_ORDER_REMEDY = "put {name} back to the value of the run that wrote the checkpoint"

# What a step's meaning rests on, in the order in which a person should hear of it.
_REMEDIES = {
    "fingerprint": "point the job at the prepared data set the checkpoint was trained on",
    "num_bins": "restore the prepared data set, which has other bins under the same fingerprint",
} | {
    name: _ORDER_REMEDY.format(name=name)
    for name in ("seed", "global_batch_bins", "shuffle", "shuffle_block", "shuffle_window")
}
