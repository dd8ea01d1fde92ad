"""Compiling loops: once a machine where a folder can be written, else once a process."""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Any], Any]:
    """numba's `njit`, without the lock of Python. What is compiled is kept on disk where numba finds a place for it:
    beside the source or in the home folder. Containers may have neither, and numba then refuses its cache."""

    def decorate(function: Any) -> Any:
        try:
            return njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:
            return njit(nogil=True, **options)(function)

    return decorate
