"""Compiles loops: once a machine when the cache folder can be written, else once a process."""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Compile with numba's `njit`, without Python's global lock, and with a cache on disk where that is possible.

    numba writes its cache beside the source or in the home folder. It refuses to cache when a container lets it write
    to neither; the function is then compiled in each process.
    """

    def decorate(function: Any) -> Any:
        try:
            return njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:
            return njit(nogil=True, **options)(function)

    return decorate
