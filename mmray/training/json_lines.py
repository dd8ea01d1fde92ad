"""Files to which lines of JSON are appended one by one, and which survive the death of their writer.

A line is one write of the operating system, so a reader finds whole lines, and at most one incomplete line at the end,
which the next writer cuts off.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmray.storage import replacing


class JsonLines:
    """Appends to one file, which is created with its folder where absent; an incomplete last line is cut off first."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        self._file = path.open("ab", buffering=0)

    def append(self, line: dict[str, Any]) -> None:
        """Hands one line to the operating system: it survives the death of this process."""
        self._file.write(json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, without an incomplete last one; none where there is no file."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def replace_json_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Replaces the lines of the file atomically."""
    with replacing(path) as beside, beside.open("wb") as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)


def _cut_torn_line(path: Path) -> None:
    if path.exists():
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            os.truncate(path, text.rfind(b"\n") + 1)
