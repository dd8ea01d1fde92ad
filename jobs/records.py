"""What rank 0 writes of each step into the run's folder."""

from dataclasses import asdict
from pathlib import Path

from mmray.base.json_lines import JsonLines
from mmray.config.job import Job
from mmray.run.metrics import MetricsLog
from mmray.run.skipped import Seen, SkippedLog
from mmray.run.tracking import TrackedRun, public_settings
from mmray.training.bins_log import TRAINED_FILE, TrainedStep
from mmray.training.engine import StepMetrics


class Records:
    """The numbers of each step, and the bins it trained on."""

    def __init__(self, job: Job, run: Path, commit: str | None, step: int) -> None:
        """run: where rank 0 writes (`RunFolder.path`); commit: of the code; step: the last that is done, numbers of
        later ones are forgotten."""
        tracked = TrackedRun(job.name, run, public_settings(job), commit)
        self.metrics = MetricsLog(tracked, step, job.tracking.trackers())
        self.skipped = SkippedLog(run, step, job.data.max_skipped_share)
        self._trained = JsonLines(run / TRAINED_FILE)

    def write(
        self, trained: TrainedStep, outcome: StepMetrics, seen: Seen, *, epoch: float, seconds: float, waited: float
    ) -> None:
        """One step that is done."""
        self._trained.append(asdict(trained))
        self.metrics.write(
            trained.step,
            epoch=epoch,
            loss=outcome.loss,
            tokens=outcome.tokens,
            **({} if outcome.router_loss is None else {"router_loss": outcome.router_loss}),
            trained_tokens=outcome.trained_tokens,
            bins=len(trained.all_bins),
            workers=trained.workers,
            samples=seen.samples,
            skipped_samples=len(seen.skipped),
            lr=outcome.learning_rate,
            grad_norm=outcome.grad_norm,
            step_seconds=seconds,
            data_wait_seconds=waited,
        )

    def close(self) -> None:
        """Close the files."""
        self._trained.close()
        self.metrics.close()
