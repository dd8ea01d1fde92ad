"""The time that a run will take: from the time of a step, or from a run that was measured."""

from dataclasses import dataclass
from datetime import timedelta

import numpy as np

from mmray.base.words import amount, counted, span
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.report.run import Run

WARM_UP_STEPS = 3
"""First steps of a run, and after each resume, that are slower than the others."""


@dataclass(frozen=True)
class Speed:
    """The speed of a training.

    step_seconds: the time of a step, waiting for data included; tokens, workers: tokens of that step and workers that
    trained on them, None where unknown; source: where it is from, in words.
    """

    step_seconds: float
    tokens: float | None
    workers: float | None
    source: str

    @classmethod
    def of(cls, text: str) -> "Speed":
        """Reads `--step-seconds`: a number of seconds, or the folder of a run.

        Raises UserError for what is neither, and for a run with too few steps.
        """
        try:
            seconds = float(text)
        except ValueError:
            return cls._of_run(text)
        if not 0 < seconds < float("inf"):
            raise UserError(f"--step-seconds {text}: give the seconds of a step, above 0, or the folder of a run")
        return cls(seconds, None, None, "as given")

    @classmethod
    def _of_run(cls, path: str) -> "Speed":
        if not Run.is_one(path):
            raise UserError(f"--step-seconds {path}: give the seconds of a step, or the folder of a run")
        run = Run(path)
        if len(run.steps) <= WARM_UP_STEPS:
            steps = counted(len(run.steps), "step")
            raise UserError(f"--step-seconds {path}: the run has {steps}, too few to tell its speed")
        seconds = run.column("step_seconds") + run.column("data_wait_seconds")
        return cls(
            float(np.median(seconds[WARM_UP_STEPS:])), float(np.median(run.column("tokens")[WARM_UP_STEPS:])),
            float(np.median(run.column("workers")[WARM_UP_STEPS:])), f"from {path}",
        )  # fmt: skip

    def seconds_of_step(self, tokens: float, workers: int) -> float:
        """The time of a step of a job: that of the measured run by its tokens a worker, else the time as given."""
        if self.tokens is None or self.workers is None:
            return self.step_seconds
        return self.step_seconds * (tokens / workers) / (self.tokens / self.workers)

    def text(self, job: Job, steps: int, bin_tokens: float) -> str:
        """The time of some steps of a job, in words. bin_tokens: mean number of tokens of a bin."""
        tokens, resources = bin_tokens * job.training.global_batch_bins, job.resources
        counts = dict.fromkeys((resources.max_workers, resources.min_workers))
        times = []
        for workers in counts:
            seconds = self.seconds_of_step(tokens, workers)
            on = f" on {counted(workers, 'worker')}" if len(counts) > 1 and self.tokens is not None else ""
            times.append(f"{span(timedelta(seconds=seconds * steps))}{on}: {counted(steps, 'step')} of {seconds:.3g} s")
        basis = self.source
        if self.tokens is not None and self.workers is not None:
            basis += (
                f": {self.step_seconds:.3g} s for {amount(round(self.tokens))} tokens on {self.workers:,.0f} "
                f"workers, here {amount(round(tokens))} tokens"
            )
        return f"about {'; '.join(dict.fromkeys(times))} ({basis}); without start, evaluations and checkpoints"
