"""The metrics that mmray reports to Prometheus, through Ray: every node's endpoint has the sums of the processes on it.

Each measure is declared here and nowhere else; Ray puts `ray_` before its name and, for counters, appends `_total`.
Averages and rates are for the reader to compute (`rate(…_seconds_total)` is the share of time, over `rate(…)` of a
count its mean), so nearly all are counters: those stay right across processes that come and go, and Ray's histograms
have only estimates of sums. Tags have few values: jobs, splits, stages, reasons, ranks. A call costs some microseconds,
and processes report every ten seconds: the last seconds of one that is killed are lost.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, Literal, TypeVar

from ray.util import metrics


@dataclass(frozen=True)
class Measure:
    """One metric.

    tags: in addition to `job_name`, because Prometheus itself has a label `job`; boundaries: those of a histogram's
    buckets.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()

    @property
    def exported(self) -> tuple[str, ...]:
        """The names that Prometheus shows."""
        name = f"ray_{self.name}"
        if self.kind == "histogram":
            return f"{name}_bucket", f"{name}_count", f"{name}_sum"
        return (f"{name}_total" if self.kind == "counter" else name,)


ROWS_READ = Measure("mmray_rows_read", "counter", "rows that went through the encoders", ("split",))
ROWS_PACKED = Measure("mmray_rows_packed", "counter", "rows in committed bins", ("split",))
ROWS_REJECTED = Measure("mmray_rows_rejected", "counter", "rows set aside in committed windows", ("split", "reason"))
BINS_WRITTEN = Measure("mmray_bins_written", "counter", "bins in committed windows", ("split",))
STAGE_BUSY_SECONDS = Measure("mmray_stage_busy_seconds", "counter", "time that a stage's actors work", ("stage",))
STAGE_WAIT_SECONDS = Measure(
    "mmray_stage_wait_seconds", "counter", "time that a stage's actors wait for input", ("stage",)
)

STEPS = Measure("mmray_steps", "counter", "optimizer steps done, those done again too")
STEP_SECONDS = Measure("mmray_step_busy_seconds", "counter", "time in steps, without the wait for data")
STEP_SPREAD = Measure(
    "mmray_step_seconds", "histogram", "time of a step", boundaries=(0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)
)
DATA_WAIT_SECONDS = Measure("mmray_data_wait_seconds", "counter", "time a rank waits for data", ("rank",))
TOKENS = Measure("mmray_tokens", "counter", "tokens of the samples in steps done")
TRAINED_TOKENS = Measure("mmray_trained_tokens", "counter", "tokens in the loss")
SAMPLES = Measure("mmray_samples", "counter", "samples in steps done")
SKIPPED_SAMPLES = Measure(
    "mmray_skipped_samples", "counter", "samples left out because of an image that cannot be read"
)
CHECKPOINTS = Measure("mmray_checkpoints", "counter", "checkpoints begun")
CHECKPOINT_SECONDS = Measure("mmray_checkpoint_seconds", "counter", "time that steps waited for checkpoints")
RESTARTS = Measure("mmray_restarts", "counter", "times that the run resumed from a checkpoint")
STEP = Measure("mmray_step", "gauge", "the last step that is done")
EPOCH = Measure("mmray_epoch", "gauge", "epochs of the data that are done")
WORKERS = Measure("mmray_workers", "gauge", "ranks of the run")
LOSS = Measure("mmray_loss", "gauge", "loss of the last step")
EVAL_LOSS = Measure("mmray_eval_loss", "gauge", "loss of the last evaluation")
LEARNING_RATE = Measure("mmray_learning_rate", "gauge", "learning rate of the last step")
GRAD_NORM = Measure("mmray_grad_norm", "gauge", "gradient norm of the last step, before clipping")

MEASURES = tuple(value for value in list(globals().values()) if isinstance(value, Measure))


def add(measure: Measure, value: float, **tags: str) -> None:
    """Adds to a counter; 0 leaves it as it is."""
    if value > 0:
        _metric(measure).inc(value, tags)


def put(measure: Measure, value: float | None, **tags: str) -> None:
    """Sets a gauge; None leaves it as it is."""
    if value is not None:
        _metric(measure).set(value, tags)


def observe(measure: Measure, value: float, **tags: str) -> None:
    """Adds a value to a histogram."""
    _metric(measure).observe(value, tags)


@cache
def _metric(measure: Measure) -> Any:
    tags = ("job_name", *measure.tags)
    if measure.kind == "histogram":
        return metrics.Histogram(measure.name, measure.meaning, list(measure.boundaries), tags)
    return {"counter": metrics.Counter, "gauge": metrics.Gauge}[measure.kind](measure.name, measure.meaning, tags)


class StageClock:
    """Measures the time that one actor of a stage works, and the time it waits between two calls."""

    def __init__(self, stage: str, job: str) -> None:
        self._tags = {"stage": stage, "job_name": job}
        self._idle_since: float | None = None

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Times one call."""
        began = time.monotonic()
        if self._idle_since is not None:
            add(STAGE_WAIT_SECONDS, began - self._idle_since, **self._tags)
        try:
            yield
        finally:
            self._idle_since = time.monotonic()
            add(STAGE_BUSY_SECONDS, self._idle_since - began, **self._tags)


Call = TypeVar("Call", bound=Callable[..., Any])


def clocked(call: Call) -> Call:
    """Decorates a method of an actor that has a `clock` so that the clock times it."""

    @wraps(call)
    def timed(self: Any, *arguments: Any) -> Any:
        with self.clock.busy():
            return call(self, *arguments)

    return timed  # type: ignore[return-value]
