"""The callbacks of every run, and their order."""

import logging
import time
from collections.abc import Sequence
from typing import Any

from mmray.config.job import Job
from mmray.errors import UserError
from mmray.run.best import EARLY_STOP, best_callbacks
from mmray.run.callback import Callback, DoneStep, Evaluation, Loop, Step
from mmray.run.data import data_lines, mixture_line, set_metrics
from mmray.run.metrics import MetricsLog
from mmray.run.performance import bf16_device, speed_metrics
from mmray.run.profile import profile_callbacks
from mmray.run.skipped import SkippedLog
from mmray.run.state import RunState
from mmray.run.tracking import TrackedRun, public_settings
from mmray.training.attention_paths import attention_names
from mmray.training.bins_log import TRAINED_FILE
from mmray.training.engine import StepMetrics
from mmray.training.first_loss import first_loss_problem
from mmray.training.json_lines import JsonLines
from mmray.training.model import transformers_model

log = logging.getLogger("mmray")

STORE_LOOK_SECONDS = 5.0
"""How often, in seconds, an object store is checked for a request to stop; a folder is checked before each step."""


def standard_callbacks(
    run: RunState, *, evaluating: Sequence[Callback] = (), watching: Sequence[Callback] = (),
    asking: Sequence[Callback] = (),
) -> list[Callback]:  # fmt: skip
    """The callbacks of a run in the order in which they are called; no other place decides that order.

    Args:
        evaluating: the callback that evaluates (`mmray.run.evaluation.callback`).
        watching: callbacks that only observe. They are called for a step when it is in the records, before an
        evaluation.
        asking: callbacks that ask the loop to save or to stop. They are called when a step is evaluated, before the
        periodic
            checkpoint is asked for.
    """
    return [
        History(),
        PlannedStop(run),
        Records(run),
        *profile_callbacks(run.plan.job),
        FirstLoss(),
        *watching,
        *evaluating,
        *best_callbacks(run.plan.job),
        *asking,
        PeriodicCheckpoints(run.plan.job.training.checkpoint_every_steps),
    ]


class History(Callback):
    """Writes the events of the run into its `history.jsonl`."""

    def at_start(self, loop: Loop) -> None:
        run = loop.run
        attention = attention_names(transformers_model(run.engine.model))
        if run.checkpoint is None:
            run.note(
                "start", loop.step, total_steps=run.total_steps, attention=attention, **mixture_line(run.prepared),
                **_base(run.plan.job),
            )  # fmt: skip
            run.note_stage()
            return
        changed = {"changed": run.changed} if run.changed else {}
        run.note(
            "resume", loop.step, total_steps=run.total_steps, checkpoint=run.checkpoint, attention=attention, **changed
        )
        if loop.step == run.start.first_step > 0:
            skipped = run.start.skipped_bins()
            values = {"skipped_bins": skipped} if skipped else {}
            run.note("continue_on", loop.step, **data_lines(run.prepared), **values)
        run.note_stage()

    def on_checkpoint(self, loop: Loop, name: str, seconds: float) -> None:
        loop.run.note("checkpoint", loop.step, name=name, seconds=round(seconds, 3))

    def at_end(self, loop: Loop) -> None:
        if (loop.stop_reason or "").startswith(EARLY_STOP):
            early_stopping = loop.run.plan.job.early_stopping
            settings = early_stopping.model_dump() if early_stopping else None
            loop.run.note("finish", loop.step, reason=loop.stop_reason, early_stopping=settings)
        elif loop.stop_reason is not None and loop.step < loop.run.total_steps:
            loop.run.note("stop", loop.step, reason=loop.stop_reason)
        else:
            loop.run.note("finish", loop.step)


def _base(job: Job) -> dict[str, str]:
    """The weights that a new run of the job begins with: the model's files, and a trained adapter; {} for neither."""
    adapter = job.training.adapter
    sources = {"model": job.model.path, "start_from": adapter and adapter.start_from}
    return {name: source for name, source in sources.items() if source}


class FirstLoss(Callback):
    """Warns, in the log and the history, where the first loss is not one of the pretrained weights."""

    def after_step(self, loop: Loop, done: DoneStep) -> None:
        run, metrics = loop.run, done.metrics
        if done.number > 1 or not run.is_first:
            return
        config = run.engine.model.config
        problem = first_loss_problem(metrics.loss, metrics.trained_tokens, run.plan.job.model, config)
        if problem:
            log.warning("%s", problem)
            run.note("first_loss", done.number, loss=metrics.loss, problem=problem)


class PlannedStop(Callback):
    """Ends the run after the current step when its folder asks for that (`RunFolder.ask_to_stop`)."""

    def __init__(self, run: RunState) -> None:
        self._folder, self._looks = run.folder, run.is_first
        self._pause = 0.0 if run.folder.shared_path is not None else STORE_LOOK_SECONDS
        self._next_look, self._who = 0.0, "another rank"

    def flag(self) -> int:
        """True if the run is to stop. The answer of rank 0 counts for all ranks."""
        if not self._looks or time.monotonic() < self._next_look:
            return 0
        self._next_look = time.monotonic() + self._pause
        try:
            who = self._folder.asked_to_stop()
        except (OSError, UserError):  # a store that does not answer is asked again
            return 0
        self._who = who or self._who
        return int(who is not None)

    def before_step(self, loop: Loop, step: Step) -> None:
        if step.flags[self.name][0]:
            loop.stop(self._who)


