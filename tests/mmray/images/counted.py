"""A remote file system as object stores are: files are read by ranges, and every request is counted."""

from typing import Any, ClassVar

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class CountedFile(AbstractBufferedFile):
    """A file of which ranges are fetched."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        data = self.fs.contents[self.path][start:end]
        self.fs.ranges.append((start, start + len(data)))
        return data


class CountedFileSystem(AbstractFileSystem):
    """Files by name in `contents`; `ranges` and `num_stats` tell what was asked for."""

    protocol = "counted"
    cachable = True
    contents: ClassVar[dict[str, bytes]] = {}
    etags: ClassVar[dict[str, str]] = {}
    ranges: ClassVar[list[tuple[int, int]]] = []
    num_stats: ClassVar[int] = 0

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        CountedFileSystem.num_stats += 1
        if path not in self.contents:
            raise FileNotFoundError(path)
        state = {"ETag": self.etags[path]} if path in self.etags else {}
        return {"name": path, "size": len(self.contents[path]), "type": "file", **state}

    def _open(self, path: str, mode: str = "rb", block_size: Any = None, **options: Any) -> CountedFile:
        return CountedFile(self, path, mode, block_size, size=self.info(path)["size"], **options)

    @property
    def num_bytes(self) -> int:
        """Bytes sent so far."""
        return sum(stop - start for start, stop in self.ranges)
