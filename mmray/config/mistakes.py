"""Explains pydantic's errors of a job: one line per mistake, with its place.

Job.model_validate reports mistakes as (location, type, message, input). Two things in them are not for a reader.

1. A value of several kinds is tried as each kind, and the mistakes of every kind are reported, with the kind as one
   part of the location. For `images: {overview: [{max_ratio: 1, sizes: [512, 512]}]}`, where overview is a size or a
   list of buckets:

       images, overview, tuple[constrained-int, constrained-int], 0        should be an integer   (as a size)
       images, overview, tuple[constrained-int, constrained-int], 1        is missing             (as a size)
       images, overview, tuple[OverviewBucket, ...], 0, size               is missing             (as buckets)
       images, overview, tuple[OverviewBucket, ...], 0, sizes              is unknown             (as buckets)

   The kind that was meant is the one whose mistakes lie deepest, here the buckets. Only its mistakes are told,
   without the kind: `images.overview.0.sizes: unknown key; did you mean 'size'?`

2. A list with a wrong entry is also reported as too short, since pydantic leaves the entry out. Only the entry's
   mistake is told.
"""

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from mmray.base.settings import Settings
from mmray.training.part_settings import KIND


def mistake_lines(error: ValidationError, settings: type[Settings]) -> Iterator[str]:
    """Yield a line for each mistake, `path: message`.

    settings: the class whose validation raised the error.
    """
    mistakes = error.errors()
    locations = [mistake["loc"] for mistake in mistakes]
    for mistake in mistakes:
        location = mistake["loc"]
        if mistake["type"] == "too_short" and any(_is_inside(other, location) for other in locations):
            continue
        kind_index = _kind_index(settings, location)
        if kind_index is not None and not _is_kind_meant(location, kind_index, locations):
            continue
        path = ".".join(str(part) for index, part in enumerate(location) if index != kind_index and part != KIND)
        yield f"{path or 'job'}: {_message(settings, dict(mistake))}"


def _message(settings: type[Settings], mistake: dict[str, Any]) -> str:
    """Say what is wrong, with the value or, for an unknown key, with the nearest known one."""
    location, value = mistake["loc"], mistake["input"]
    if mistake["type"] == "extra_forbidden":
        known_keys = _known_keys(settings, location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), known_keys, n=1, cutoff=0.5)
        remedy = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known_keys)}"
        return f"unknown key; {remedy}"
    if mistake["type"] == "missing":
        return "required and not given"
    plain_messages = {"model_type": "must be keys with values", "tuple_type": "must be a list"}
    message = plain_messages.get(mistake["type"], mistake["msg"].removeprefix("Value error, "))
    return message if isinstance(value, (dict, BaseModel)) else f"{message} (found {value!r:.80})"


def _is_inside(location: Sequence[Any], outer: Sequence[Any]) -> bool:
    """Tell whether a location lies below another one."""
    return len(location) > len(outer) and location[: len(outer)] == outer


def _is_kind_meant(location: Sequence[Any], kind_index: int, locations: Sequence[Sequence[Any]]) -> bool:
    """Tell whether a mistake belongs to the kind whose mistakes lie deepest among all kinds of its value.

    location: of the mistake, with its kind at kind_index; locations: of all mistakes.
    """
    same_value = [other for other in locations if _is_inside(other, location[:kind_index])]
    same_kind = [other for other in same_value if other[kind_index] == location[kind_index]]
    return max(map(len, same_kind)) == max(map(len, same_value))


def _kind_index(settings: Any, location: Sequence[Any]) -> int | None:
    """Return the index in a location where pydantic names the kind of a value, or None where it names no kind."""
    for index, part in enumerate(location[:-1]):
        if isinstance(part, int):
            continue
        fields = getattr(settings, "model_fields", {})
        if part not in fields:
            return None
        annotation = fields[part].annotation
        kinds = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
        if typing.get_origin(annotation) in (types.UnionType, typing.Union) and len(kinds) > 1:
            return index + 1
        settings = _settings_class(annotation)
    return None


def _known_keys(settings: Any, location: Sequence[Any]) -> list[str]:
    """Return the keys of the settings at a location."""
    for part in location:
        fields = {} if isinstance(part, int) else getattr(settings, "model_fields", {})
        if part in fields:
            settings = _settings_class(fields[part].annotation)
    return list(getattr(settings, "model_fields", {}))


def _settings_class(annotation: Any) -> Any:
    """Return the Settings class inside an annotation such as `tuple[X, ...] | None`, or None."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, Settings) else None
    for inner in typing.get_args(annotation):
        settings = _settings_class(inner)
        if settings is not None:
            return settings
    return None
