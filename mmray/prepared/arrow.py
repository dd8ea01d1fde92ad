"""Puts one value into one Arrow cell, without a copy."""

from typing import Any

import numpy as np
import pyarrow as pa


def binary_cell(data: Any) -> pa.Array:
    """A large_binary array of one value that shares the memory of `data`: a numpy array, bytes, or an Arrow buffer."""
    buffer = pa.py_buffer(data)
    offsets = pa.py_buffer(np.asarray([0, buffer.size], dtype=np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, buffer])
