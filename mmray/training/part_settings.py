"""Settings of what is trained: parts of the model, and stages of the training with other parts each."""

from typing import Literal

from pydantic import Field

from mmray.base.settings import Settings


class PartSettings(Settings):
    """How the weights of a part, or of a pattern of names, are trained."""

    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of these weights; it follows `training.schedule`. null: `training.learning_rate`."""

    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay of the matrices among these weights. null: `training.weight_decay`."""


PartTreatment = Literal["frozen"] | PartSettings
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
