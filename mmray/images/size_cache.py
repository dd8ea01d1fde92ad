"""A cache of image sizes, kept from one prepare to the next, so that the next one reads no image.

One Parquet file holds a line for each image: a hash of its path, a hash of path, size in bytes and modification
time (or etag), and the size in pixels. An image whose file has changed has a different second hash and is measured
again. An image takes 24 bytes in memory (10 million take 240 MB), in plain arrays that processes on a machine can
share; a lookup is a binary search. An image with a flaw in its header is not cached, so that the flaw is noted each
time.

There are many readers and one writer: each actor gets what `read_sizes` returned, asks its `SizeCache` for sizes, and
returns what it had to measure (`take_new`); the process that started the actors merges these tables at the end, and
each time that a quarter more has been measured (`kept_sizes`). What a crash loses is measured again. A cache is
optional: one that cannot be read is a warning.
"""

import hashlib
import logging
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmray.base.words import one_line
from mmray.images.header import MAX_PIXELS, Measured, measured
from mmray.images.source import ImageSource, source_state
from mmray.storage import Folder

log = logging.getLogger("mmray")

FORMAT_VERSION = 4
"""Version of the cache, raised when `measured` returns something else for some file; older caches are then unused."""

KEPT_ROWS = 100_000
"""The least number of newly measured images for which a cache is written before the end."""

FILE_NAME = "image-sizes.parquet"
"""The name of the file where a cache is named by its folder."""

SIZES = pa.schema(
    [
        ("place", pa.uint64()),  # hash of the image's path or URI; ascending
        ("state", pa.uint64()),  # hash of path or URI, size in bytes, modification time or etag
        ("width", pa.int32()),  # pixels, upright
        ("height", pa.int32()),
    ]
)

Entry = tuple[int, int, int, int]


