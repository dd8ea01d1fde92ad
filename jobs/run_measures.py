"""The Prometheus metrics of a training worker. Except for the wait for data they are those of the run, set by rank
0."""

from mmray.run.callback import Callback, DoneStep, Evaluation, Loop, Step
from pipelines.measures import (
    CHECKPOINT_SECONDS,
    CHECKPOINTS,
    DATA_WAIT_SECONDS,
    EPOCH,
    EVAL_LOSS,
    GRAD_NORM,
    LEARNING_RATE,
    LOSS,
    RESTARTS,
    SAMPLES,
    SKIPPED_SAMPLES,
    STEP,
    STEP_SECONDS,
    STEP_SPREAD,
    STEPS,
    TOKENS,
    TRAINED_TOKENS,
    WORKERS,
    add,
    observe,
    put,
)


class RunMeasures(Callback):
    """Reports the measures of one rank of a run to Prometheus."""

    def __init__(self, job: str, rank: int) -> None:
        self._job, self._rank = job, rank

    def at_start(self, loop: Loop) -> None:
        if self._rank == 0 and loop.run.checkpoint is not None:
            add(RESTARTS, 1, job_name=self._job)

    def before_step(self, loop: Loop, step: Step) -> None:
        add(DATA_WAIT_SECONDS, step.waited, job_name=self._job, rank=str(self._rank))

    def after_step(self, loop: Loop, done: DoneStep) -> None:
        if self._rank > 0:
            return
        job, trained, metrics, counts = self._job, done.step.trained, done.metrics, done.step.counts
        add(STEPS, 1, job_name=job)
        add(STEP_SECONDS, done.seconds, job_name=job)
        observe(STEP_SPREAD, done.seconds, job_name=job)
        add(TOKENS, metrics.tokens, job_name=job)
        add(TRAINED_TOKENS, metrics.trained_tokens, job_name=job)
        add(SAMPLES, counts.samples, job_name=job)
        add(SKIPPED_SAMPLES, len(counts.skipped), job_name=job)
        put(STEP, trained.step, job_name=job)
        put(EPOCH, done.epoch, job_name=job)
        put(WORKERS, trained.workers, job_name=job)
        put(LOSS, metrics.loss, job_name=job)
        put(LEARNING_RATE, metrics.learning_rate, job_name=job)
        put(GRAD_NORM, metrics.grad_norm, job_name=job)

    def on_evaluation(self, loop: Loop, evaluation: Evaluation) -> None:
        if self._rank == 0:
            put(EVAL_LOSS, evaluation.loss, job_name=self._job)

    def on_checkpoint(self, loop: Loop, name: str, seconds: float) -> None:
        if self._rank == 0:
            add(CHECKPOINTS, 1, job_name=self._job)
            add(CHECKPOINT_SECONDS, seconds, job_name=self._job)
