"""The `mixture` and `stages` parts of the job file: which prepared datasets a run trains on, and with what weights."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import Field

from mmray.base.settings import Settings
from mmray.schedule.shares import exact_shares

_NOT_NAMES = {"prepared", "output", "out", "data", "train", ""}
"""Names of folders that say nothing of what is in them."""


class MixtureSettings(Settings):
    """One prepared dataset of a mixture."""

    prepared: str
    """Folder or URI of the prepared dataset: another job's output.prepared, which holds the folder `train`."""

    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Share of this dataset in the bins that are trained on, relative to the weights of the others; any unit, also
    tokens or rows. 0: no bin of it, as before it joins in another stage."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,60}$")] | None = None
    """Name of the dataset in metrics and charts. null: the last folder of its path that says something, `pages` of
    /data/pages/prepared."""

    @property
    def shown_name(self) -> str:
        """The name of the dataset, with what the path says where none is set."""
        folders = [part for part in PurePosixPath(self.prepared).parts if part not in _NOT_NAMES | {"/"}]
        return self.name or (folders[-1] if folders else self.prepared)


class StageSettings(Settings):
    """Weights of a mixture in the first part of a run, or between two steps."""

    until: Annotated[int, Field(gt=0)]
    """Last step of the stage, counted over the whole run. The steps after the last stage have the weights of
    `mixture`."""

    weights: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...]
    """Weight of each dataset, in the order of `mixture`."""


def check_mixture(mixture: Sequence[MixtureSettings], stages: Sequence[StageSettings]) -> None:
    """Raise ValueError, with the value and the remedy, for datasets and stages that do not fit together."""
    for what, values in (
        ("prepared", [dataset.prepared.rstrip("/") for dataset in mixture]),
        ("name", [dataset.shown_name for dataset in mixture]),
    ):
        if twice := _repeated(values):
            remedy = "give each a name" if what == "name" else "write it once, with the sum of its weights"
            raise ValueError(f"mixture: two datasets have the {what} {twice!r}; {remedy}")
    if stages and not mixture:
        raise ValueError("stages are those of a mixture, and the job has none: write mixture, or leave stages out")
    ends = [stage.until for stage in stages]
    if ends != sorted(set(ends)):
        raise ValueError(f"stages: the steps in until must grow from stage to stage, got {ends}")
    for number, stage in enumerate(stages):
        if len(stage.weights) != len(mixture):
            raise ValueError(
                f"stages.{number}.weights has {len(stage.weights)} weights, and mixture {len(mixture)} datasets: give "
                "one for each, in their order"
            )
    weights = {f"stages.{number}.weights": stage.weights for number, stage in enumerate(stages)}
    if mixture:
        weights["mixture"] = tuple(dataset.weight for dataset in mixture)
    for place, stage_weights in weights.items():
        try:
            exact_shares(stage_weights)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def _repeated(values: Sequence[Any]) -> Any:
    """The first value that occurs before; None where all differ."""
    return next((value for number, value in enumerate(values) if value in values[:number]), None)
