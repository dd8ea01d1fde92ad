"""Files to which lines of JSON are appended one by one, and which survive the death of their writer.

A line is one write of the operating system, so a reader finds whole lines, and at most one incomplete line at the end,
which the next writer cuts off.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from mmray.storage import replacing

BLOCK_BYTES = 1 << 16
"""Bytes in which the end of a file is looked at."""


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


def iter_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a file, without an incomplete last one; none where there is no file. Holds one at a time."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, without an incomplete last one; none where there is no file."""
    return list(iter_json_lines(path))


def last_json_line(path: Path) -> dict[str, Any] | None:
    """The last whole line of a file, read from its end; None where it has none, or there is no file."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        end = _end_of_lines(file)
        if end:
            start = _end_of_lines(file, end - 1)
            file.seek(start)
            line: dict[str, Any] = json.loads(file.read(end - start))
            return line
    return None


def replace_json_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Replaces the lines of the file atomically."""
    with replacing(path) as beside, beside.open("wb") as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)


def _cut_torn_line(path: Path) -> None:
    if path.exists():
        with path.open("rb") as file:
            end = _end_of_lines(file)
        if end < path.stat().st_size:
            os.truncate(path, end)


def _end_of_lines(file: IO[bytes], before: int | None = None) -> int:
    """The number of bytes up to and including the last line break; 0 without one. Reads the file from its end.

    before: only the bytes before this one count; None: all of them.
    """
    end = file.seek(0, os.SEEK_END) if before is None else before
    while end > 0:
        start = max(0, end - BLOCK_BYTES)
        file.seek(start)
        if (last := file.read(end - start).rfind(b"\n")) >= 0:
            return start + last + 1
        end = start
    return 0
