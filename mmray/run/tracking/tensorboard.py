"""The TensorBoard tracker: files in the run's folder, always written."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from mmray.run.scoring.results import SHOWN_TEXTS, RowResult, as_markdown

TENSORBOARD_FOLDER = "tensorboard"
FILE_SCALARS = 50_000
"""Numbers in one file, about 3 MB, after which another is begun: an object store gets a file whole when it has
grown."""


class TensorBoard:
    """Writes a run's numbers for TensorBoard and makes it hide earlier values of steps after `step`."""

    def __init__(self, run: Path, step: int) -> None:
        self._folder, self._scalars = str(run / TENSORBOARD_FOLDER), 0
        self._writer = SummaryWriter(self._folder, purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of a step, by name."""
        if self._scalars >= FILE_SCALARS:
            self._writer.close()
            self._writer, self._scalars = SummaryWriter(self._folder), 0
        self._scalars += len(values)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def show(self, step: int, texts: Sequence[RowResult]) -> None:
        """Writes texts with their references, and the pictures."""
        for number, text in enumerate(texts[:SHOWN_TEXTS]):
            self._writer.add_text(f"eval/text_{number}", as_markdown(text), step)
            if text.picture:
                pixels = np.asarray(Image.open(io.BytesIO(text.picture)).convert("RGB"))
                self._writer.add_image(f"eval/page_{number}", pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Writes what is still in memory."""
        self._writer.close()
