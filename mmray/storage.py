"""Files of any file system, local or a URI, with writes that appear whole or not at all.

fsspec does the work (`s3://`, `gs://`, `memory://`, … as far as their packages are installed). A local file is written
beside its place and renamed over it; object stores put an object whole by themselves.
"""

import errno
import io
import os
import posixpath
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mmray.errors import UserError

_VERSION_KEYS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
"""What file systems call the state of a file, the surest first."""


def file_version(info: Mapping[str, Any]) -> str:
    """What tells a file from one that replaced it: etag or modification time, of fsspec's `info`. "" for none."""
    return str(next((info[key] for key in _VERSION_KEYS if info.get(key)), ""))


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Errors of a file system, inside, as a UserError: the place, what is wrong, the remedy."""
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error.strerror or error or type(error).__name__).split())
        raise UserError(f"{place}: {reason}; {_remedy(error)}") from error


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space there; then the same command continues"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return "let this user write there, or choose another folder"
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return "a file stands where a folder should be; move it, or choose another folder"
    if isinstance(error, FileNotFoundError):
        return "something else removes files there while this runs; the same command continues"
    return "once that is mended, the same command continues"


@dataclass(frozen=True)
class Folder:
    """A folder by local path or URI. Names inside it are relative, with forward slashes."""

    uri: str

    @cached_property
    def _located(self) -> tuple[Any, str]:
        try:
            return fsspec.core.url_to_fs(self.uri)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.uri}: this kind of address cannot be opened here: {error}") from error

    @property
    def is_local(self) -> bool:
        return isinstance(self._located[0], LocalFileSystem)

    def path(self, name: str = "") -> str:
        """The full path of a name, as the file system writes it."""
        root = self._located[1]
        return posixpath.join(root, name) if name else root

    def create(self) -> None:
        """Make the folder and its parents; nothing to do on object stores."""
        self._located[0].makedirs(self.path(), exist_ok=True)

    def exists(self, name: str = "") -> bool:
        return bool(self._located[0].exists(self.path(name)))

    def names(self) -> list[str]:
        """Names of the files right inside, sorted; empty when the folder does not exist."""
        system, root = self._located
        if not system.exists(root):
            return []
        system.invalidate_cache(root)
        return sorted(posixpath.basename(str(path)) for path in system.ls(root, detail=False))

    def sizes(self) -> dict[str, int]:
        """Sizes in bytes of the files right inside, by name; empty when the folder does not exist."""
        system, root = self._located
        if not system.exists(root):
            return {}
        system.invalidate_cache(root)
        found = system.ls(root, detail=True)
        return {posixpath.basename(str(each["name"])): int(each["size"] or 0) for each in found}

    def open(self, name: str) -> IO[bytes]:
        return self._located[0].open(self.path(name), "rb")

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all; an older file of the name is replaced."""
        with self.writing(name) as file:
            file.write(data)

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """A file to write to, which takes its name when the block ends well and leaves nothing when it does not."""
        if not self.is_local:
            # Closing a remote file commits what it holds, after an error too; so nothing is sent before the end.
            buffer = io.BytesIO()
            yield buffer
            self._located[0].pipe_file(self.path(name), buffer.getvalue())
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with beside.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)

    def remove(self, name: str = "") -> None:
        """Delete a file, or with no name the whole folder."""
        self._located[0].rm(self.path(name), recursive=True)
