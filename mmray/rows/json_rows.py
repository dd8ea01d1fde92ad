"""Parses JSON text to a row, or to the error that says why it is not one."""

import json
from typing import Any

from mmray.errors import RowError


class RepeatedKey(ValueError):
    """A key stands twice in one object of JSON, so that only one of its values could be read."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise RepeatedKey(f"the key {twice!r:.60} stands twice in one object; keep one of them")
    return value


read_json = json.JSONDecoder(object_pairs_hook=_object).decode
"""Reads JSON. Raises RepeatedKey for an object with a key twice, and ValueError for a text that is not JSON."""


def parse_row(line: bytes) -> dict[str, Any] | RowError:
    """Parses the JSON object of a line of JSONL, or of a file; returns the error for anything else."""
    try:
        text = line.decode("utf-8-sig")  # some editors begin a file with a byte order mark
        value = read_json(text)
    except RepeatedKey as error:
        return RowError("bad_json", f"{error}; the line begins {text[:60]!r}")
    except UnicodeDecodeError as error:
        return RowError("not_utf8", f"byte {error.start} of the line is not UTF-8; save the file as UTF-8")
    except ValueError as error:
        return RowError("bad_json", f"the line is not JSON: {error}; it begins {text[:60]!r}")
    except RecursionError:
        return RowError("bad_json", "the line nests too deeply to be a row; write it flat")
    if not isinstance(value, dict):
        return RowError("bad_json", f"a row must be a JSON object, this line is a {type(value).__name__}")
    if half := lone_surrogate(text, value):
        return RowError("not_utf8", f"the line holds {half!a}, half of a surrogate pair; write the whole character")
    return value


def lone_surrogate(text: str, value: Any) -> str | None:
    """Finds half of a surrogate pair, such as \\ud83d, which JSON can write but UTF-8, and so tokenizers, cannot.

    text: JSON; value: what it says.
    """
    if "\\ud" not in text.lower():
        return None
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return str(error.object[error.start])
    return None
