"""The state of one rank of a run: its plan, place, data and engine, built once and never changed.

The cursor, which moves, belongs to the loop (`loop.py`); callbacks hold their own state (`callback.py`).
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmray.batches.plan import BatchPlan
from mmray.errors import UserError
from mmray.run.callback_states import read_callback_states
from mmray.run.changes import changed_settings
from mmray.run.checkpoints import Scratch, newest_whole, step_of
from mmray.run.data import RunData, open_data, set_names
from mmray.run.folder import RunFolder
from mmray.run.history import Event, add_to_history
from mmray.run.performance import FlopsCounter
from mmray.run.plan import RunPlan
from mmray.schedule.cursor import Cursor
from mmray.training.engine import TrainingEngine
from mmray.training.ranks import Ranks


@dataclass(frozen=True)
class RunState:
    """One rank of a run, ready to train."""

    plan: RunPlan
    """The driver's decisions."""
    folder: RunFolder
    """The run's folder as this process sees it."""
    ranks: Ranks
    """All ranks of the run."""
    prepared: RunData
    """The data the run trains on."""
    start: Cursor
    """The cursor at which the run begins or continues."""
    checkpoint: str | None
    """Name of the checkpoint the run continues from; None at the beginning of a run."""
    callback_states: Mapping[str, dict[str, Any]]
    """States of the callbacks in the checkpoint, by their names."""
    total_steps: int
    """Steps of the whole run."""
    batches: BatchPlan
    """The micro-batches of all steps."""
    engine: TrainingEngine
    """Model and optimizer."""
    scratch: Path
    """A folder of this run on the node's own disk."""
    node: str
    """Ranks with the same value see the same `scratch`."""
    flops: FlopsCounter
    """Counts the operations that the model needs."""
    changed: Mapping[str, list[Any]]
    """Settings that the checkpoint was not trained with: each one's values before and now."""

    @property
    def is_first(self) -> bool:
        """True on rank 0, which writes the records."""
        return self.ranks.rank == 0

    def note(self, event: Event, step: int, **values: Any) -> None:
        """Adds an event to the run's history, on rank 0. step: number of steps done."""
        if self.is_first:
            add_to_history(self.folder.path, event, step, self.ranks.size, **values)

    def note_stage(self) -> None:
        """Adds the stage that begins to the run's history, in a run that has several."""
        engine = self.engine
        if len(engine.stages) > 1 and engine.step_count == engine.stage.first_step:
            stage = engine.stage.number + 1
            self.note("stage", engine.step_count, stage=stage, stages=len(engine.stages), parts=engine.treated_parts)

    def epoch(self, step: int) -> float:
        """Epochs of the run's data that are done after `step` steps of the run."""
        return round((step - self.start.first_step) / self.plan.schedule.steps_per_epoch, 6)


def open_run(plan: RunPlan, folder: RunFolder, ranks: Ranks, *, scratch: Path, node: str = "") -> RunState:
    """Restores a rank from the newest whole checkpoint of the run, or builds it where there is none. Collective.

    Args:
        scratch: a folder of this run on the node's own disk. A checkpoint of an object store is copied there and
            deleted when it is restored; where ranks share no folder, a conversion for another number of ranks is
            written
            there, too.
        node: ranks with the same value see the same `scratch`.

    Raises UserError where the checkpoint does not fit the plan, or where there are checkpoints but none is whole.
    """

    prepared = open_data(plan.job)
    copies = _copies(folder, scratch, node)
    checkpoint = _newest(folder, ranks, copies)
    start = plan.place(checkpoint, prepared)
    total_steps = plan.total_steps(start)
    batches = plan.batches("train", plan.schedule_at(start), ranks.size, start.first_step)
    engine = TrainingEngine(
        plan.job.model,
        plan.job.training,
        total_steps=total_steps,
        grad_accumulation=batches.micro_batches,
        resume_from=checkpoint,
        scratch=folder.shared_path or scratch,
        node=copies.node if copies else "",
        ranks=ranks,
        num_sets=len(set_names(prepared)),
    )
    states = read_callback_states(checkpoint) if checkpoint else {}
    changed = changed_settings(checkpoint, engine.model_settings, engine.training_settings) if checkpoint else {}
    _forget(checkpoint, ranks, copies)
    return RunState(
        plan=plan,
        folder=folder,
        ranks=ranks,
        prepared=prepared,
        start=start,
        checkpoint=checkpoint.name if checkpoint else None,
        callback_states=states,
        total_steps=total_steps,
        batches=batches,
        engine=engine,
        scratch=scratch,
        node=node,
        flops=FlopsCounter(engine),
        changed=changed,
    )


def enter_stage(run: RunState) -> None:
    """Takes the engine into the stage that begins at its step, from the newest checkpoint, which is of this step.
    Collective."""
    copies = _copies(run.folder, run.scratch, run.node)
    checkpoint = _newest(run.folder, run.ranks, copies)
    step = run.engine.step_count
    if checkpoint is None or step_of(checkpoint.name) != step:
        raise UserError(
            f"the checkpoint of step {step}, from which a stage of training begins, is gone; the same command goes on "
            "from the newest one"
        )
    scratch = run.folder.shared_path or run.scratch
    run.engine.enter_stage(checkpoint, scratch, copies.node if copies else "")
    run.flops.read(run.engine)
    _forget(checkpoint, run.ranks, copies)


def _copies(folder: RunFolder, scratch: Path, node: str) -> Scratch | None:
    """The place that checkpoints of an object store are copied to; None where all ranks share the run's folder."""
    return None if folder.shared_path is not None else Scratch(scratch / "restored", node)


def _newest(folder: RunFolder, ranks: Ranks, copies: Scratch | None) -> Path | None:
    def note_damage(name: str, problem: str) -> None:
        add_to_history(folder.path, "damaged_checkpoint", step_of(name), ranks.size, checkpoint=name, problem=problem)

    return newest_whole(folder, ranks, note_damage, copies)


def _forget(checkpoint: Path | None, ranks: Ranks, copies: Scratch | None) -> None:
    """Deletes the copy of a checkpoint, when every rank has read it."""
    ranks.every(None)
    if checkpoint is not None and copies is not None:
        shutil.rmtree(checkpoint, ignore_errors=True)
