"""A cache of tiles on a local disk, for the epochs after the first.

A hit takes 2 ms where rendering a page takes 12 to 22, and 1.3 to 2.3 MB of disk where the JPEG takes 0.2 to 0.5 (six
tiles of 512 x 512). So the cache pays where the disk holds most of the data set. Measured alternatives: raw arrays are
read in 1 ms but take 4.7 MB, zstd takes 3 ms and saves a quarter of the bytes, lossless WebP and PNG take 25 to 40 ms;
only LZ4 is both small and much faster than rendering.

An entry is identified by a hash of everything that its pixels depend on: the image's file and its state, the plan
without its labels, the versions of the decoders. It carries that hash and a checksum, and is renamed into place, so
that a process that dies, or a full or broken disk, costs time and never yields a wrong tile.

The folder never holds more than `max_bytes`, however many processes share it: room is reserved, under a lock, before an
entry is written. When the folder is full, entries that no process has used for two days are deleted. Deleting those
unused longest would be wrong: an epoch reads every page once, so where the disk holds half of a data set each page
would be deleted just before its turn.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import PIL
import pyarrow as pa
from PIL import Image, features

from mmray.base.words import one_line
from mmray.errors import UserError
from mmray.images.header import MAX_PIXELS
from mmray.images.render import render_tiles
from mmray.images.source import ImageSource, source_state
from mmray.images.tiling import TilePlan

log = logging.getLogger("mmray")

PIXELS_VERSION = 3
"""Version of the pixels, raised when mmray makes other pixels of the same file and plan."""

FULL_SECONDS = 1800.0
"""How long, in seconds, a process stores nothing after no room could be made; making room lists the whole folder."""

UNUSED_SECONDS = 2 * 24 * 3600.0
"""Seconds after which an unused entry may be deleted: more than an epoch, or a pause and a restart, should take."""

_LOCK_TRIES, _LOCK_PAUSE = 20, 0.005

_MAGIC = b"mmraytl1"
_HEADER_BYTES = len(_MAGIC) + 16 + 4
_BOOKS = "booked"
_HALF_WRITTEN = ".half"
_LIBRARIES = (PIXELS_VERSION, PIL.__version__, features.version("jpg"), features.version("libjpeg_turbo"))


class TileCache:
    """Renders tiles and remembers them; each process has one, and all may share a folder on one machine's disk."""

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        """Creates the folder where it is missing; raises UserError where it cannot be created.

        max_bytes: the most bytes that all entries take.
        """
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self._codec = pa.Codec("lz4")
        self._store_again = 0.0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"tile cache {folder}: {one_line(error)}; name a folder on this machine's disk") from error

    def render_tiles(self, source: ImageSource, plan: TilePlan, *, max_pixels: int = MAX_PIXELS) -> list[Image.Image]:
        """Returns what `mmray.images.render_tiles` returns, and raises what it raises. Uncut pages are not cached."""
        key = _key(source, plan)
        if key is None or plan.size[0] * plan.size[1] > max_pixels:
            return render_tiles(source, plan, max_pixels=max_pixels)
        tiles = self._load(key, plan)
        if tiles is None:
            tiles = render_tiles(source, plan, max_pixels=max_pixels)
            if time.monotonic() >= self._store_again:
                self._store(key, tiles)
        return tiles

    def _path(self, key: bytes) -> Path:
        return self.folder / key.hex()[:2] / f"{key.hex()}.tiles"

    # ---------------------------------------------------------------- reading

    def _load(self, key: bytes, plan: TilePlan) -> list[Image.Image] | None:
        path = self._path(key)
        try:
            entry = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("tile cache %s: %s; the page is cut anew", path, one_line(error))
            return None
        try:
            return self._tiles(entry, key, plan)
        except (ValueError, OSError) as error:
            log.warning("tile cache %s: %s; the page is cut anew", path, one_line(error))
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def _tiles(self, entry: bytes, key: bytes, plan: TilePlan) -> list[Image.Image]:
        """Unpacks the tiles of an entry. Raises ValueError or OSError for a damaged one."""
        packed = memoryview(entry)[_HEADER_BYTES:]
        if entry[:_HEADER_BYTES] != _header(key, packed):
            raise ValueError("damaged")
        num_bytes = [3 * width * height for width, height in plan.tile_sizes]
        pixels = memoryview(self._codec.decompress(packed, decompressed_size=sum(num_bytes)))
        ends = np.cumsum(num_bytes).tolist()
        return [
            Image.frombytes("RGB", size, pixels[end - length : end])
            for size, length, end in zip(plan.tile_sizes, num_bytes, ends, strict=True)
        ]

    # ---------------------------------------------------------------- writing

    def _store(self, key: bytes, tiles: list[Image.Image]) -> None:
        packed = self._codec.compress(b"".join(tile.tobytes() for tile in tiles), asbytes=True)
        path = self._path(key)
        half = path.with_name(f"{uuid.uuid4().hex}{_HALF_WRITTEN}")
        try:
            path.parent.mkdir(exist_ok=True)
            try:
                if not self._book(half, _HEADER_BYTES + len(packed)):
                    self._store_again = time.monotonic() + FULL_SECONDS
                    return
                _fill(half, _header(key, packed) + packed)
                half.replace(path)
            finally:
                half.unlink(missing_ok=True)
        except BlockingIOError:
            return  # someone is making room: this page may be stored in the next epoch
        except OSError as error:
            self._store_again = time.monotonic() + FULL_SECONDS
            log.warning("tile cache %s: %s; pages are cut anew", self.folder, one_line(error))

    def _book(self, half: Path, num_bytes: int) -> bool:
        """Reserves room for an entry by a file of its size, which counting includes; returns False where there is no
        room."""
        if num_bytes > self.max_bytes:
            return False
        with (self.folder / _BOOKS).open("a+") as file:
            _lock(file)
            file.seek(0)
            booked_text = file.read()
            booked = int(booked_text) if booked_text.isdecimal() else None
            if booked is None or booked + num_bytes > self.max_bytes:
                booked = self._make_room(num_bytes)
            fits = booked + num_bytes <= self.max_bytes
            if fits:
                half.touch()
                os.truncate(half, num_bytes)
                booked += num_bytes
            file.truncate(0)
            file.write(str(booked))
        return fits

    def _make_room(self, num_bytes: int) -> int:
        """Counts the bytes of all entries, and deletes unused ones where `num_bytes` do not fit; returns the bytes that
        remain.

        A twentieth of the room is freed at once, so that counting stays rare.
        """
        entries = sorted(_entries(self.folder))
        total = sum(size for _, size, _ in entries)
        if total + num_bytes <= self.max_bytes:
            return total
        wanted = min(self.max_bytes - num_bytes, self.max_bytes * 19 // 20)
        unused_since = time.time() - UNUSED_SECONDS
        for used, size, path in entries:
            if total <= wanted or used >= unused_since:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total


def _lock(file: IO[str]) -> None:
    """Locks a file, waiting at most a tenth of a second. Raises BlockingIOError where another holds it longer."""
    for attempt in range(_LOCK_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt + 1 == _LOCK_TRIES:
                raise
            time.sleep(_LOCK_PAUSE)


def _key(source: ImageSource, plan: TilePlan) -> bytes | None:
    """Hashes everything that the tiles' pixels depend on; returns None for tiles that are not cached."""
    if not plan.is_tiled:
        return None
    if isinstance(source, bytes | bytearray | memoryview):
        image: object = hashlib.blake2b(source, digest_size=16).hexdigest()
    else:
        image = source_state(source)
    if image is None:
        return None
    pixels = (plan.size, plan.boxes, plan.tile_sizes, plan.upscale, plan.pad_color, plan.exact_pixels)
    return hashlib.blake2b(repr((image, pixels, _LIBRARIES)).encode(), digest_size=16).digest()


def _header(key: bytes, packed: bytes | memoryview) -> bytes:
    return _MAGIC + key + zlib.crc32(packed, zlib.crc32(key)).to_bytes(4, "little")


def _fill(half: Path, entry: bytes) -> None:
    """Writes into a file without changing its size meanwhile."""
    with half.open("r+b") as file:
        file.write(entry)


def _entries(folder: Path) -> Iterator[tuple[float, int, str]]:
    """Yields (time of last use, bytes, path) of every entry, including half-written ones."""
    for group in os.scandir(folder):
        if group.is_dir():
            for entry in os.scandir(group):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    yield status.st_mtime, status.st_size, entry.path
