"""MLflow as a tracker.

A step's numbers are one call of its client, 4 ms with SQLite here. MLflow never changes the parameters of a run, so a
setting that a resumed run changes becomes a tag, `changed.training.steps`.
"""

import io
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from PIL import Image
from pydantic import model_validator

from mmray.base.settings import Settings
from mmray.run.scoring.results import SHOWN_TEXTS, RowResult, as_markdown
from mmray.run.tracking.base import Tracker
from mmray.run.tracking.run import TrackedRun

PARAMS_PER_CALL = 100
PARAM_LENGTH = 6000
"""Limits of MLflow: parameters in one call, and characters of one parameter."""


class MlflowSettings(Settings):
    """A run of MLflow. Credentials come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or
    MLFLOW_TRACKING_TOKEN."""

    experiment: str | None = None
    """Experiment name, created if it does not exist. null: MLFLOW_EXPERIMENT_NAME, else the job's name."""

    uri: str | None = None
    """Tracking server, or a store such as `sqlite:////shared/mlflow.db`. null: MLFLOW_TRACKING_URI, else the file
    `mlflow.db` in the run's folder."""

    library: ClassVar[str] = "mlflow"

    @model_validator(mode="before")
    @classmethod
    def _experiment_alone(cls, value: Any) -> Any:
        return {"experiment": value} if isinstance(value, str) else value

    def open(self, run: TrackedRun, run_id: str | None) -> tuple[Tracker, str]:
        """Start or continue the run."""
        from mlflow.tracking import MlflowClient

        own_files = run.folder.absolute()
        named = self.uri or os.environ.get("MLFLOW_TRACKING_URI")
        uri = named or f"sqlite:///{own_files}/mlflow.db"
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        if run_id is None:
            name = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.name
            experiment = client.get_experiment_by_name(name)
            experiment_id = experiment.experiment_id if experiment else None
            if experiment_id is None:  # MLflow's own default for pictures is a folder of the process
                place = None if named else (own_files / "mlartifacts").as_uri()
                experiment_id = client.create_experiment(name, artifact_location=place)
            run_id = client.create_run(experiment_id, run_name=run.name).info.run_id
        client.update_run(run_id, status="RUNNING")
        _describe(client, run_id, run)
        return _Mlflow(client, run_id), run_id


def _describe(client: Any, run_id: str, run: TrackedRun) -> None:
    """Write new settings as parameters, and changed settings, the folder and the commit as tags."""
    from mlflow.entities import Param, RunTag

    texts = {name: _text(value)[:PARAM_LENGTH] for name, value in _flat(run.settings)}
    known: dict[str, str] = client.get_run(run_id).data.params
    new = [Param(name, text) for name, text in texts.items() if name not in known]
    for first in range(0, len(new), PARAMS_PER_CALL):
        client.log_batch(run_id, params=new[first : first + PARAMS_PER_CALL])
    tags = {f"changed.{name}": text for name, text in texts.items() if known.get(name, text) != text}
    tags["run_folder"] = str(run.folder)
    if run.commit:
        tags["mlflow.source.git.commit"] = run.commit
    client.log_batch(run_id, tags=[RunTag(name, text) for name, text in tags.items()])


class _Mlflow:
    def __init__(self, client: Any, run_id: str) -> None:
        from mlflow.entities import Metric

        self._client, self._run_id, self._metric = client, run_id, Metric

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def show(self, step: int, texts: Sequence[RowResult]) -> None:
        folder = f"evaluations/{step:08d}"
        for number, text in enumerate(texts[:SHOWN_TEXTS]):
            self._client.log_text(self._run_id, as_markdown(text), f"{folder}/text_{number}.md")
            if text.picture:
                page = Image.open(io.BytesIO(text.picture))
                self._client.log_image(self._run_id, page, f"{folder}/page_{number}.png")

    def close(self) -> None:
        self._client.set_terminated(self._run_id, "FINISHED")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each setting that is not None as (dotted name, value): `training.steps` and its value."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
