"""Writing a folder so that it is there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmray.errors import UserError
from mmray.storage import Folder

_LAST = "config.json"
"""The file without which a model folder does not load: an object store renames nothing, so it is written last there."""


@contextmanager
def writing_folder(out: str, *, replaces: str | None = None) -> Iterator[Path]:
    """A local folder to write into, which becomes `out`, a path or URI, when the block ends without an error.

    replaces: a folder that holds a file of this name is replaced; None: no folder is. Leftovers of an interrupted call
    beside `out` are deleted. Raises UserError where `out` is taken.
    """
    target = Folder(out)
    taken = target.names() if not target.is_local else os.listdir(out) if os.path.isdir(out) else []
    if (taken or os.path.isfile(out)) and replaces not in taken:
        remedy = f"it holds no {replaces}, so it is no earlier export; " if replaces else ""
        raise UserError(f"{out} is there already: {remedy}give another folder, or delete it")
    if not target.is_local:
        with tempfile.TemporaryDirectory(prefix="mmray-export-") as name:
            yield Path(name)
            _send(Path(name), target, taken)
        return
    place = Path(target.path())
    beside = place.with_name(f".{place.name}.coming")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        for path in beside.rglob("*"):
            if path.is_file():
                _sync(path)
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


def _send(here: Path, target: Folder, earlier: list[str]) -> None:
    names = sorted(path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file())
    target.remove_files([_LAST] if _LAST in earlier else [])
    for name in sorted(names, key=lambda name: name == _LAST):
        target.put(here / name, name)
    target.remove_files([name for name in earlier if name not in names and name != _LAST])


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
