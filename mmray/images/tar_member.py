"""Names and opens images that are part of a `.tar`: a range of bytes of a path or URI.

    /data/pages-0001.tar#0007.jpg@1536+20481        the bytes [1536, 1536 + 20481), which the shard calls 0007.jpg

From a remote file only the bytes that are read are fetched, in blocks, without asking for its size first: a header is
one request.
"""

import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_WRITTEN = re.compile(r"(?P<file>.+?\.tar)#(?P<name>.*)@(?P<start>\d+)\+(?P<size>\d+)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class PartOfFile:
    """A range of bytes of a file.

    file: the path or URI, which ends with .tar.
    name: the name of the part, for a person.
    start, size: the first byte and the number of bytes.
    """

    file: str
    name: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.file}#{self.name}@{self.start}+{self.size}"

    @classmethod
    def written(cls, text: str) -> "PartOfFile | None":
        """Parses a text that names a part; returns None for one that names a whole file."""
        match = _WRITTEN.fullmatch(text) if "#" in text else None
        return cls(match["file"], match["name"], int(match["start"]), int(match["size"])) if match else None

    def open_local(self, block_bytes: int) -> io.BufferedReader:
        """Opens the part of a local file for reading. Raises OSError."""
        file = open(self.file, "rb")  # noqa: SIM115  closed with its part
        return self._open(lambda start, stop: os.pread(file.fileno(), stop - start, start), block_bytes, file.close)

    def open_in(self, system: Any, path: str, block_bytes: int) -> io.BufferedReader:
        """Opens the part of the file `path` in an fsspec file system. Raises OSError, for a missing file at once."""
        opened = self._open(lambda start, stop: system.cat_file(path, start=start, end=stop), block_bytes, lambda: None)
        opened.peek(1)
        return opened

    def _open(
        self, fetch: Callable[[int, int], bytes], block_bytes: int, close: Callable[[], None]
    ) -> io.BufferedReader:
        return io.BufferedReader(_Range(self, fetch, close), max(1, min(block_bytes, self.size)))


class _Range(io.RawIOBase):
    """Presents the part as a file that begins at 0."""

    def __init__(self, part: PartOfFile, fetch: Callable[[int, int], bytes], close: Callable[[], None]) -> None:
        self.name = str(part)
        self._part, self._fetch, self._close, self._at = part, fetch, close, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._part.size}[whence]
        if base + offset < 0:
            raise ValueError(f"{self.name}: seek to {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        start = self._part.start + self._at
        stop = min(start + len(buffer), self._part.start + self._part.size)
        data = self._fetch(start, stop) if start < stop else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._close()
        super().close()
