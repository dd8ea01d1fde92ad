"""The numbers of a run's training steps by column, 8 bytes each: a run of 10^6 steps takes 100 MB, not 1.5 GB."""

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

_UNKNOWN = float("nan")


class StepTable:
    """Columns of numbers, one value of each for every training step."""

    def __init__(self) -> None:
        self._columns: dict[str | tuple[str, str], array[float]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, line: Mapping[str, Any]) -> None:
        """Appends a step. line: of metrics.jsonl; numbers by name are columns of their own."""
        for key, value in line.items():
            if isinstance(value, dict):
                for name, inner in value.items():
                    self._put((key, name), inner)
            else:
                self._put(key, value)
        self._count += 1

    def column(self, name: str) -> np.ndarray:
        """A value of every step, float64 [steps], not to be written to; NaN where a step has none or it is null."""
        return self._whole(name)

    def columns_by_name(self, key: str) -> dict[str, np.ndarray]:
        """The values that steps have by name under a key, in the order in which names first came."""
        keys = [inner for inner in self._columns if isinstance(inner, tuple) and inner[0] == key]
        return {inner[1]: self._whole(inner) for inner in keys}

    def _put(self, key: str | tuple[str, str], value: float | None) -> None:
        column = self._columns.get(key)
        if column is None:
            column = self._columns[key] = array("d")
        if missing := self._count - len(column):
            column.extend([_UNKNOWN] * missing)
        column.append(_UNKNOWN if value is None else value)

    def _whole(self, key: str | tuple[str, str]) -> np.ndarray:
        column = self._columns.get(key)
        if column is None or len(column) < self._count:
            padded = np.full(self._count, np.nan)
            if column is not None:
                padded[: len(column)] = column
            return padded
        values = np.frombuffer(column.tobytes() if not self._count else column)
        values.flags.writeable = False
        return values
