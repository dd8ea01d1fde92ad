"""Reads single values of chat rows: JSON inside JSON, nulls, keys of one meaning, flags."""

import math
from collections.abc import Sequence
from typing import Any

from mmray.errors import RowError
from mmray.rows.json_rows import RepeatedKey, lone_surrogate, read_json

FLAGS = ("train", "weight", "loss", "training")
"""Keys of a message, or of a part, that say whether it is trained on: of axolotl (two), OpenAI, ms-swift."""

JSON = dict[str, Any]


def without_nulls(value: Any) -> Any:
    """Removes keys that say nothing, at any depth: a Parquet struct fills in every key that some row has."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if not says_nothing(entry)}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


def parsed(text: str, where: str) -> Any:
    """Reads JSON that stands in a row as text. Raises RowError where it is none."""
    try:
        value = read_json(text)
    except RepeatedKey as error:
        raise RowError("wrong_type", f"{where}: {text!r:.60}: {error}") from error
    except ValueError as error:
        raise RowError("wrong_type", f"{where}: {text!r:.60} is not JSON: {error}") from error
    if half := lone_surrogate(text, value):
        raise RowError("not_utf8", f"{where} holds {half!a}, half of a surrogate pair; write the whole character")
    return value


def says_nothing(value: object) -> bool:
    """Tells whether a value is null, or an object of nulls alone: what Parquet may make of an absent object."""
    if isinstance(value, dict):
        return bool(value) and all(map(says_nothing, value.values()))
    return value is None


def one_of(named: JSON, keys: Sequence[str], where: str) -> Any:
    """Returns the value of the first present key among keys of one meaning; None where all are absent.

    Raises RowError where two of them differ.
    """
    present_keys = [key for key in keys if key in named]
    for key in present_keys[1:]:
        if named[key] != named[present_keys[0]]:
            raise RowError("wrong_type", f"{where} has {present_keys[0]} and {key}, which differ; keep one of them")
    return named[present_keys[0]] if present_keys else None


def flag(named: JSON, where: str) -> bool | None:
    """Returns whether a message is trained on by its flag; None without a flag. Raises RowError for a bad flag."""

    flags = [(key, named[key]) for key in FLAGS if key in named]
    for key, value in flags:
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowError(
                "unsupported_flag",
                f"{where} has {key} {value!r:.40}; true and false (or 1 and 0) are honoured, parts of a loss are not",
            )
    values = {bool(value) for _, value in flags}
    if len(values) > 1:
        raise RowError("unsupported_flag", f"{where}: {' and '.join(key for key, _ in flags)} disagree; keep one")
    return values.pop() if values else None


def name_text(value: object, where: str) -> str:
    """Returns a name or an id as text; whole numbers are written out. Raises RowError for other values."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError("wrong_type", f"{where} must be a string, not {value!r:.60}")
    return value


def refuse_words_for_truth(options: JSON, where: str) -> None:
    """Raises RowError for a template's variable that is the text `true` or `false`: templates take a text for true."""
    for name, value in options.items():
        if isinstance(value, str) and value.lower() in ("true", "false"):
            raise RowError(
                "wrong_type",
                f"{where}: {name} is the text {value!r}, which a template takes for true; write it unquoted",
            )


def refuse_not_finite(value: Any, where: str) -> None:
    """Raises RowError for a number in a value that JSON cannot write, such as nan."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            refuse_not_finite(entry, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RowError("wrong_type", f"{where} hold {value!r}, which is no number of JSON; write null, or a text")
