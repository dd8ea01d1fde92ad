"""The settings that a resumed run has otherwise than its checkpoint, for its history."""

from pathlib import Path
from typing import Any

from mmray.training.checkpoint import read_settings
from mmray.training.settings import ModelSettings, TrainingSettings


def changed_settings(checkpoint: Path, model: ModelSettings, training: TrainingSettings) -> dict[str, list[Any]]:
    """The values before and now of each setting that a checkpoint was not trained with, by its name in the job file.

    The attention is not among them, which the history tells by itself. {} for a checkpoint of before settings were
    kept. Raises UserError for settings that cannot be read.
    """
    saved = read_settings(checkpoint)
    if saved is None:
        return {}
    changed: dict[str, list[Any]] = {}
    for group, before, now in (("model", saved[0], model), ("training", saved[1], training)):
        values = _leaves(before.model_dump(mode="json"), group), _leaves(now.model_dump(mode="json"), group)
        for name in sorted({*values[0], *values[1]} - {"model.attention"}):
            pair = [of.get(name) for of in values]
            if pair[0] != pair[1]:
                changed[name] = pair
    return changed


def _leaves(value: Any, name: str) -> dict[str, Any]:
    """The values inside of groups of settings, by their names with dots; a list is one value."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {inner: leaf for key, held in value.items() for inner, leaf in _leaves(held, f"{name}.{key}").items()}
