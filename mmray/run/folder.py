"""The folder of a training run, by path or URI: what it holds, and how processes on many machines share it.

A local folder, which all nodes mount, is what it is: processes append to its files and read its checkpoints. An object
store has no appending and no renaming, so there each process keeps a copy of its own, on its own disk, and says when
what it holds goes there or comes from there:

    records       metrics.jsonl, history.jsonl, tensorboard/, …: rank 0 alone writes them. It fetches them when it
                  begins, publishes whole files every PUBLISH_SECONDS, and before each checkpoint is sent: whoever
                  resumes from a checkpoint finds the records of all its steps
    warnings      every process that has some writes a file of its own below warnings/; fetching joins them
    checkpoints   go there by Ray Train; come back whole for a restore, or as a *shadow* for a look: names, sizes and
                  the contents of small files
    model         goes there by the driver, at the end; stays there
    damaged       a checkpoint that is passed over gets an empty object beside it, `damaged_NAME`; locally it is renamed

Publishing sends a file again from its beginning when it has grown: 300 bytes a step, so 30 MB after 100,000 steps.
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

from mmray.images.source import one_line
from mmray.run.warnings import WARNINGS_FILE, WARNINGS_FOLDER
from mmray.storage import FileState, Folder, replacing

log = logging.getLogger(__name__)

DAMAGED = "damaged_"
MODEL_FOLDER = "model"
"""The exported model, no record of the run's."""
_CHECKPOINT = re.compile(r"checkpoint_\d+_")
PUBLISH_SECONDS = 15
SMALL_BYTES = 1 << 16
"""What a look at a checkpoint reads: a driver acts on the cursor before any worker has read it all."""
_TRANSFERS = 8
_PLACE = "cursor.json"
_STOP = ".stop"
"""Hidden, so it is no record."""
_RAY_TRAIN_MEMORY = "checkpoint_manager_snapshot.json"
"""Ray Train's own, in the same folder: no record of the run's."""


class RunFolder:
    """A run's folder as one process sees it."""

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri)
        self._remote = None if "://" not in self.uri else Folder(self.uri)
        self._fetched: dict[str, FileState] = {}
        self._published: dict[str, tuple[int, int]] = {}

    @classmethod
    def of(cls, run: "str | Path | RunFolder") -> "RunFolder":
        """The folder itself, or that of a path or URI."""
        return run if isinstance(run, RunFolder) else cls(run)

    def __str__(self) -> str:
        return self.uri

    @cached_property
    def path(self) -> Path:
        """Where this process reads and writes the records: the folder, or its copy, which goes with the process."""
        if self._remote is None:
            return Path(self.uri)
        copy = tempfile.mkdtemp(prefix="mmray-run-")
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        return Path(copy)

    @property
    def shared_path(self) -> Path | None:
        """The folder that all nodes mount; None where there is none."""
        return self.path if self._remote is None else None

    @property
    def warnings(self) -> str:
        """Where `keep_warnings` writes."""
        return f"{self.uri.rstrip('/')}/{WARNINGS_FILE}"

    # ---------------------------------------------------------------- records

    def fetch(self) -> Path:
        """Bring the records here, as they were last published; returns `path`."""
        if self._remote is None:
            return self.path
        remote_files = self._remote.files()
        wanted = {
            name: state for name, state in remote_files.items() if _is_record(name) and self._fetched.get(name) != state
        }
        self._fetched |= {name: wanted[name] for name in self._download(self._remote, self.path, wanted)}
        self._join_warnings([name for name in remote_files if name.startswith(f"{WARNINGS_FOLDER}/")])
        return self.path

    def publish(self) -> None:
        """Send the records that have changed since."""
        if self._remote is None:
            return
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if not path.is_file() or not _is_written_here(name):
                continue
            status = path.stat()
            state = status.st_size, status.st_mtime_ns
            if self._published.get(name) != state:
                self._remote.write(name, path.read_bytes())
                self._published[name] = state

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Inside, the records are published every PUBLISH_SECONDS, and once more at the end, whatever ends it."""
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
        """One file of all warnings, in the order of their times, with which lines begin."""
        parts = self.path / WARNINGS_FOLDER
        here = [parts.parent / name for name in names if (parts.parent / name).exists()]
        lines = sorted(line for path in here for line in path.read_bytes().splitlines(keepends=True))
        if lines:
            (self.path / WARNINGS_FILE).write_bytes(b"".join(lines))

    # ---------------------------------------------------------------- checkpoints

    def checkpoint_names(self) -> list[str]:
        """The checkpoints that are there and not known to be damaged, whole or not, in no order."""
        names = set(self._names())
        return [name for name in names if _CHECKPOINT.match(name) and f"{DAMAGED}{name}" not in names]

    def all_checkpoint_names(self) -> list[str]:
        """These, and the damaged ones as they are named."""
        return [name for name in self._names() if _CHECKPOINT.match(name.removeprefix(DAMAGED))]

    def _names(self) -> list[str]:
        if self._remote is not None:
            return self._remote.names()
        return [path.name for path in self.path.iterdir() if path.is_dir()] if self.path.is_dir() else []

    def shadow(self, name: str) -> Path:
        """A checkpoint for a look: a folder with all its names in their sizes; of a remote one only JSON and files of
        SMALL_BYTES have contents."""
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
        """A checkpoint to be read: its folder; of a remote one a copy below `scratch`."""
        if self._remote is None:
            return self.path / name
        folder = Folder(f"{self.uri}/{name}")
        self._download(folder, scratch / name, folder.files())
        return scratch / name

    def set_aside(self, name: str) -> None:
        """Mark a checkpoint as damaged: it is not looked at again."""
        if self._remote is None:
            (self.path / name).rename(self.path / f"{DAMAGED}{name}")
        else:
            self._remote.write(f"{DAMAGED}{name}", b"")

    def remove(self, name: str) -> None:
        """Delete a file, a checkpoint or a mark, where it is there."""
        if self._remote is not None:
            self._remote.remove_tree(name)
        elif (self.path / name).is_dir():
            shutil.rmtree(self.path / name, ignore_errors=True)
        else:
            (self.path / name).unlink(missing_ok=True)

    # ---------------------------------------------------------------- a planned stop

    def ask_to_stop(self, who: str) -> None:
        """Ask the run to stop after the step it is in. who: asks, for its history."""
        if self._remote is not None:
            self._remote.write(_STOP, who.encode())
        else:
            (self.path / _STOP).write_text(who)

    def asked_to_stop(self) -> str | None:
        """Who has asked the run to stop; None where nobody has."""
        try:
            return (self._remote.read(_STOP) if self._remote is not None else (self.path / _STOP).read_bytes()).decode()
        except FileNotFoundError:
            return None

    def forget_stop(self) -> None:
        """Nobody has asked it to stop."""
        self.remove(_STOP)

    @staticmethod
    def _download(source: Folder, target: Path, names: Iterable[str]) -> list[str]:
        """Copy files into a local folder; returns those that were still there."""

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
