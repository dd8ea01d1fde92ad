"""The `tracking` section of the job file: each tracker is one line."""

import importlib.util

from mmray.base.settings import Settings
from mmray.errors import UserError
from mmray.run.tracking.base import TrackerSettings
from mmray.run.tracking.mlflow import MlflowSettings
from mmray.run.tracking.wandb import WandbSettings


class TrackingSettings(Settings):
    """Experiment trackers that receive a run's numbers, in addition to `metrics.jsonl` and TensorBoard files, which
    every run writes."""

    wandb: WandbSettings | None = None
    """Weights & Biases: `wandb: my_project`, or its settings. Needs the extra `trackers`."""

    mlflow: MlflowSettings | None = None
    """MLflow: `mlflow: my_experiment`, or its settings. Needs the extra `trackers`."""

    def trackers(self) -> dict[str, TrackerSettings]:
        """Settings of the trackers that the job asks for, by name."""
        named = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: settings for name, settings in named.items() if settings is not None}

    def check(self) -> None:
        """Raise UserError where a tracker's library is missing."""
        for name, settings in self.trackers().items():
            if importlib.util.find_spec(settings.library) is None:
                raise UserError(
                    f"tracking.{name}: the library {settings.library} is not installed; on all nodes: "
                    "pip install -c constraints.txt -e '.[trackers]', or leave tracking out"
                )
