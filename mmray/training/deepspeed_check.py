"""A check, before work starts, that DeepSpeed itself knows every key in `training.deepspeed`.

DeepSpeed's newer groups are pydantic models, which refuse a key they do not know, but only on the workers; its older
groups, and the top of its configuration, ignore such a key silently. So DeepSpeed's own reader is given the
configuration in dictionaries that record which keys are asked for: a key that it never asks for means nothing to it.
"""

import difflib
import importlib.util
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ValidationError

from mmray.errors import UserError
from mmray.training.deepspeed_config import deepspeed_config, import_deepspeed
from mmray.training.settings import ModelSettings, TrainingSettings, load_deepspeed_overrides

UNJUDGED = ("autotuning", "data_efficiency")
"""Groups of which DeepSpeed reads some keys only when others are set."""


def check_deepspeed(model: ModelSettings, training: TrainingSettings) -> str | None:
    """Raises UserError where `training.deepspeed` has a key or a value that DeepSpeed does not know.

    Returns a note where DeepSpeed is not installed here and could not be asked; otherwise None.
    """
    overrides = load_deepspeed_overrides(training.deepspeed)
    if not overrides:
        return None
    if importlib.util.find_spec("deepspeed") is None:
        return "training.deepspeed is not checked: deepspeed is not installed here"
    config = deepspeed_config(model, training, world_size=1, grad_accumulation=1, load_universal=False)
    noting = _Noting(config)
    try:
        with _quiet():
            import_deepspeed()
            from deepspeed.runtime.config import DeepSpeedConfig

            DeepSpeedConfig(noting)
    except UserError:
        raise
    except ValidationError as error:
        raise UserError(_invalid(error, overrides)) from error
    except Exception as error:  # its reader raises errors of many kinds, some of its own
        raise UserError(f"training.deepspeed: DeepSpeed refuses it: {' '.join(str(error).split())}") from error
    for path, known in _unread(overrides, noting):
        raise UserError(f"training.deepspeed: {_unknown(path, known)}")
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the messages about the accelerator that importing DeepSpeed prints."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _Noting(dict[str, Any]):
    """A dictionary that records the keys that are asked for, also in the dictionaries it holds."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__({key: _Noting(value) if isinstance(value, dict) else value for key, value in content.items()})
        self.asked: set[str] = set()

    def __copy__(self) -> "_Noting":
        return self

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        for key in super().__iter__():
            self.asked.add(key)
            yield key

    def keys(self) -> "_Noting":  # type: ignore[override]
        """The dictionary itself, so that the keys that are looked up in it are recorded."""
        return self

    def items(self) -> Any:
        """All items; every key counts as asked for."""
        self.asked.update(super().keys())
        return super().items()


def _unread(overrides: dict[str, Any], noting: _Noting) -> Iterator[tuple[str, set[str]]]:
    """The paths of keys that were not asked for, each with the keys that were."""
    for key, value in overrides.items():
        if key not in noting.asked:
            yield key, noting.asked
            continue
        group = dict.get(noting, key)
        if isinstance(value, dict) and isinstance(group, _Noting) and group.asked and key not in UNJUDGED:
            for inner in value.keys() - group.asked:
                yield f"{key}.{inner}", group.asked


def _invalid(error: ValidationError, overrides: dict[str, Any]) -> str:
    """The first mistake that a model of DeepSpeed found, in one line."""
    mistake = error.errors()[0]
    location = [str(part) for part in mistake["loc"]]
    path = ".".join(next(_paths_to(location, overrides), location))
    if mistake["type"] == "extra_forbidden":
        models = list(_models(BaseModel))
        titled = [model for model in models if model.__name__ == error.title and len(location) == 1]
        known = {name for model in titled or models for name in model.model_fields}
        return f"training.deepspeed: {_unknown(path, known)}"
    return f"training.deepspeed: {path}: {mistake['msg']}, found {mistake['input']!r}"


def _unknown(path: str, known: Iterable[str]) -> str:
    group, _, key = path.rpartition(".")
    near = difflib.get_close_matches(key, sorted(known), n=1)
    hint = f"did you mean {f'{group}.' if group else ''}{near[0]}?" if near else "see its page on the JSON file"
    return f"{path}: DeepSpeed knows no such key, {hint}"


def _paths_to(location: list[str], node: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """The paths in the configuration that a model's location belongs to; the location does not contain the model's own
    group."""
    inner: Any = node
    for part in location:
        inner = inner.get(part, _ABSENT) if isinstance(inner, dict) else _ABSENT
    if inner is not _ABSENT:
        yield [*above, *location]
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _paths_to(location, value, (*above, key))


_ABSENT = object()


def _models(base: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """All imported models of DeepSpeed's configuration."""
    for model in base.__subclasses__():
        if model.__module__.startswith("deepspeed."):
            yield model
        yield from _models(model)
