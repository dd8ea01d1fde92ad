"""The folder of a training run, by path or URI: its contents, and how processes on many machines share it.

A local folder, which all nodes mount, is used as it is: processes append to its files and read its checkpoints. An
object store can neither append nor rename, so each process keeps a copy on its own disk, and the calls below say when
its contents are sent or fetched:

    records       metrics.jsonl, history.jsonl, tensorboard/, …: rank 0 alone writes them. It fetches them when it
                  begins, and publishes what has changed every PUBLISH_SECONDS and before each checkpoint is sent:
                  whoever resumes from a checkpoint finds the records of all its steps
    warnings      every process that has some writes a file of its own below warnings/; fetching joins them
    checkpoints   are sent by Ray Train; fetched whole for a restore, or as a *shadow* for an inspection: names, sizes
    and
                  the contents of small files
    model         is sent by the driver, at the end, and never fetched
    damaged       a checkpoint that is passed over gets an empty object beside it, `damaged_NAME`; locally it is renamed

A log that grows goes up in pieces (`log_pieces.py`), any other record whole when it has changed.
"""

import atexit
import logging
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from mmray.base.words import one_line
from mmray.run.log_pieces import SentLog, fetch_log, log_of, publish_log
from mmray.run.warnings import WARNINGS_FILE, WARNINGS_FOLDER
from mmray.storage import FileState, Folder, replacing

log = logging.getLogger(__name__)

DAMAGED = "damaged_"
MODEL_FOLDER = "model"
"""Folder of the exported model, which is not one of the run's records."""
_CHECKPOINT = re.compile(r"checkpoint_\d+_")
PUBLISH_SECONDS = 15
SMALL_BYTES = 1 << 16
"""Largest file that an inspection of a checkpoint reads: a driver acts on the cursor before any worker has read it
all."""
_TRANSFERS = 8
_PLACE = "cursor.json"
_STOP = ".stop"
"""File that asks the run to stop. It is hidden, so it is not one of the records."""
_RAY_TRAIN_MEMORY = "checkpoint_manager_snapshot.json"
"""Ray Train's own file in the same folder, which is not one of the run's records."""


