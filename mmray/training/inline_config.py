"""Makes a model's configuration from the keys that a job file has under `model.config`."""

import dataclasses
import difflib
import logging
from collections.abc import Iterator
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from mmray.base.words import one_line
from mmray.errors import UserError

log = logging.getLogger("mmray")

EXAMPLE = "model: {config: {model_type: qwen2_vl, text_config: {hidden_size: 64, …}, vision_config: {…}}, processor: …}"
LEGACY = {"rope_scaling", "rope_theta", "torch_dtype", "model_type", "type"}
"""Keys of earlier versions, which transformers turns into those of today."""
NEAR = 0.8
"""Similarity from which on an unknown key is taken for a misspelt one."""


def inline_config(values: dict[str, Any]) -> PretrainedConfig:
    """The configuration of an inline `model.config`. Raises UserError for a model type or value that none can have."""
    model_type = values["model_type"]
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING.keys()), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"model.config: transformers knows no model_type {model_type!r}{hint}")
    kind = CONFIG_MAPPING[model_type]
    try:
        config = kind(**{key: value for key, value in values.items() if key != "model_type"})
    except Exception as error:  # each class checks its values with errors of its own
        raise UserError(
            f"model.config: a {kind.__name__} cannot be made of it: {one_line(error)}; correct the value. For example "
            + EXAMPLE
        ) from error
    return config


def check_inline_keys(config: PretrainedConfig, values: dict[str, Any]) -> None:
    """Warns of keys of an inline config that its class does not declare, since transformers keeps and ignores them.

    Raises UserError for one that resembles a declared key which is not there.
    """
    undeclared = []
    for path, key, declared in _undeclared(config, values, "model.config"):
        near = difflib.get_close_matches(key, declared, n=1, cutoff=NEAR)
        if near:
            raise UserError(f"{path}.{key}: unknown key; did you mean {near[0]!r}?")
        undeclared.append(f"{path}.{key}")
    if undeclared:
        log.warning("%s: transformers declares no such key, and may ignore it", ", ".join(undeclared))


def _undeclared(config: PretrainedConfig, values: dict[str, Any], path: str) -> Iterator[tuple[str, str, list[str]]]:
    """The keys that a configuration's class does not declare, each with its path and the declared ones left."""
    declared = _declared(type(config))
    for key, value in values.items():
        part = vars(config).get(key)
        if isinstance(part, PretrainedConfig) and isinstance(value, dict):
            yield from _undeclared(part, value, f"{path}.{key}")
        elif key not in declared and not key.startswith("_"):
            yield path, key, sorted(declared - values.keys())


def _declared(kind: type[PretrainedConfig]) -> set[str]:
    """The keys that a class declares, its base declares, or that stand in a configuration of its defaults."""
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    try:
        defaults = set(kind().to_dict())
    except Exception:  # noqa: BLE001 (a class without defaults)
        defaults = set()
    return fields | defaults | set(kind.attribute_map) | set(PretrainedConfig().to_dict()) | LEGACY
