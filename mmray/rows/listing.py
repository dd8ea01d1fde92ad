"""Lists the files that the paths, globs and URIs of a job name; no file is left out silently.

Links to files and folders are followed, because people link shards instead of copying them. A link that leads nowhere
or in a circle, a pipe or a device is an error that names it. Local globs are expanded here, because those of fsspec
leave out links and do not enter linked folders. A folder whose name has brackets, such as `scans [2024]`, is matched by
its name.
"""

import fnmatch
import functools
import logging
import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from mmray.base.words import one_line
from mmray.errors import UserError
from mmray.storage import file_system

_MARKS = re.compile(r"[*?\[]")
_SAVED_DATASET = ("state.json", "dataset_dict.json")
"""Files by which a folder of `Dataset.save_to_disk` is recognised."""

Listed = tuple[Any, str, Mapping[str, Any]]
"""The file system of a file, its path there and its state (fsspec's `info`); for a link, the state of its target."""

log = logging.getLogger("mmray")


def listed_files(pattern: str) -> list[Listed]:
    """Lists the files that a path, glob or URI names, sorted by path.

    Raises UserError where there is no file, for a folder (with the remedy), and for what neither is nor leads to a
    file.
    """
    try:
        system, path = file_system(pattern)
        if isinstance(system, LocalFileSystem):
            entries: list[Listed] = [
                (system, file_path, _state(file_path)) for file_path in sorted(set(_local_paths(path)))
            ]
        else:
            entries = [(system, file_path, info) for file_path, info in _remote_files(system, path)]
    except (OSError, ValueError) as error:
        raise UserError(f"data files {pattern!r}: {one_line(error)}") from error
    if "**" not in pattern:
        _warn_of_folders(pattern, tuple(path for _, path, info in entries if info["type"] == "directory"))
    files = [entry for entry in entries if entry[2]["type"] == "file"]
    if not files and len(entries) == 1 and not _has_marks(path):
        raise UserError(f"data files {pattern!r}: {_folder_remedy(system, path)}")
    if not files:
        raise UserError(f"data files {pattern!r}: no such file. Paths are relative to the current folder.")
    return files


def _has_marks(path: str) -> bool:
    return _MARKS.search(path) is not None


# ---------------------------------------------------------------- local


