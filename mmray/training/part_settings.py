"""Settings of what is trained: parts of the model, and stages of the training with other parts each."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from mmray.base.settings import Settings


class PartSettings(Settings):
    """How the weights of a part, or of a pattern of names, are trained."""

    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of these weights; it follows `training.schedule`. null: `training.learning_rate`."""

    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay of the matrices among these weights. null: `training.weight_decay`."""


KIND = "PartSettings"
"""Name by which pydantic tells that a mistake is in the settings of a part; no part of the job file."""


def _kind(value: object) -> str | None:
    """The kind of treatment that a value of the job file is meant as; None for a value that is none."""
    if isinstance(value, dict | PartSettings):
        return KIND
    return "word" if value == "frozen" else None


PartTreatment = Annotated[
    Annotated[Literal["frozen"], Tag("word")] | Annotated[PartSettings, Tag(KIND)],
    Discriminator(
        _kind,
        custom_error_type="treatment",
        custom_error_message="Input should be 'frozen' or keys such as learning_rate:",
    ),
]
"""Treatment of a part: frozen, or trained with these settings."""

PartsSetting = dict[str, PartTreatment]
"""Treatments by the name of a part (vision, projector, language, embeddings, audio) or by a pattern of the names of
weights, with `*` for any text."""


class TrainingStage(Settings):
    """One stage of a training at its beginning."""

    steps: int = Field(ge=1)
    """Number of optimizer steps of the stage."""

    parts: PartsSetting
    """Treatment of parts of the model during the stage, as in `training.parts`, which holds after the last stage."""
