"""The loop of a run: batches in schedule order, step after step, with its callbacks around each.

    run = open_run(plan, folder, ranks, …)                the state of a rank
    callbacks = standard_callbacks(run, …)                work around the steps, in order
    TrainingLoop(run, callbacks, checkpoints).train(batches)

It does not know Ray: the source of the batches and the way of checkpoints into the run's folder are handed in.
`jobs/train_loop.py` hands in Ray Data and Ray Train; `BatchMaker.steps` and `FolderCheckpoints` need neither.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from mmray.batches.micro_batch import MicroBatch
from mmray.batches.render import SkippedSample
from mmray.run.callback import Callback, DoneStep, Evaluation, Step
from mmray.run.callback_states import write_callback_states
from mmray.run.data import trained_step
from mmray.run.place import write_place
from mmray.run.skipped import BatchCounts
from mmray.run.state import RunState, enter_stage
from mmray.schedule.cursor import Cursor
from mmray.training.checkpoint import save_state
from mmray.training.peak_memory import peak_memory

log = logging.getLogger("mmray")

BatchSource = Callable[[int, int], Iterator[list[MicroBatch]]]
"""The source of this rank's micro-batches of the steps [start, stop) of a run, step by step."""


class CheckpointStore(Protocol):
    """Brings checkpoints into the folder of a run. All its methods are collective."""

    def save(self, write: Callable[[Path], None], step: int, *, wait: bool) -> str:
        """Writes this rank's part of a checkpoint and takes it to the run's folder; returns the checkpoint's name.

        Args:
            write: writes this rank's files into an empty folder.
            step: number of steps done.
            wait: whether to return only when this rank's part is in the run's folder.
        """
        ...

    def finish(self) -> None:
        """Waits until the last checkpoint is whole, and deletes those that are no longer kept."""
        ...


