"""The protocol of a run's callbacks, and the values they are passed.

A callback is a small class that subclasses `Callback` and overrides the moments it needs:

    at_start ─ [ flag ─ before_step ─ (the step) ─ after_step ─ on_evaluation ─ on_checkpoint ] … ─ at_end ─ close

All ranks hold the same callbacks in the same order and call them in every step, so any moment may be collective. Work
that one rank alone does (files, trackers) is guarded by `loop.run.is_first`. A callback asks the loop to save or to
stop, and every rank must decide alike: from values that all ranks know, or from the flags, which travel with the
numbers that ranks exchange before each step anyway and cost nothing more.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from mmray.run.scoring.results import RowResult
from mmray.run.skipped import BatchCounts
from mmray.run.state import RunState
from mmray.training.bins_log import TrainedStep
from mmray.training.engine import StepMetrics


@dataclass(frozen=True)
class Step:
    """A step that is about to be done: the values that all ranks share in it."""

    trained: TrainedStep
    """Number of the step, counted from 1, and the bins of each rank."""
    counts: BatchCounts
    """Sample counts over all ranks."""
    waited: float
    """Seconds that this rank waited for its micro-batches."""
    flags: Mapping[str, list[int]]
    """The `flag` of each rank's callbacks, by the callback's name, in the order of ranks."""
    model_flops: int
    """Number of floating-point operations that the model needs for the step, over all ranks; 0 where not known."""

    @property
    def number(self) -> int:
        """Number of the step, counted from 1."""
        return self.trained.step


@dataclass(frozen=True)
class DoneStep:
    """A step that is done."""

    step: Step
    metrics: StepMetrics
    """Metrics of the step, equal on all ranks."""
    seconds: float
    """Seconds from the exchange before the step to its end."""
    epoch: float
    """Epochs of the data that are done after this step."""
    peak_memory: int
    """The most bytes that a rank has held (`training.peak_memory`), over all ranks."""

    @property
    def number(self) -> int:
        """Number of the step, counted from 1."""
        return self.step.number


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation, equal on all ranks."""

    step: int
    """Number of steps done."""
    epoch: float
    loss: float
    """Mean cross-entropy of the trained tokens, in nats; NaN where there are none."""
    trained_tokens: int
    counts: BatchCounts
    """Sample counts over all ranks."""
    token_accuracy: float = math.nan
    """Share of the trained tokens that the model finds most likely; NaN where there are none."""
    loss_by_set: Mapping[str, float | None] = field(default_factory=dict)
    """Loss of each set of the eval data by its number, None without a trained token; empty where only the whole is
    measured."""
    token_accuracy_by_set: Mapping[str, float | None] = field(default_factory=dict)
    """Token accuracy of each set, as `loss_by_set`."""
    reading: Mapping[str, float | None] = field(default_factory=dict)
    """Metrics of generated texts, by name; empty where none were generated."""
    texts: tuple[RowResult, ...] = ()
    """Texts that were read, for people: the worst, the median and the best ones."""
    seconds: float = 0.0
    """Seconds that training waited for it."""

    def value(self, metric: str) -> float | None:
        """A value by its name in metrics.jsonl; None where the evaluation does not have it, or not a finite one."""
        value = self.loss if metric == "eval_loss" else self.reading.get(metric.removeprefix("eval_"))
        return value if value is not None and math.isfinite(value) else None


class Loop(Protocol):
    """The loop as callbacks see it."""

    run: RunState
    """The state of this rank."""

    @property
    def step(self) -> int:
        """Number of steps done."""
        ...

    @property
    def epoch(self) -> float:
        """Number of epochs of the data that are done."""
        ...

    @property
    def stop_reason(self) -> str | None:
        """The reason why the run ends before its last step; None where nobody asked for that."""
        ...

    def save(self, *, wait: bool = False) -> None:
        """Asks for a checkpoint, written after all callbacks have been called for the step. wait: until it is whole."""
        ...

    def stop(self, reason: str) -> None:
        """Asks the run to end, after a checkpoint: in `before_step` without doing that step, otherwise after this
        one."""
        ...

    def evaluated(self, evaluation: Evaluation) -> None:
        """Calls `on_evaluation` of all callbacks."""
        ...


class Callback:
    """Work that a run does around its steps. Subclasses override the moments they need; the others do nothing."""

    @property
    def name(self) -> str:
        """Name that tells the callback from the others of a run, also in checkpoints."""
        return type(self).__name__

    def at_start(self, loop: Loop) -> None:
        """Called when the rank is built or restored, before the first step."""

    def flag(self) -> int:
        """A number that all ranks receive with the next step, in `Step.flags`."""
        return 0

    def before_step(self, loop: Loop, step: Step) -> None:
        """Called when the batches are here and nothing is computed yet."""

    def after_step(self, loop: Loop, done: DoneStep) -> None:
        """Called when the weights are updated."""

    def on_evaluation(self, loop: Loop, evaluation: Evaluation) -> None:
        """Called when an evaluation is done."""

    def on_checkpoint(self, loop: Loop, name: str, seconds: float) -> None:
        """Called when a checkpoint is written, or on its way into the run's folder. seconds: how long the steps waited
        for it."""

    def at_end(self, loop: Loop) -> None:
        """Called when no step is left, or the run was asked to stop, and its last checkpoint is whole."""

    def close(self) -> None:
        """Releases what the callback holds, however the run has ended."""

    def state(self) -> dict[str, Any]:
        """The values of rank 0 that a checkpoint carries, as plain values of JSON; {} for none."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back the values of `state`, on every rank, before `at_start`; not called where the checkpoint has
        none."""
