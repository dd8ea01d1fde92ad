"""Where the checks run: on one GPU, on several, or, as far as they can, on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

CPU = torch.device("cpu")
PEAK_TFLOPS = {
    "H200": 989, "H100": 989, "GH200": 989, "B200": 2250, "A100": 312, "A10G": 70, "A10": 125, "L40S": 362, "L4": 121,
    "4090": 165, "3090": 71, "V100": 125,
}  # fmt: skip
"""Dense bf16 TFLOP/s (V100: fp16) by a part of the device's name, from the makers' data sheets."""


@dataclass(frozen=True)
class Place:
    """The devices that the checks have, and a folder."""

    device: torch.device
    gpus: int
    """Number of GPUs; 0 on a CPU."""
    folder: Path

    @classmethod
    def here(cls, folder: Path) -> "Place":
        """The GPUs of this machine, or its CPU where there is none."""
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return cls(torch.device("cuda", 0) if gpus else CPU, gpus, folder)

    @property
    def name(self) -> str:
        """The device's name."""
        return torch.cuda.get_device_name(self.device) if self.gpus else "CPU"

    @property
    def peak_flops(self) -> float | None:
        """The device's peak in bf16; None where it is not known."""
        named = [peak for part, peak in PEAK_TFLOPS.items() if part in self.name]
        return named[0] * 1e12 if named else None

    def wait(self) -> None:
        """Waits for all that the device has been given."""
        if self.gpus:
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Check:
    """One check. run: returns what it measured, in words; raises AssertionError where it fails.

    needs: what it cannot do without; "": its part for a CPU runs without a GPU.
    """

    name: str
    run: Callable[[Place], str]
    needs: Literal["", "a GPU", "several GPUs"] = ""


@dataclass(frozen=True)
class Row:
    """The result of a check."""

    name: str
    state: Literal["ok", "FAILED", "skipped"]
    words: str


def result(check: Check, place: Place) -> Row:
    """Runs a check; an error of any kind is a failure."""
    lacks = (check.needs == "a GPU" and not place.gpus) or (check.needs == "several GPUs" and place.gpus < 2)
    if lacks:
        return Row(check.name, "skipped", f"needs {check.needs}")
    try:
        return Row(check.name, "ok", check.run(place))
    except Exception as error:  # noqa: BLE001 (the others still run)
        return Row(check.name, "FAILED", " ".join(f"{type(error).__name__}: {error}".split())[:400])


def markdown(rows: list[Row], head: str) -> str:
    """The results as one table, below a line on the machine."""
    cells = [(row.name, row.state, row.words.replace("|", "\\|")) for row in rows]
    lines = [head, "", "| check | result | measured |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(cell)} |" for cell in cells)]) + "\n"


def milliseconds(place: Place, work: Callable[[], Any], repeats: int = 10) -> float:
    """The least time of some work, all of it done; the first run does not count."""
    from benchmarks.common import best_seconds

    def whole() -> None:
        work()
        place.wait()

    return 1e3 * best_seconds(whole, repeats)
