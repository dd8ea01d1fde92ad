"""What a training worker tells Prometheus. All but the wait for data is of the whole run, and rank 0 tells it."""

from mmray.run.skipped import Seen
from mmray.training.bins_log import TrainedStep
from mmray.training.engine import StepMetrics
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


class RunMeasures:
    """The measures of one rank of a run."""

    def __init__(self, job: str, rank: int) -> None:
        self._job, self._rank = job, rank

    def waited(self, seconds: float) -> None:
        """For the data of a step."""
        add(DATA_WAIT_SECONDS, seconds, job_name=self._job, rank=str(self._rank))

    def step(self, trained: TrainedStep, outcome: StepMetrics, seen: Seen, *, epoch: float, seconds: float) -> None:
        """A step is done."""
        job = self._job
        add(STEPS, 1, job_name=job)
        add(STEP_SECONDS, seconds, job_name=job)
        observe(STEP_SPREAD, seconds, job_name=job)
        add(TOKENS, outcome.tokens, job_name=job)
        add(TRAINED_TOKENS, outcome.trained_tokens, job_name=job)
        add(SAMPLES, seen.samples, job_name=job)
        add(SKIPPED_SAMPLES, len(seen.skipped), job_name=job)
        put(STEP, trained.step, job_name=job)
        put(EPOCH, epoch, job_name=job)
        put(WORKERS, trained.workers, job_name=job)
        put(LOSS, outcome.loss, job_name=job)
        put(LEARNING_RATE, outcome.learning_rate, job_name=job)
        put(GRAD_NORM, outcome.grad_norm, job_name=job)

    def evaluated(self, loss: float) -> None:
        """The eval set."""
        put(EVAL_LOSS, loss, job_name=self._job)

    def saved(self, seconds: float) -> None:
        """A checkpoint, for which the steps waited so long."""
        if self._rank == 0:
            add(CHECKPOINTS, 1, job_name=self._job)
            add(CHECKPOINT_SECONDS, seconds, job_name=self._job)

    def restarted(self) -> None:
        """From a checkpoint."""
        if self._rank == 0:
            add(RESTARTS, 1, job_name=self._job)
