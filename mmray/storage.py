"""Reads and writes files of any file system, local or by URI; a written file appears whole or not at all.

fsspec does the work (`s3://`, `gs://`, `memory://`, … when their packages are installed), with the credentials and
endpoints that its packages read from the environment, configuration files and roles. A local file is written under a
temporary name beside its place and renamed; object stores put an object whole, from memory, in parts when it is large
(S3: above 100 MB, up to 5 TB). So remote files need no rename, and a reader never sees half a file.

Listings are never cached: another machine may have written in between. Reads fetch just the requested range: fsspec's
read-ahead would fetch 5 to 50 MB for each jump.
"""

import contextlib
import errno
import functools
import os
import posixpath
import re
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem

from mmray.errors import PassingError, UserError

_VERSION_KEYS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
"""Names that file systems use for the version of a file, the most reliable first."""


_NO_CLIENTS = sys.stdlib_module_names | {"fsspec", "mmray"}
"""Packages whose errors are raised as they are; those of any other are the errors of a store's client."""

_REFUSED = {"ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch", "TokenRefreshRequired"}
"""S3's error codes for credentials that are wrong for every object."""


def file_system(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URI, and the path in it.

    A remote file system raises OSError (ConnectionError when the store cannot be reached) and, for missing or refused
    credentials, UserError; never an error of its client's package. Raises UserError when no package opens the URI.
    """
    if "://" not in uri:  # fsspec would read a name with two colons as a chain of file systems
        return LocalFileSystem(), LocalFileSystem._strip_protocol(uri)
    try:
        system, path = _plainly(fsspec.core.url_to_fs)(uri, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        lacks_s3 = isinstance(error, ImportError) and uri.startswith(("s3://", "s3a://"))
        remedy = "; on all nodes: pip install 'mmray[s3]'" if lacks_s3 else ""
        raise UserError(f"{uri}: this kind of address cannot be opened here: {error}{remedy}") from error
    return (system, path) if isinstance(system, LocalFileSystem) else (_Remote(system), path)


class _Remote:
    """Wraps a remote file system, or a file of one, so that it raises the errors that `file_system` promises."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __reduce__(self) -> tuple[Any, ...]:
        return _Remote, (self._inner,)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        return _plainly(value) if callable(value) else value

    def open(self, path: str, mode: str = "rb", **options: Any) -> "_Remote":
        return _Remote(_plainly(self._inner.open)(path, mode, **options))

    def exists(self, path: str) -> bool:
        """Tell whether something is there. fsspec itself would say no where the store cannot be asked."""
        return self._type_of(path) is not None

    def isfile(self, path: str) -> bool:
        return self._type_of(path) == "file"

    def isdir(self, path: str) -> bool:
        return self._type_of(path) == "directory"

    def _type_of(self, path: str) -> str | None:
        try:
            return str(self.info(path)["type"])
        except FileNotFoundError:
            return None

    def __enter__(self) -> "_Remote":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plainly(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def called(*arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except Exception as error:
            if plain := _plain(error):
                raise plain from error
            raise

    return called


def _plain(error: Exception) -> Exception | None:
    """The builtin error or UserError that corresponds to a client's error; None for an error to raise as it is."""
    code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
    text = " ".join(str(error).split())
    if code in _REFUSED:
        return UserError(f"the store refuses these credentials ({code}: {text}); renew them on every node")
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NO_CLIENTS:
        return None
    if "Credential" in type(error).__name__:
        return UserError(f"{text}; give credentials to every node, by its environment, a configuration file or a role")
    return ConnectionError(text or type(error).__name__)


def file_version(info: Mapping[str, Any]) -> str:
    """The version of a file, which changes when the file is replaced: its etag or modification time; "" without any.

    info: what fsspec's `info` returns.
    """
    return str(next((info[key] for key in _VERSION_KEYS if info.get(key)), ""))


_LASTING = (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError, FileNotFoundError)
"""Errors that a retry would raise again."""


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turns an OSError in the block into a UserError that names the place, the problem and the remedy.

    The error is a PassingError when a retry may succeed.
    """
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error.strerror or error or type(error).__name__).split())
        lasts = isinstance(error, _LASTING) or error.errno == errno.EROFS
        raise (UserError if lasts else PassingError)(f"{place}: {reason}; {_remedy(error)}") from error


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space there; then the same command continues"
    if error.errno == errno.EROFS:
        return "let this user write there, or choose another folder"
    if isinstance(error, PermissionError):
        return "let this user read and write there, or choose another folder"
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return "a file stands where a folder should be; move it, or choose another folder"
    if isinstance(error, IsADirectoryError):
        return "a folder stands there; give the name of a file"
    if isinstance(error, FileNotFoundError):
        return (
            "something else removes files there while this runs, or a node of the cluster does not see them; when all "
            "nodes do, the same command continues"
        )
    return "once that is mended, the same command continues"


_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors ends the message of an error that the system has raised."""


@contextmanager
def library_write_errors() -> Iterator[None]:
    """Raises as OSError the errors of torch and safetensors for a file that could not be written."""
    try:
        yield
    except Exception as error:
        text = str(error).partition("\n")[0]
        if isinstance(error, RuntimeError) and "inline_container" in text:  # torch's writer, which tells no reason
            raise OSError(errno.ENOSPC, f"probably no space left on device (torch: {text})") from error
        if type(error).__name__ == "SafetensorError" and (match := _OS_ERROR.search(text)):
            raise OSError(int(match[1]), os.strerror(int(match[1]))) from error
        raise


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yields the path of a local file to write, which replaces `path` when the block ends without an error.

    Whoever reads `path` gets the older file or the whole new one. When the block raises, the older file stays and the
    new one is deleted; the name of what a killed process leaves begins with a dot.

    sync: write the file to the disk first, so that this also holds after a loss of power.

    Raises OSError when the folder does not exist or cannot be written.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield beside
        if sync:
            with beside.open("rb") as file:
                os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@dataclass(frozen=True)
class FileState:
    """The size and version of a file, which differ after the file is replaced."""

    size: int
    version: str


def arrow_file_system(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The Arrow file system of a path or URI, on top of fsspec, and the path in it. Raises what `file_system` does."""
    system, path = file_system(uri)
    inner = system._inner if isinstance(system, _Remote) else system  # Ray compares file systems
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(inner)), path


@dataclass(frozen=True)
class Folder:
    """A folder by local path or URI. Names inside it are relative, with forward slashes."""

    uri: str

    @cached_property
    def _located(self) -> tuple[Any, str]:
        return file_system(self.uri)

    @property
    def is_local(self) -> bool:
        return isinstance(self._located[0], LocalFileSystem)

    def path(self, name: str = "") -> str:
        """The full path of a name, as the file system writes it."""
        root = self._located[1]
        return posixpath.join(root, name) if name else root

    def create(self) -> None:
        """Make the folder and its parents. Object stores have no folders: a missing bucket is an error later."""
        if self.is_local:
            self._located[0].makedirs(self.path(), exist_ok=True)

    def exists(self, name: str = "") -> bool:
        return bool(self._located[0].exists(self.path(name)))

    def names(self) -> list[str]:
        """Names of the files directly inside, sorted; empty when the folder does not exist."""
        return sorted(self.sizes())

    def sizes(self) -> dict[str, int]:
        """Sizes in bytes of the files directly inside, by name; empty when the folder does not exist."""
        system, root = self._located
        try:
            entries = system.ls(root, detail=True)
        except FileNotFoundError:
            return {}
        names = {posixpath.basename(str(entry["name"])): int(entry["size"] or 0) for entry in entries}
        names.pop("", None)  # left by consoles of object stores for a "folder"
        return names

    def files(self) -> dict[str, FileState]:
        """States of all files in the folder and its subfolders, by name."""
        system, root = self._located
        entries = system.find(root, detail=True)
        states = {path: FileState(int(info["size"] or 0), file_version(info)) for path, info in entries.items()}
        return {path.removeprefix(root).lstrip("/"): state for path, state in sorted(states.items())}

    def get(self, name: str, target: Path) -> None:
        """Copy a file of any size to a local path."""
        self._located[0].get_file(self.path(name), str(target))

    def put(self, source: Path, name: str) -> None:
        """Copy a local file of any size to a name."""
        self._located[0].put_file(str(source), self.path(name))

    def open(self, name: str) -> IO[bytes]:
        """Open a file to read; each read of a remote file is a request for just its range."""
        return self._located[0].open(self.path(name), "rb", cache_type="none")

    def read(self, name: str) -> bytes:
        return self._located[0].cat_file(self.path(name))

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all; an older file of the name is replaced."""
        if not self.is_local:
            self._located[0].pipe_file(self.path(name), data)
            return
        with self.writing(name) as file:
            file.write(data)

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """Yields a file to write, which gets its name when the block ends without an error, and else is deleted."""
        if not self.is_local:
            # Closing a remote file commits what it holds, after an error too; so nothing is sent before the end.
            with tempfile.NamedTemporaryFile(prefix="mmray-") as kept:
                yield kept
                kept.flush()
                self._located[0].put_file(kept.name, self.path(name))
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as beside, beside.open("wb") as file:
            yield file

    def remove(self, name: str = "") -> None:
        """Delete a file, or with no name the whole folder."""
        self._located[0].rm(self.path(name), recursive=True)

    def remove_tree(self, name: str) -> None:
        """Delete a file, or a folder with everything in it; no error when it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            self._located[0].rm(self.path(name), recursive=True)

    def remove_files(self, names: Iterable[str]) -> None:
        """Delete files, in few requests when the folder is remote; missing files are no error."""
        if not self.is_local:
            if paths := [self.path(name) for name in names]:
                self._located[0].rm(paths)
            return
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self.remove(name)