class SizeCache:
    """Measures images and remembers their sizes; each process has one. known: the table of `read_sizes`, not copied."""

    def __init__(self, known: pa.Table) -> None:
        self._places, self._states, self._widths, self._heights = (known[name].to_numpy() for name in SIZES.names)
        self._new: dict[int, Entry] = {}

    def image_size(self, source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
        """Returns what `mmray.images.image_size` returns, and raises what it raises."""
        return self.measured(source, max_pixels=max_pixels).size

    def measured(
        self, source: ImageSource, *, max_pixels: int = MAX_PIXELS, one_frame: bool = False
    ) -> Measured:  # fmt: skip
        """Measures an image as `mmray.images.header.measured` does; for a known image only the file's state is read.

        Only the sizes of images in a file with a modification time or etag are remembered. An image that raises an
        error or has a note is read each time.
        """
        keys = _keys(source, one_frame)
        known = keys and self._find(*keys)
        if known and known[0] * known[1] <= max_pixels:
            return Measured(known)
        measurement = measured(source, max_pixels=max_pixels, one_frame=one_frame)
        if keys and not measurement.note:
            self._new[keys[0]] = (*keys, *measurement.size)
        return measurement

    def take_new(self) -> pa.Table:
        """Returns and drops the sizes measured since the last call (`SIZES`, in no order), so that memory stays
        flat."""
        taken, self._new = list(self._new.values()), {}
        return _table(taken)

    def _find(self, place: int, state: int) -> tuple[int, int] | None:
        if place in self._new:
            _, known_state, width, height = self._new[place]
            return (width, height) if known_state == state else None
        at = int(np.searchsorted(self._places, np.uint64(place)))
        if at == len(self._places) or self._places[at] != place or self._states[at] != state:
            return None
        return int(self._widths[at]), int(self._heights[at])


def read_sizes(uri: str) -> pa.Table:
    """Reads the sizes of a cache (`SIZES`); an empty table where the file does not exist, or, with a warning, where it
    is damaged.

    uri: path or URI of the file, which ends with .parquet, or of its folder.

    Raises UserError for an unknown kind of URI.
    """
    folder, name = _located(uri)
    try:
        return _checked(pq.read_table(pa.BufferReader(folder.read(name))))
    except FileNotFoundError:
        pass
    except Exception as error:  # noqa: BLE001, a parser of foreign bytes may raise anything
        log.warning("size cache %s: %s; the sizes of images are measured anew", folder.path(name), one_line(error))
    return _table([])


def merge_sizes(uri: str, new_tables: Iterable[pa.Table]) -> int:
    """Adds what readers measured (`SizeCache.take_new`) to a cache; returns the number of images it then holds.

    The last of several entries for one path is kept. The file is replaced whole or not at all.
    """
    measured = [table for table in new_tables if len(table)]
    known = read_sizes(uri)
    if measured:
        known = _merged([known, *measured])
        folder, name = _located(uri)
        facts = {"format_version": str(FORMAT_VERSION), "digest": _digest(known)}
        with folder.writing(name) as file:
            pq.write_table(known.replace_schema_metadata(facts), file)
    return len(known)


class KeptSizes:
    """The driver's side of a cache. known: the sizes at the beginning, for every reader."""

    def __init__(self, uri: str) -> None:
        """Reads the cache. Raises UserError for an unknown kind of URI."""
        self.known = read_sizes(uri)
        self._uri, self._kept = uri, len(self.known)
        self._measured: list[pa.Table] = []

    def add(self, measured: Iterable[pa.Table]) -> None:
        """Adds the sizes that readers had to measure, and writes them once they are many: a kill loses at most a fifth
        of what the cache would hold, and a large cache is written rarely."""
        self._measured += [table for table in measured if len(table)]
        if sum(map(len, self._measured)) >= max(KEPT_ROWS, self._kept // 4):
            self.keep()

    def keep(self) -> None:
        """Writes what was added. A cache that cannot be written is a warning."""
        try:
            self._kept = merge_sizes(self._uri, self._measured)
        except Exception as error:  # noqa: BLE001, a remote file system may raise anything
            log.warning("size cache %s: %s; it stays as it was", self._uri, one_line(error))
        self._measured = []


@contextmanager
def kept_sizes(uri: str) -> Iterator[KeptSizes]:
    """Yields the cache at `uri`; the sizes added by then are written when the block ends, with or without an error.

    Raises UserError for an unknown kind of URI.
    """
    sizes = KeptSizes(uri)
    try:
        yield sizes
    finally:
        sizes.keep()


def _located(uri: str) -> tuple[Folder, str]:
    if not uri.endswith(".parquet"):
        return Folder(uri), FILE_NAME
    parent, name = posixpath.split(uri)
    return Folder(parent or "."), name


def _keys(source: ImageSource, one_frame: bool) -> tuple[int, int] | None:
    """Returns the hashes (place, state) of an image's file, None where it has no file. one_frame: whether the size was
    measured for a file of a single frame."""
    file_state = source_state(source)
    if file_state is None:
        return None
    return _hash(file_state[0]), _hash("\0".join([*file_state, "one frame"] if one_frame else file_state))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def _table(entries: Sequence[Entry]) -> pa.Table:
    columns = zip(*entries, strict=True) if entries else [()] * len(SIZES)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, SIZES)], schema=SIZES)


def _merged(tables: Sequence[pa.Table]) -> pa.Table:
    """Merges tables to one entry for each place, the last one, ascending."""
    table = pa.concat_tables(table.replace_schema_metadata(None) for table in tables)
    _, from_end = np.unique(table["place"].to_numpy()[::-1], return_index=True)
    return table.take(len(table) - 1 - from_end).combine_chunks()


def _checked(table: pa.Table) -> pa.Table:
    """Returns the table if it is bit by bit what `merge_sizes` wrote; else raises ValueError."""
    facts = table.schema.metadata or {}
    version = facts.get(b"format_version", b"").decode()
    if version != str(FORMAT_VERSION):
        raise ValueError(f"format_version {version!r}, this mmray writes {FORMAT_VERSION}")
    table = table.replace_schema_metadata(None)
    if not table.schema.equals(SIZES) or facts.get(b"digest", b"").decode() != _digest(table):
        raise ValueError("the file is damaged")
    return table


def _digest(table: pa.Table) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in SIZES.names:
        digest.update(np.ascontiguousarray(table[name].to_numpy()).data)
    return digest.hexdigest()