class TrainingLoop:
    """Trains one rank of a run to its end, or until a callback asks it to stop."""

    def __init__(self, run: RunState, callbacks: Sequence[Callback], checkpoints: CheckpointStore) -> None:
        """Binds the loop to a run. callbacks: called in this order, which is the same on every rank."""
        names = [callback.name for callback in callbacks]
        if len(set(names)) < len(names):
            raise ValueError(f"callbacks of one run need different names, got {', '.join(names)}")
        self.run = run
        self.cursor: Cursor = run.start
        self.stop_reason: str | None = None
        self._callbacks, self._checkpoints = list(callbacks), checkpoints
        self._saved_step: int | None = run.start.step if run.checkpoint else None
        self._save_asked = self._wait_asked = False

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.cursor.step

    @property
    def epoch(self) -> float:
        """Number of epochs of the data that are done."""
        return self.run.epoch(self.cursor.step)

    def save(self, *, wait: bool = False) -> None:
        """Asks for a checkpoint, written after all callbacks have been called for the step. wait: until it is whole."""
        self._save_asked, self._wait_asked = True, self._wait_asked or wait

    def stop(self, reason: str) -> None:
        """Asks the run to end, after a checkpoint: in `before_step` without doing that step, otherwise after this
        one."""
        self.stop_reason = self.stop_reason or reason

    def evaluated(self, evaluation: Evaluation) -> None:
        """Calls `on_evaluation` of all callbacks."""
        for callback in self._callbacks:
            callback.on_evaluation(self, evaluation)

    def train(self, batches: BatchSource) -> None:
        """Does all steps that are left. Collective; raises the errors of a step or a callback."""
        with ExitStack() as closing:
            for callback in self._callbacks:
                closing.callback(callback.close)
            self._restore()
            for callback in self._callbacks:
                callback.at_start(self)
            if self.stop_reason is None:
                self._steps(batches)
            self._checkpoints.finish()
            for callback in self._callbacks:
                callback.at_end(self)

    def _restore(self) -> None:
        states = dict(self.run.callback_states)
        for callback in self._callbacks:
            if (state := states.pop(callback.name, None)) is not None:
                callback.restore(state)
        if states and self.run.is_first:
            log.warning(
                "%s carries the state of %s, which this run does not have: it is left out of the next checkpoints",
                self.run.checkpoint, ", ".join(states),
            )  # fmt: skip

    def _steps(self, batches: BatchSource) -> None:
        """Does the steps that are left, stage by stage.

        Each stage asks for batches of its own, so that none are made ahead, on threads, while a model is built anew:
        DeepSpeed then replaces functions of torch for the whole process.
        """
        self._stage(batches)
        while self.run.engine.is_at_border and self.step < self.run.total_steps and self.stop_reason is None:
            self._enter_stage()
            self._stage(batches)
        if self.stop_reason is not None and self._saved_step != self.step > 0:
            self._save(wait=True)

    def _stage(self, batches: BatchSource) -> None:
        """Does the steps of the present stage that are left, or those until a callback asks the run to stop."""
        started = time.monotonic()
        for micro_batches in batches(self.step, self.run.engine.stage.stop_step):
            waited, started = time.monotonic() - started, time.monotonic()
            step = self._exchange(micro_batches, waited)
            self._before(step)
            if self.stop_reason is not None:
                break
            self._do(step, micro_batches, started)
            if self.stop_reason is not None:
                break
            started = time.monotonic()

    def _before(self, step: Step) -> None:
        for callback in self._callbacks:
            callback.before_step(self, step)
            if self.stop_reason is not None:
                return

    def _do(self, step: Step, micro_batches: list[MicroBatch], started: float) -> None:
        metrics = self.run.engine.step(micro_batches)
        seconds = time.monotonic() - started
        self.cursor = self.cursor.advance()
        peak = max(value for (value,) in self.run.ranks.numbers([peak_memory(self.run.engine.device)]))
        done = DoneStep(step, metrics, seconds, self.epoch, peak)
        for callback in self._callbacks:
            callback.after_step(self, done)
        if self._save_asked or self.step == self.run.total_steps:
            self._save(wait=self._wait_asked or self.step == self.run.total_steps)

    def _enter_stage(self) -> None:
        """Begins the next stage of the training: as if the run were resumed from a checkpoint of this step."""
        if self._saved_step != self.step:
            self._save(wait=True)
        self._checkpoints.finish()
        enter_stage(self.run)
        self.run.note_stage()

    def _exchange(self, micro_batches: list[MicroBatch], waited: float) -> Step:
        """The next step, with the bins and counts that all ranks report from their batches. Collective."""
        run, here = self.run, BatchCounts.of(micro_batches)
        bins = [number for batch in micro_batches for number in batch.bins]
        padding = [-1] * (run.batches.micro_batches * run.batches.micro_batch_bins - len(bins))
        flags = [int(callback.flag()) for callback in self._callbacks]
        flops = run.flops.of(micro_batches)
        rows = run.ranks.numbers([here.samples, len(here.skipped), flops, *flags, *bins, *padding])
        skipped = _joined(run.ranks.every(here.skipped)) if any(count for _, count, *_ in rows) else []
        first_bin = 3 + len(flags)
        rank_bins = [[number for number in row[first_bin:] if number >= 0] for row in rows]
        trained = trained_step(run.prepared, self.step + 1, rank_bins)
        return Step(
            trained,
            BatchCounts(sum(row[0] for row in rows), skipped),
            waited,
            {callback.name: [row[3 + index] for row in rows] for index, callback in enumerate(self._callbacks)},
            sum(row[2] for row in rows),
        )

    def _save(self, wait: bool) -> None:
        self._save_asked = self._wait_asked = False
        started = time.monotonic()
        if self.run.is_first:
            self.run.folder.publish()
        name = self._checkpoints.save(self._write, self.step, wait=wait)
        seconds = time.monotonic() - started
        self._saved_step = self.step
        for callback in self._callbacks:
            callback.on_checkpoint(self, name, seconds)

    def _write(self, folder: Path) -> None:
        """Writes this rank's part of a checkpoint."""
        save_state(self.run.engine, folder)
        if self.run.is_first:
            write_place(folder, self.cursor, self.run.prepared)
            write_callback_states(folder, {callback.name: callback.state() for callback in self._callbacks})


def _joined(every: list[list[SkippedSample]]) -> list[SkippedSample]:
    return [sample for rank_samples in every for sample in rank_samples]
