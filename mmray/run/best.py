"""The best evaluation of a run: its checkpoint is kept, and a run that no longer improves may end.

Each checkpoint carries the record of both, so they go on across resumes and with any number of workers.
"""

from typing import Any

from mmray.base.words import counted
from mmray.config.job import Job
from mmray.run.callback import Callback, Evaluation, Loop
from mmray.run.scoring.settings import EarlyStoppingSettings, KeepBestSettings, is_better

EARLY_STOP = "early_stopping: "
"""Beginning of the reason of a run that ends early: it is finished, not interrupted."""


class KeepBest(Callback):
    """Asks for a checkpoint after each evaluation that is the best so far; its step is in every checkpoint."""

    def __init__(self, settings: KeepBestSettings) -> None:
        self._settings = settings
        self._step: int | None = None
        self._value: float | None = None

    def on_evaluation(self, loop: Loop, evaluation: Evaluation) -> None:
        value, metric = evaluation.value(self._settings.metric), self._settings.metric
        if value is not None and is_better(value, self._value, metric=metric, mode=self._settings.mode):
            self._step, self._value = evaluation.step, value
            loop.save()

    def state(self) -> dict[str, Any]:
        if self._step is None:
            return {}
        return {"metric": self._settings.metric, "step": self._step, "value": self._value}

    def restore(self, state: dict[str, Any]) -> None:
        if state["metric"] == self._settings.metric:
            self._step, self._value = state["step"], state["value"]


class EarlyStopping(Callback):
    """Ends the run when a number of evaluations in a row have not improved."""

    def __init__(self, settings: EarlyStoppingSettings) -> None:
        self._settings = settings
        self._value: float | None = None
        self._worse = 0

    def on_evaluation(self, loop: Loop, evaluation: Evaluation) -> None:
        settings, value = self._settings, evaluation.value(self._settings.metric)
        better = value is not None and is_better(
            value, self._value, metric=settings.metric, mode=settings.mode, min_delta=settings.min_delta
        )
        if better:
            self._value, self._worse = value, 0
            return
        self._worse += 1
        if self._worse >= settings.patience:
            loop.stop(
                f"{EARLY_STOP}{counted(self._worse, 'evaluation')} without an improvement of {settings.metric}, best "
                f"{'none' if self._value is None else format(self._value, '.4g')}"
            )

    def state(self) -> dict[str, Any]:
        if self._value is None and not self._worse:
            return {}
        return {"metric": self._settings.metric, "value": self._value, "worse": self._worse}

    def restore(self, state: dict[str, Any]) -> None:
        if state["metric"] == self._settings.metric:
            self._value, self._worse = state["value"], state["worse"]


def best_callbacks(job: Job) -> list[Callback]:
    """The callbacks that a job's `keep_best` and `early_stopping` ask for."""
    callbacks: list[Callback] = []
    if job.keep_best is not None:
        callbacks.append(KeepBest(job.keep_best))
    if job.early_stopping is not None:
        callbacks.append(EarlyStopping(job.early_stopping))
    return callbacks
