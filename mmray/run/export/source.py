"""The checkpoint that is exported: finding it, reading its records, and copying the files that are needed."""

import json
import posixpath
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmray.base.words import one_line
from mmray.errors import UserError
from mmray.run.callback_states import best_step
from mmray.run.checkpoints import checkpoint_names, looks_whole, step_of
from mmray.run.export.sidecar import Dtype
from mmray.run.folder import RunFolder
from mmray.run.metrics import METRICS_FILE, read_metrics
from mmray.run.place import PREPARED_FILE
from mmray.storage import Folder
from mmray.training.checkpoint import STATE_FILE, SavedState, read_settings, read_state
from mmray.training.checksums import listed_files
from mmray.training.conversion import SHARDS
from mmray.training.saved_weights import needed_files
from mmray.training.settings import ModelSettings, TrainingSettings

_TRANSFERS = 8


@dataclass(frozen=True)
class SourceCheckpoint:
    """A checkpoint in a run's folder, by path or URI."""

    run: RunFolder
    name: str

    def __str__(self) -> str:
        return f"{self.run.uri.rstrip('/')}/{self.name}"

    @classmethod
    def find(cls, source: str, step: int | None = None) -> "SourceCheckpoint":
        """The newest whole checkpoint of a run, the one of a step, or the checkpoint that `source` itself is.

        Raises UserError where there is none.
        """
        source = source.rstrip("/")
        if Folder(source).exists(STATE_FILE):
            path = source if "://" in source else str(Path(source).absolute())
            checkpoint = cls(RunFolder(posixpath.dirname(path)), posixpath.basename(path))
            if step is not None and checkpoint.state.step != step:
                raise UserError(f"{source} is the checkpoint of step {checkpoint.state.step}; leave --step out")
            return checkpoint
        run = RunFolder(source)
        names = checkpoint_names(run)
        if not names:
            raise UserError(
                f"{source} holds no checkpoint; give the output.run of a job that has trained, or one in it"
            )
        wanted = [name for name in names if step in (None, step_of(name))]
        for name in wanted:
            if looks_whole(run.shadow(name)):
                return cls(run, name)
        steps = ", ".join(str(step) for step in sorted({step_of(name) for name in names}))
        if not wanted:
            raise UserError(f"{source} has no checkpoint of step {step}; it has those of steps {steps}")
        raise UserError(f"{source}: no checkpoint of step {step or steps} is whole; mmray report names what is missing")

    @classmethod
    def best(cls, run: str) -> "SourceCheckpoint":
        """The checkpoint of the run's best evaluation (`keep_best`). Raises UserError where none is kept."""
        newest = cls.find(run)
        step = best_step(newest.folder)
        if step is None:
            raise UserError(f"{run} keeps no best checkpoint; set keep_best in the job file and train, or give a step")
        return cls.find(run, step)

    @cached_property
    def folder(self) -> Path:
        """A local folder for inspecting the checkpoint; of a remote one it holds only the small files."""
        return self.run.shadow(self.name)

    @cached_property
    def state(self) -> SavedState:
        """The checkpoint's record of its training. Raises UserError where the folder is no checkpoint."""
        return read_state(self.folder)

    @property
    def settings(self) -> tuple[ModelSettings, TrainingSettings] | None:
        """The settings that the checkpoint was trained with; None where it does not hold them."""
        return read_settings(self.folder)

    @property
    def prepared(self) -> dict[str, Any]:
        """The prepared dataset that the checkpoint was trained on: its path, fingerprint, rows and record."""
        try:
            content: dict[str, Any] = json.loads((self.folder / PREPARED_FILE).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{self}: {PREPARED_FILE} cannot be read: {one_line(error)}") from error
        return content

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The last evaluation of the run up to this step; None without one."""
        path, step = self.run.fetch() / METRICS_FILE, self.state.step
        lines = read_metrics(path) if path.exists() else []
        return next((line for line in reversed(lines) if "eval_loss" in line and line["step"] <= step), None)

    @contextmanager
    def weight_files(self, dtype: Dtype) -> Iterator[Path]:
        """A folder with the DeepSpeed files that hold the weights in a dtype, checked to be as they were written.

        Those of a remote checkpoint are copies, deleted when the block ends. Raises UserError where one is damaged.
        """
        state = self.state
        try:
            files = listed_files(self.folder, state.lists)
        except (OSError, ValueError) as error:
            raise UserError(f"{self} was not copied to its end: {one_line(error)}; export another step") from error
        inside = f"{SHARDS}/"
        names = [file.name.removeprefix(inside) for file in files if file.name.startswith(inside)]
        needed = set(needed_files(names, zero_stage=state.zero_stage, masters=wants_masters(state, dtype)))
        with self._here([f"{inside}{name}" for name in needed]) as folder:
            for file in files:
                if file.name.removeprefix(inside) in needed and (problem := file.problem_in(folder)):
                    raise UserError(f"{self} is damaged: {problem}; export another step")
            yield folder / SHARDS

    @contextmanager
    def _here(self, names: Sequence[str]) -> Iterator[Path]:
        if self.run.shared_path is not None:
            yield self.run.shared_path / self.name
            return
        remote, here = Folder(str(self)), Path(tempfile.mkdtemp(prefix="mmray-export-"))
        try:
            (here / SHARDS).mkdir()
            with ThreadPoolExecutor(_TRANSFERS) as pool:
                list(pool.map(lambda name: remote.get(name, here / name), names))
            yield here
        finally:
            shutil.rmtree(here, ignore_errors=True)


def wants_masters(state: SavedState, dtype: Dtype) -> bool:
    """True if the weights in a dtype are the fp32 masters of a bf16 training."""
    return state.dtype == "bf16" and dtype == "fp32"
