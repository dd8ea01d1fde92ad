"""What happens around the steps of a run: the protocol of its callbacks, and what they are told.

A callback is a small class that subclasses `Callback` and overrides the moments it cares for:

    at_start ─ [ flag ─ before_step ─ (the step) ─ after_step ─ on_evaluation ─ on_checkpoint ] … ─ at_end ─ close

All ranks hold the same callbacks in the same order and are called in every step, so any moment may be collective; what
one rank alone does (files, trackers) asks `loop.run.is_first`. Whether to save or to stop is asked of the loop, and
must be decided alike on every rank: decide it from what all ranks know, or from the flags, which travel with the
numbers that ranks exchange before each step anyway and cost nothing more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mmray.run.skipped import BatchCounts
from mmray.run.state import RunState
from mmray.training.bins_log import TrainedStep
from mmray.training.engine import StepMetrics


@dataclass(frozen=True)
class Step:
    """A step that is about to be done: what all ranks are given in it."""

    trained: TrainedStep
    """Its number, counted from 1, and the bins of each rank."""
    counts: BatchCounts
    """Samples of all ranks."""
    waited: float
    """Seconds that this rank waited for its micro-batches."""
    flags: Mapping[str, list[int]]
    """What each rank's callbacks gave as `flag`, by the callback's name, in the order of ranks."""

    @property
    def number(self) -> int:
        """Its number, counted from 1."""
        return self.trained.step


@dataclass(frozen=True)
class DoneStep:
    """A step that was done."""

    step: Step
    metrics: StepMetrics
    """Equal on all ranks."""
    seconds: float
    """From the exchange before the step to its end."""
    epoch: float
    """Epochs of the data that are done with it."""

    @property
    def number(self) -> int:
        """Its number, counted from 1."""
        return self.step.number


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, equal on all ranks."""

    step: int
    """Steps done."""
    epoch: float
    loss: float
    """Mean cross-entropy of the trained tokens, in nats; NaN where there is none."""
    trained_tokens: int
    counts: BatchCounts
    """Samples of all ranks."""


class Loop(Protocol):
    """The loop as callbacks see it."""

    run: RunState
    """What this rank is."""

    @property
    def step(self) -> int:
        """Steps done."""
        ...

    @property
    def epoch(self) -> float:
        """Epochs of the data that are done."""
        ...

    @property
    def stop_reason(self) -> str | None:
        """Why the run ends before its last step; None where nobody asked it to."""
        ...

    def save(self, *, wait: bool = False) -> None:
        """Ask for a checkpoint when all callbacks have been told of the step. wait: until it is whole."""
        ...

    def stop(self, reason: str) -> None:
        """Ask the run to end: in `before_step` without doing that step, else after this one. It is saved first."""
        ...

    def evaluated(self, evaluation: Evaluation) -> None:
        """Tell all callbacks of an evaluation."""
        ...


class Callback:
    """What a run does beside its steps. Subclass it and override what is needed: the rest does nothing."""

    @property
    def name(self) -> str:
        """Tells it from the others of a run, also in checkpoints."""
        return type(self).__name__

    def at_start(self, loop: Loop) -> None:
        """The rank is built or restored, no step is done yet."""

    def flag(self) -> int:
        """A number that all ranks are given with the next step, in `Step.flags`."""
        return 0

    def before_step(self, loop: Loop, step: Step) -> None:
        """The batches are here, nothing is computed yet."""

    def after_step(self, loop: Loop, done: DoneStep) -> None:
        """The weights are updated."""

    def on_evaluation(self, loop: Loop, evaluation: Evaluation) -> None:
        """An evaluation is done."""

    def on_checkpoint(self, loop: Loop, name: str, seconds: float) -> None:
        """A checkpoint is written, or on its way into the run's folder; the steps waited for it so long."""

    def at_end(self, loop: Loop) -> None:
        """No step is left, or the run was asked to stop; its last checkpoint is whole."""

    def close(self) -> None:
        """Release what it holds, whatever has ended the run."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint shall carry, as plain values of JSON: of rank 0. {}: nothing."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave, on every rank, before `at_start`; not called where the checkpoint has none."""