def _state(path: str) -> dict[str, Any]:
    """Returns fsspec's `info` of a local path with links followed. Raises UserError for anything but a file or a
    folder."""
    try:
        info: dict[str, Any] = LocalFileSystem().info(path)
    except FileNotFoundError as error:
        target = os.readlink(path) if os.path.islink(path) else ""
        raise UserError(
            f"{path} is a link to {target!r}, where nothing is; mend or delete the link, or name the files without it"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: {one_line(error)}; mend or delete the link, or let this user read it") from error
    if info["type"] == "other":
        kind = next((name for test, name in _KINDS if test(info["mode"])), "no plain file")
        raise UserError(f"{path} is {kind}, which cannot be read twice; name plain files of rows")
    return info


_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def _local_paths(path: str) -> Iterator[str]:
    """Yields the paths that a local path or glob names: files, folders and links, whatever they lead to."""
    if not _has_marks(path):
        if os.path.lexists(path):
            yield path
        return
    head, *parts = path.split("/")
    yield from _expanded(head or "/", parts, ())


def _expanded(folder: str, parts: list[str], above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Yields the paths below a folder that match the parts of a glob. above: device and inode of the folders that `**`
    has entered."""
    part, *remaining = parts
    if part == "**":
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in above:
            raise UserError(f"{folder} leads back to a folder above it, so ** has no end; name the folders instead")
        above = (*above, (status.st_dev, status.st_ino))
        if remaining:
            yield from _expanded(folder, remaining, above)
        for name in os.listdir(folder):
            below = os.path.join(folder, name)
            if os.path.isdir(below):
                yield from _expanded(below, parts, above)
            elif not remaining or _may_have_led_to_a_folder(below):
                yield below
        return
    literal = os.path.join(folder, part)
    if not _has_marks(part) or (not re.search("[*?]", part) and os.path.lexists(literal)):
        names = [part] if part in ("", "..", ".") or os.path.lexists(literal) else []
    elif os.path.isdir(folder):
        matches = re.compile(fnmatch.translate(part)).match
        names = [name for name in os.listdir(folder) if matches(name)]
    else:
        names = []
    for name in names:
        below = os.path.join(folder, name)
        if not remaining or _may_have_led_to_a_folder(below):
            yield below
        elif os.path.isdir(below):
            yield from _expanded(below, remaining, above)


def _may_have_led_to_a_folder(path: str) -> bool:
    """Tells whether a path is a broken link whose name looks like a folder's, below which files may be missing."""
    return "." not in os.path.basename(path) and os.path.islink(path) and not os.path.exists(path)


# ---------------------------------------------------------------- object storage


def _remote_files(system: Any, path: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the path and state of each file that a path or glob of a remote file system names."""
    if not re.search("[*?]", path) and (system.isfile(path) or not _has_marks(path)):
        return [(path, system.info(path))] if system.exists(path) else []
    # One listing returns the state of many files.
    matches = system.glob(_escaped(system, path), detail=True)
    return sorted((str(name), info) for name, info in matches.items())


def _escaped(system: Any, path: str) -> str:
    """Escapes the brackets in a glob that are part of an existing folder's name, as `[[]`."""
    parts: list[str] = []
    literal = ""
    for part in path.split("/"):
        literal = f"{literal}/{part}" if parts else part
        named = "[" in part and not re.search("[*?]", part) and system.exists(literal)
        parts.append(part.replace("[", "[[]") if named else part)
    return "/".join(parts)


# ---------------------------------------------------------------- several names


def warn_of_second_names(files: Sequence[Listed]) -> None:
    """Warns, once in a process, of files of a data set that are listed twice, by two patterns or by a link beside its
    target: their rows are used twice."""
    first_paths: dict[tuple[Any, ...], str] = {}
    for system, path, info in files:
        is_local = isinstance(system, LocalFileSystem)
        key = (info["ino"], info["size"], info["mtime"]) if is_local else (path,)
        first = first_paths.get(key)
        if first is not None and (first == path or (is_local and os.path.samefile(first, path))):
            _warn_of_second_name(first, path)
            return
        first_paths.setdefault(key, path)


@functools.lru_cache
def _warn_of_second_name(first: str, second: str) -> None:
    names = f"{first} is listed twice" if first == second else f"{first} and {second} are one file"
    log.warning("%s: each of its rows is used twice; name it once, or write repeat: 2", names)


# ---------------------------------------------------------------- folders


@functools.lru_cache
def _warn_of_folders(pattern: str, folders: tuple[str, ...]) -> None:
    """Warns, once in a process, of folders that a glob names and that are left out."""
    if folders and _has_marks(pattern):
        log.warning("data files %r: folders are left out, such as %s; ** goes into folders", pattern, folders[0])


_NOT_ROWS = frozenset(
    (
        ".bmp",
        ".gif",
        ".heic",
        ".htm",
        ".html",
        ".jpeg",
        ".jpg",
        ".md",
        ".pdf",
        ".png",
        ".tif",
        ".tiff",
        ".txt",
        ".webp",
        ".xml",
    )
)
"""Endings of files that a folder of rows may have beside them, and that are never rows."""


def _folder_remedy(system: Any, path: str) -> str:
    """Describes what to write instead of a folder."""
    names = [posixpath.basename(str(entry).rstrip("/")) for entry in system.ls(path, detail=False)]
    place = path if isinstance(system, LocalFileSystem) else system.unstrip_protocol(path)
    place = place.rstrip("/")
    if any(name in names for name in _SAVED_DATASET):
        return f"no such file, but a folder of Dataset.save_to_disk; set format: huggingface for {place}"
    endings = Counter(posixpath.splitext(name)[1].lower() for name in names)
    endings.pop("", None)
    shown = [f"{place}/*{ending} ({count})" for ending, count in endings.most_common() if ending not in _NOT_ROWS]
    if endings and not shown:
        file_endings = ", ".join(f"*{ending}" for ending, _ in endings.most_common(3))
        return (
            f"no such file, but a folder of {file_endings}; images and texts are not read as they are: write rows, a "
            "line of JSON each, that name them"
        )
    return (
        "no such file, but a folder; name its files, such as "
        f"{', '.join(shown[:3]) if shown else f'{place}/**/*.jsonl'}"
    )
