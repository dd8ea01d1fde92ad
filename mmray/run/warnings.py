"""A file that collects the warnings of processes whose output no one reads.

What actors and training workers print stays in files of Ray on their own machines, and jobs show it only with
--verbose. So these processes also append their warnings to one file in the run's folder, which the driver watches.
Object stores cannot append: there each process writes a file of its own, whole with each warning, and `RunFolder.fetch`
joins them. A warning that cannot be written is lost, because a warning is never worth an error.
"""

import contextlib
import logging
import os
import re
import socket
import uuid
from collections.abc import Iterable
from pathlib import Path

from mmray.errors import UserError
from mmray.storage import Folder

WARNINGS_FILE = "warnings.log"
WARNINGS_FOLDER = "warnings"
"""Folder beside the file, in an object store, with the files of all processes."""

MOST_WARNINGS = 1000
"""The most warnings that one process writes."""


LIBRARIES = ("transformers", "DeepSpeed")
"""Loggers of libraries whose warnings concern the numbers of training: weights drawn at random, settings ignored."""

_IDLE = re.compile(r"Setting accelerator to CPU|Unrecognized keys in `rope_parameters`.*\{'mrope_section'\}")
"""Warnings of these libraries that are not kept, because they occur in runs in which nothing is wrong."""


def keep_warnings(path: str | Path, libraries: Iterable[str] = ()) -> logging.Handler:
    """Appends mmray's warnings in this process to a file from now on, each message once; they are printed as before.

    path: path or URI of the file. libraries: other loggers whose warnings are kept, too.
    """
    log = logging.getLogger("mmray")
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())  # what Python does by itself while there is no handler
    handler = _Sender(str(path)) if "://" in str(path) else _Appender(Path(path))
    log.addHandler(handler)
    for name in libraries:
        logging.getLogger(name).addHandler(handler)
    return handler


def read_warnings(path: str | Path, since: int = 0) -> list[str]:
    """The lines of the file, from byte `since` on; none where there is no file."""
    try:
        with Path(path).open("rb") as file:
            file.seek(since)
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


class _Keeper(logging.Handler):
    """A log handler that passes on each message once, as one line."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: set[str] = set()
        self.setFormatter(logging.Formatter(f"%(asctime)s {socket.gethostname()}:{os.getpid()} %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message in self._seen or len(self._seen) >= MOST_WARNINGS or _IDLE.match(message):
            return
        self._seen.add(message)
        self.keep(" ".join(self.format(record).split()))

    def keep(self, line: str) -> None:
        raise NotImplementedError


class _Appender(_Keeper):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def keep(self, line: str) -> None:
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


class _Sender(_Keeper):
    def __init__(self, uri: str) -> None:
        super().__init__()
        self._folder = Folder(f"{uri.rpartition('/')[0]}/{WARNINGS_FOLDER}")
        self._name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.log"
        self._lines = ""

    def keep(self, line: str) -> None:
        self._lines += f"{line}\n"
        with contextlib.suppress(OSError, UserError):
            self._folder.write(self._name, self._lines.encode())
