"""Sizes of images in object storage, asked for by many requests at a time.

A header is 0.2 ms of work and, in object storage, 20 to 50 ms of waiting. So the images that a chunk of rows names are
asked for AHEAD requests ahead of the row that is encoded: results, errors and their order are those of asking one
after another. Local files are not: threads would only cost there.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Protocol

from mmray.images.header import Measured
from mmray.images.source import ImageSource

AHEAD = 32
"""Requests that are under way or done before their image's turn."""


class Measure(Protocol):
    """`measured`, or that of a `SizeCache`."""

    def __call__(self, source: ImageSource, *, max_pixels: int, one_frame: bool) -> Measured: ...


class MeasureAhead:
    """A `Measure` that begins early with the images it is told of."""

    def __init__(self, measure: Measure, *, max_pixels: int, one_frame: bool) -> None:
        """max_pixels, one_frame: those of every call."""
        self._measure, self._max_pixels, self._one_frame = measure, max_pixels, one_frame
        self._order: dict[str, int] = {}
        self._sources: list[str] = []
        self._results: list[Future[Measured]] = []

    def expect(self, sources: Iterable[str]) -> None:
        """The URIs that calls will name next, about in this order; those of before are forgotten."""
        for result in self._results:
            result.cancel()
        self._sources = list(dict.fromkeys(sources))
        self._order = {source: number for number, source in enumerate(self._sources)}
        self._results = []

    def __call__(self, source: ImageSource) -> Measured:
        """The size of an image; errors as `mmray.images.header.measured`."""
        number = self._order.get(source) if isinstance(source, str) else None
        if number is None:
            return self._measured(source)
        for following in self._sources[len(self._results) : number + AHEAD]:
            self._results.append(self._threads.submit(self._measured, following))
        return self._results[number].result()

    def _measured(self, source: ImageSource) -> Measured:
        return self._measure(source, max_pixels=self._max_pixels, one_frame=self._one_frame)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(AHEAD, thread_name_prefix="measure")
