"""The TensorBoard tracker: files in the run's folder, always written."""

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

TENSORBOARD_FOLDER = "tensorboard"


class TensorBoard:
    """Writes a run's numbers for TensorBoard and makes it hide earlier values of steps after `step`."""

    def __init__(self, run: Path, step: int) -> None:
        self._writer = SummaryWriter(str(run / TENSORBOARD_FOLDER), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of a step, by name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is still in memory."""
        self._writer.close()
