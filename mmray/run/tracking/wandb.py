"""Weights & Biases as a tracker.

The x-axis is `step`, a value that mmray logs: W&B's own step only counts calls, and refuses to go back. So an
evaluation that ends late is still drawn at its step, and the parts of an interrupted run (separate folders, if it is
offline) join to one run with one id.
"""

import io
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from PIL import Image
from pydantic import model_validator

from mmray.base.settings import Settings
from mmray.run.scoring.results import SHOWN_LETTERS, SHOWN_TEXTS, RowResult
from mmray.run.tracking.base import Tracker
from mmray.run.tracking.run import TrackedRun

FLUSH_SECONDS = 1.0
"""How far an offline run's file may be behind, which is what a crash loses. W&B's own default is 15."""


class WandbSettings(Settings):
    """A run of Weights & Biases. Credentials come from WANDB_API_KEY, or from `wandb login` on every node."""

    project: str | None = None
    """Project name. null: WANDB_PROJECT, else the job's name."""

    entity: str | None = None
    """Team or user. null: WANDB_ENTITY, else your default one."""

    mode: Literal["online", "offline"] | None = None
    """Upload of the numbers. `online`: at once; `offline`: only into the run's folder `wandb/`, for a later `wandb
    sync`. null: WANDB_MODE, else online."""

    tags: tuple[str, ...] = ()
    """Tags of the run."""

    library: ClassVar[str] = "wandb"

    @model_validator(mode="before")
    @classmethod
    def _project_alone(cls, value: Any) -> Any:
        return {"project": value} if isinstance(value, str) else value

    def open(self, run: TrackedRun, run_id: str | None) -> tuple[Tracker, str]:
        """Start or continue the run."""
        import wandb

        run_id = run_id or secrets.token_hex(4)
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            x_transaction_log_flush_interval=FLUSH_SECONDS,
        )
        begun = wandb.init(
            project=self.project or os.environ.get("WANDB_PROJECT") or run.name,
            entity=self.entity,
            mode=self.mode,
            tags=self.tags or None,
            id=run_id,
            resume="allow",
            name=run.name,
            dir=str(run.folder),
            config={**run.settings, "run_folder": str(run.folder), "git_commit": run.commit},
            allow_val_change=True,
            settings=settings,
        )
        begun.define_metric("step", hidden=True)
        begun.define_metric("*", step_metric="step")
        return _Wandb(begun), run_id


class _Wandb:
    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def show(self, step: int, texts: Sequence[RowResult]) -> None:
        import wandb

        table = wandb.Table(columns=["page", "id", "cer", "reference", "prediction"])
        for text in texts[:SHOWN_TEXTS]:
            page = wandb.Image(Image.open(io.BytesIO(text.picture))) if text.picture else None
            reference, prediction = ((words or "")[:SHOWN_LETTERS] for words in (text.reference, text.prediction))
            table.add_data(page, text.id, text.cer, reference, prediction)
        self._run.log({"step": step, "eval/texts": table})

    def close(self) -> None:
        self._run.finish()
