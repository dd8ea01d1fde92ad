"""A trace of some steps, written where `training.profile` asks for one, for Perfetto (https://ui.perfetto.dev)."""

import logging
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from mmray.config.job import Job
from mmray.errors import UserError
from mmray.run.callback import Callback, DoneStep, Loop, Step

PROFILE_FOLDER = "profile"

log = logging.getLogger("mmray")


def profile_callbacks(job: Job) -> Sequence[Callback]:
    """The callback that traces steps, where the job asks for it."""
    return [Profile(*job.training.profile.steps)] if job.training.profile else []


class Profile(Callback):
    """Records what rank 0 does in some steps, on the CPU and its GPU, and writes it into the run's folder."""

    def __init__(self, first: int, last: int) -> None:
        """Sets the first and the last step, counted from 1."""
        self._first, self._last = first, last
        self._begin = first
        self._profile: profile | None = None

    def at_start(self, loop: Loop) -> None:
        if self._last > loop.run.total_steps:
            raise UserError(
                f"training.profile.steps [{self._first}, {self._last}] go beyond the {loop.run.total_steps} steps of "
                "the training; trace earlier ones"
            )

    def before_step(self, loop: Loop, step: Step) -> None:
        if loop.run.is_first and self._first <= step.number <= self._last and self._profile is None:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._begin, self._profile = step.number, profile(activities=activities, record_shapes=True)
            self._profile.start()

    def after_step(self, loop: Loop, done: DoneStep) -> None:
        if done.number == self._last:
            self._write(loop)

    def at_end(self, loop: Loop) -> None:
        self._write(loop)

    def close(self) -> None:
        if self._profile is not None:
            self._profile.stop()

    def _write(self, loop: Loop) -> None:
        """Writes the trace of the steps up to now, where one is being recorded."""
        if self._profile is None:
            return
        self._profile.stop()
        folder = loop.run.folder.path / PROFILE_FOLDER
        folder.mkdir(exist_ok=True)
        path = folder / f"steps-{self._begin}-{loop.step}.json.gz"
        self._profile.export_chrome_trace(str(path))
        self._profile = None
        loop.run.note("profile", loop.step, file=f"{PROFILE_FOLDER}/{path.name}")
        log.info("steps %d to %d are traced in %s; https://ui.perfetto.dev opens it", self._begin, loop.step, path)