class RunFolder:
    """A run's folder as one process sees it."""

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri)
        self._remote = None if "://" not in self.uri else Folder(self.uri)
        self._fetched: dict[str, FileState] = {}
        self._published: dict[str, tuple[int, int]] = {}
        self._logs: dict[str, SentLog] = {}
        self._is_publishing = threading.Lock()

    @classmethod
    def of(cls, run: "str | Path | RunFolder") -> "RunFolder":
        """The `RunFolder` of a path or URI; a `RunFolder` is returned as it is."""
        return run if isinstance(run, RunFolder) else cls(run)

    def __str__(self) -> str:
        return self.uri

    @cached_property
    def path(self) -> Path:
        """The local folder in which this process reads and writes the records: the run's own, or a copy deleted with
        the process."""
        if self._remote is None:
            return Path(self.uri)
        copy = tempfile.mkdtemp(prefix="mmray-run-")
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        return Path(copy)

    @property
    def shared_path(self) -> Path | None:
        """The folder that all nodes mount; None for an object store."""
        return self.path if self._remote is None else None

    @property
    def warnings(self) -> str:
        """The path or URI of the file that `keep_warnings` writes."""
        return f"{self.uri.rstrip('/')}/{WARNINGS_FILE}"

    # ---------------------------------------------------------------- records

    def fetch(self) -> Path:
        """Copies the records here, as they were last published; returns `path`."""
        if self._remote is None:
            return self.path
        remote_files = self._remote.files()
        records = {name: state for name, state in remote_files.items() if _is_record(name)}
        for log in {log for name in records if (log := log_of(name))}:
            pieces = {name: records.pop(name) for name in list(records) if log_of(name) == log}
            if log in pieces:
                fetch_log(self._remote, self.path / log, pieces, self._logs.setdefault(log, SentLog()))
        wanted = {name: state for name, state in records.items() if self._fetched.get(name) != state}
        self._fetched |= {name: wanted[name] for name in self._download(self._remote, self.path, wanted)}
        self._join_warnings([name for name in remote_files if name.startswith(f"{WARNINGS_FOLDER}/")])
        return self.path

    def publish(self) -> None:
        """Sends the records that have changed since the last call; one thread at a time, so that none sends what is
        older."""
        if self._remote is not None:
            with self._is_publishing:
                self._publish(self._remote)

    def _publish(self, remote: Folder) -> None:
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if not path.is_file() or not _is_written_here(name):
                continue
            if log_of(name):
                publish_log(remote, path, name, self._logs.setdefault(name, SentLog()))
                continue
            status = path.stat()
            state = status.st_size, status.st_mtime_ns
            if self._published.get(name) != state:
                remote.write(name, path.read_bytes())
                self._published[name] = state

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Publishes the records every PUBLISH_SECONDS inside the block, and once more at its end, whatever ends it."""
        if self._remote is None:
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._publish_until, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.publish()

    def _publish_until(self, ended: threading.Event) -> None:
        while not ended.wait(PUBLISH_SECONDS):
            try:
                self.publish()
            except Exception as error:  # noqa: BLE001, a remote file system may raise anything
                log.warning("%s: %s; its records are sent again in %d s", self, one_line(error), PUBLISH_SECONDS)

    def _join_warnings(self, names: list[str]) -> None:
        """Joins all warnings in one file, in the order of the times with which their lines begin."""
        parts = self.path / WARNINGS_FOLDER
        here = [parts.parent / name for name in names if (parts.parent / name).exists()]
        lines = sorted(line for path in here for line in path.read_bytes().splitlines(keepends=True))
        if lines:
            (self.path / WARNINGS_FILE).write_bytes(b"".join(lines))

    # ---------------------------------------------------------------- checkpoints

    def checkpoint_names(self) -> list[str]:
        """The checkpoints that are not known to be damaged, whole or not, in no order."""
        names = set(self._names())
        return [name for name in names if _CHECKPOINT.match(name) and f"{DAMAGED}{name}" not in names]

    def all_checkpoint_names(self) -> list[str]:
        """All checkpoints; the damaged ones with the names they have now."""
        return [name for name in self._names() if _CHECKPOINT.match(name.removeprefix(DAMAGED))]

    def _names(self) -> list[str]:
        if self._remote is not None:
            return self._remote.names()
        return [path.name for path in self.path.iterdir() if path.is_dir()] if self.path.is_dir() else []

    def shadow(self, name: str) -> Path:
        """A stand-in for inspecting a checkpoint without downloading it: a folder with all its files in their sizes.

        Of a remote checkpoint only JSON and files of at most SMALL_BYTES have contents.
        """
        if self._remote is None:
            return self.path / name
        folder, shadow = Folder(f"{self.uri}/{name}"), self.path / ".shadows" / name
        shutil.rmtree(shadow, ignore_errors=True)
        files = folder.files()
        small = [
            file_name for file_name in files if file_name.endswith(".json") or files[file_name].size <= SMALL_BYTES
        ]
        self._download(folder, shadow, small)
        for file_name in files.keys() - set(small):
            (shadow / file_name).parent.mkdir(parents=True, exist_ok=True)
            with (shadow / file_name).open("wb") as file:
                file.truncate(files[file_name].size)
        return shadow

    def restored(self, name: str, scratch: Path) -> Path:
        """A checkpoint with all its contents: its own folder, or a copy of a remote one below `scratch`."""
        if self._remote is None:
            return self.path / name
        folder = Folder(f"{self.uri}/{name}")
        self._download(folder, scratch / name, folder.files())
        return scratch / name

    def set_aside(self, name: str) -> None:
        """Marks a checkpoint as damaged, so that it is ignored from now on."""
        if self._remote is None:
            (self.path / name).rename(self.path / f"{DAMAGED}{name}")
        else:
            self._remote.write(f"{DAMAGED}{name}", b"")

    def remove(self, name: str) -> None:
        """Deletes a file, a checkpoint or a mark, where it exists."""
        if self._remote is not None:
            self._remote.remove_tree(name)
        elif (self.path / name).is_dir():
            shutil.rmtree(self.path / name, ignore_errors=True)
        else:
            (self.path / name).unlink(missing_ok=True)

    # ---------------------------------------------------------------- a planned stop

    def ask_to_stop(self, who: str) -> None:
        """Asks the run to stop after its current step. who: the asker, for its history."""
        if self._remote is not None:
            self._remote.write(_STOP, who.encode())
        else:
            (self.path / _STOP).write_text(who)

    def asked_to_stop(self) -> str | None:
        """The name of whoever asked the run to stop; None where nobody did."""
        try:
            return (self._remote.read(_STOP) if self._remote is not None else (self.path / _STOP).read_bytes()).decode()
        except FileNotFoundError:
            return None

    def forget_stop(self) -> None:
        """Withdraws the request to stop."""
        self.remove(_STOP)

    @staticmethod
    def _download(source: Folder, target: Path, names: Iterable[str]) -> list[str]:
        """Copies files into a local folder; returns the names of those that still existed."""

        def one(name: str) -> str | None:
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                with replacing(place, sync=False) as beside:
                    source.get(name, beside)
            except FileNotFoundError:
                return None
            return name

        with ThreadPoolExecutor(_TRANSFERS) as pool:
            return [name for name in pool.map(one, names) if name]


def _is_record(name: str) -> bool:
    top, _, below = name.partition("/")
    if _CHECKPOINT.match(top):
        return below == _PLACE
    return not top.startswith((DAMAGED, ".")) and top not in (_RAY_TRAIN_MEMORY, MODEL_FOLDER)


def _is_written_here(name: str) -> bool:
    top = name.partition("/")[0]
    hidden = any(part.startswith(".") for part in name.split("/"))
    is_checkpoint = _CHECKPOINT.match(top.removeprefix(DAMAGED)) is not None
    return (
        not hidden
        and not is_checkpoint
        and top not in (WARNINGS_FILE, WARNINGS_FOLDER, _RAY_TRAIN_MEMORY, MODEL_FOLDER)
    )
