"""Pictures in which no pixel is like its neighbour: a row, column or page in the wrong place always shows."""

import numpy as np
from PIL import Image


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """An RGB picture of `size`, (width, height); another one for each seed."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)