class Records(Callback):
    """Writes, on rank 0, the numbers of each step (`metrics.jsonl`, trackers), the bins it trained on (`trained.jsonl`)
    and the samples it left out (`skipped.jsonl`).

    Stops the run before a step where too many samples are left out.
    """

    def __init__(self, run: RunState) -> None:
        """Opens the records on rank 0 and forgets the numbers of steps that will be done again."""
        self._skipped: SkippedLog | None = None
        if not run.is_first:
            return
        job, folder = run.plan.job, run.folder.path
        tracked = TrackedRun(job.name, folder, public_settings(job), run.plan.commit)
        self._metrics = MetricsLog(tracked, run.start.step, job.tracking.trackers())
        self._skipped = SkippedLog(folder, run.start.step, job.data.max_skipped_share)
        self._trained = JsonLines(folder / TRAINED_FILE)
        self._device = bf16_device(run.engine)

    def before_step(self, loop: Loop, step: Step) -> None:
        if self._skipped:
            self._skipped.add(step.number, "train", step.counts)

    def after_step(self, loop: Loop, done: DoneStep) -> None:
        if not self._skipped:
            return
        trained, metrics, counts = done.step.trained, done.metrics, done.step.counts
        self._trained.append(trained.to_json())
        self._metrics.write(
            done.number,
            epoch=done.epoch,
            loss=metrics.loss,
            tokens=metrics.tokens,
            **_trained_beside(metrics),
            trained_tokens=metrics.trained_tokens,
            token_accuracy=metrics.token_accuracy,
            bins=len(trained.all_bins),
            workers=trained.workers,
            samples=counts.samples,
            skipped_samples=len(counts.skipped),
            lr=metrics.learning_rate,
            grad_norm=metrics.grad_norm,
            step_seconds=done.seconds,
            data_wait_seconds=done.step.waited,
            peak_memory=done.peak_memory,
            **speed_metrics(metrics.tokens, done.step.model_flops, done.seconds, trained.workers, self._device),
            **set_metrics(loop.run.prepared, trained, metrics),
            **_parts_metrics(metrics),
        )

    def on_evaluation(self, loop: Loop, evaluation: Evaluation) -> None:
        if not self._skipped:
            return
        counts = evaluation.counts
        self._skipped.add(evaluation.step, "eval", counts)
        self._metrics.write(
            evaluation.step, epoch=evaluation.epoch, eval_loss=evaluation.loss,
            eval_token_accuracy=evaluation.token_accuracy, eval_trained_tokens=evaluation.trained_tokens,
            eval_samples=counts.samples,
            eval_skipped_samples=len(counts.skipped), **_measured_apart(evaluation),
        )  # fmt: skip
        self._metrics.show(evaluation.step, evaluation.texts)

    def close(self) -> None:
        if self._skipped:
            self._trained.close()
            self._metrics.close()


class PeriodicCheckpoints(Callback):
    """Asks for a checkpoint every `every_steps` steps, and where the decay of the wsd schedule begins, from where a
    longer run can continue. The loop itself saves the last one."""

    def __init__(self, every_steps: int | None) -> None:
        """Sets the number of steps between checkpoints. every_steps: None for the last checkpoint only."""
        self._every_steps = every_steps

    def after_step(self, loop: Loop, done: DoneStep) -> None:
        if is_due(done.number, self._every_steps) or done.number == loop.run.engine.decays_from:
            loop.save()


def _parts_metrics(metrics: StepMetrics) -> dict[str, Any]:
    """The number of the stage, and the rates of parts that have their own; none in a run without parts."""
    stage = {} if metrics.stage is None else {"stage": metrics.stage}
    return stage | ({"lr_by_part": metrics.rates_by_part} if metrics.rates_by_part else {})


def _trained_beside(metrics: StepMetrics) -> dict[str, float]:
    """The losses that are trained in place of the cross-entropy or beside it, where there are any."""
    losses = {name: getattr(metrics, name) for name in ("router_loss", "smoothed_loss", "z_loss")}
    return {name: value for name, value in losses.items() if value is not None}


def _measured_apart(evaluation: Evaluation) -> dict[str, Any]:
    """The values of an evaluation by the job's `evaluation` settings; none by `training.eval_every_steps` alone."""
    if not evaluation.loss_by_set:
        return {}
    reading = {f"eval_{name}": value for name, value in evaluation.reading.items()}
    by_set = {
        "eval_loss_by_set": evaluation.loss_by_set, "eval_token_accuracy_by_set": evaluation.token_accuracy_by_set
    }  # fmt: skip
    return {**by_set, **reading, "eval_seconds": round(evaluation.seconds, 3)}


def is_due(step: int, every_steps: int | None) -> bool:
    """True if an event that happens every `every_steps` steps happens after this step; None: it never does."""
    return every_steps is not None and step % every_steps == 0
