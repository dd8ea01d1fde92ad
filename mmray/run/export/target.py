"""Writing a folder so that it is there whole or not at all."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmray.errors import UserError
from mmray.run.export.sidecar import SIDECAR
from mmray.storage import Folder

_LAST = "config.json"
"""The file without which a model folder does not load: an object store renames nothing, so it is written last there."""


@contextmanager
def writing_folder(out: str, *, replaces: bool = False) -> Iterator[Path]:
    """A local folder to write into, which becomes `out`, a path or URI, when the block ends without an error.

    replaces: whether an earlier export in `out` is replaced. Leftovers of an interrupted call beside `out` are deleted.
    Files get the mode that the user's umask gives, also those that a library wrote for this user alone. Raises
    UserError where `out` is taken.
    """
    target = Folder(out)
    if not target.is_local:
        taken = target.names()
        _check_free(out, taken, replaces=replaces)
        with tempfile.TemporaryDirectory(prefix="mmray-export-") as name:
            yield Path(name)
            _send(Path(name), target, taken)
        return
    place = Path(target.path()).resolve()  # what is looked at and what is replaced is one folder, however it is named
    _check_free(str(place), _names_in(place), replaces=replaces)
    beside = place.with_name(f".{place.name}.coming")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        mode = _usual_mode(beside)
        for path in beside.rglob("*"):
            if path.is_file():
                path.chmod(mode)
                _sync(path)
        _check_free(str(place), _names_in(place), replaces=replaces)  # again: an export takes its time
        if place.exists():
            earlier = place.with_name(f".{place.name}.earlier")
            shutil.rmtree(earlier, ignore_errors=True)
            place.rename(earlier)
            beside.rename(place)
            shutil.rmtree(earlier)
        else:
            beside.rename(place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _names_in(place: Path) -> list[str] | None:
    """Lists the names in a local folder: [] where there is none, None for a file."""
    if place.is_dir():
        return os.listdir(place)
    return None if place.exists() else []


def _check_free(place: str, taken: list[str] | None, *, replaces: bool) -> None:
    """Raises UserError where something is in a folder, unless it is an earlier export that is to be replaced."""
    if taken == [] or (replaces and SIDECAR in (taken or [])):
        return
    if SIDECAR in (taken or []):
        raise UserError(f"{place} is an earlier export: give --replace to replace it, or another folder")
    raise UserError(
        f"{place} is there already and holds no {SIDECAR}, so it is no earlier export: give another folder, or delete "
        "it"
    )


def _usual_mode(folder: Path) -> int:
    """The mode of a new file. The umask itself cannot be read without changing it for all threads."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def _send(here: Path, target: Folder, earlier: list[str]) -> None:
    names = sorted(path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file())
    target.remove_files([_LAST] if _LAST in earlier else [])
    for name in sorted(names, key=lambda name: name == _LAST):
        target.put(here / name, name)
    target.remove_files([name for name in earlier if name not in names and name != _LAST])


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
