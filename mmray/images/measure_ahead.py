"""Measures images in object storage by many requests at a time.

A header is 0.2 ms of work and, in object storage, 20 to 50 ms of waiting. So the images that a chunk of rows names are
requested up to AHEAD images before the row that is encoded. Results, errors and their order are those of one request
after another. Local files are measured in turn, because threads would only cost time there.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Protocol

from mmray.images.header import Measured
from mmray.images.source import ImageSource

AHEAD = 32
"""The most requests that are under way or done before their image's turn."""


class Measure(Protocol):
    """Measures an image, as `mmray.images.header.measured` or a `SizeCache` does."""

    def __call__(self, source: ImageSource, *, max_pixels: int, one_frame: bool) -> Measured: ...


class MeasureAhead:
    """Measures expected images ahead of the calls that ask for them."""

    def __init__(self, measure: Measure, *, max_pixels: int, one_frame: bool) -> None:
        """Measures with `measure`. max_pixels, one_frame: its arguments in every call."""
        self._measure, self._max_pixels, self._one_frame = measure, max_pixels, one_frame
        self._order: dict[str, int] = {}
        self._sources: list[str] = []
        self._results: list[Future[Measured]] = []

    def expect(self, sources: Iterable[str]) -> None:
        """Announces the URIs that calls will name next, roughly in this order; earlier ones are dropped."""
        for result in self._results:
            result.cancel()
        self._sources = list(dict.fromkeys(sources))
        self._order = {source: number for number, source in enumerate(self._sources)}
        self._results = []

    def __call__(self, source: ImageSource) -> Measured:
        """Measures an image. Raises what `mmray.images.header.measured` raises."""
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
