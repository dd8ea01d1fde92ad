"""WebDataset shards (`.tar`) as row files: consecutive members of one key are one row.

    0007.jpg 0007.txt | 0008.0.jpg 0008.1.jpg 0008.json | …

The key is a member's name up to the first dot behind its folder. `.json` is the row, `.txt` its text, pictures are its
images, in the order of the shard or as the row names them. Only headers, texts and JSON are read here: an image becomes
a reference to a range of bytes of the shard (`PartOfFile`), from which it is measured now and read when training, so no
picture is stored twice. A shard is indexed once, by one pass over its headers (a remote shard streams by); every later
reader seeks to its rows.

What is wrong with a member is wrong with its row. Behind a damaged header nothing can be found any more, and the row
before it may lack members: that row stands for the rest of the shard, and is rejected with the place.
"""

import io
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, BinaryIO

import numpy as np

from mmray.errors import RowError
from mmray.images.source import one_line
from mmray.images.tar_member import PartOfFile
from mmray.rows.image_refs import ImageRef
from mmray.rows.json_rows import parse_row

IMAGE_ENDINGS = frozenset("jpg jpeg png webp tif tiff jp2 j2k gif bmp ppm pgm pbm avif".split())  # noqa: SIM905
"""Endings of the members that are images, in any case."""


@dataclass
class _Row:
    """The members of one key, by their endings. start: where in the shard the header of the first is."""

    key: str
    start: int
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    problem: RowError | None = None
    """Why it is no row."""

    def add(self, ending: str, member: tarfile.TarInfo, size: int) -> None:
        """size: bytes of the shard."""
        if not member.isreg():
            self.problem = RowError("bad_tar", f"member {member.name!r} is a link, no file; store the file itself")
        if member.offset_data + member.size > size:
            self.problem = RowError("bad_tar", f"the shard ends inside member {member.name!r}; write the shard anew")
        if ending in self.members:
            self.problem = RowError("bad_tar", f"member {member.name!r} is there twice; store each member once")
        self.members[ending] = member


def row_starts(file: BinaryIO, size: int, most: int | None = None) -> np.ndarray:
    """Where each row of a shard starts, and the shard's end: int64 [rows + 1]. size: bytes of the shard; most: of so
    many rows, the first, and where the next one starts; None: of all."""
    starts = (row.start for row in _rows(file, 0, size))
    return np.fromiter(islice(chain(starts, [size]), most and most + 1), dtype=np.int64)


def read_rows(
    file: BinaryIO, uri: str, start: int, stop: int, fields: tuple[str, str, str]
) -> Iterator[dict[str, Any] | RowError]:
    """The rows of a shard that start in bytes [start, stop), in order.

    fields: what they call `id`, `text` and `images`. The id of a row whose JSON has none is `SHARD/KEY`: keys often
    begin anew in each shard.
    """
    for row in _rows(file, start, stop):
        try:
            yield _value(row, file, uri, fields)
        except RowError as error:
            yield error


def _rows(file: BinaryIO, start: int, stop: int) -> Iterator[_Row]:
    """The rows that start in bytes [start, stop), each once its last member is known."""
    row = None
    size = file.seek(0, io.SEEK_END)
    for member in _members(file, start, stop):
        if isinstance(member, RowError):  # the row before it may have had more members
            row = row or _Row("", start)
            row.problem = row.problem or member
            break
        folder, name = posixpath.split(member.name)
        stem, _, ending = name.partition(".")
        if member.isdir() or not stem or not ending:
            continue  # folders, hidden files, and files without an ending are no part of a sample
        key = posixpath.join(folder, stem)
        if row is None or row.key != key:
            if row is not None:
                yield row
            row = _Row(key, member.offset)
        row.add(ending, member, size)
    if row is not None:
        yield row


def _members(file: BinaryIO, start: int, stop: int) -> Iterator[tarfile.TarInfo | RowError]:
    """The members that start in bytes [start, stop); where one is damaged, at last the error.

    `tarfile` takes a damaged header behind the first for the end of the archive, so what stands there is looked at.
    """
    end = start
    try:
        file.seek(start)
        archive = tarfile.TarFile(fileobj=file)
        while member := archive.next():
            if member.offset >= stop:
                return
            end = member.offset
            archive.members = []  # type: ignore[attr-defined]  # it would keep them all
            yield member
            end = archive.offset
        problem = _end_problem(file, end)
        if problem is None:
            return
    except tarfile.TarError as error:
        problem = one_line(error)
    message = f"byte {end} of the shard: {problem}; the rest of it cannot be read, write the shard anew"
    yield RowError("bad_tar", message)


def _end_problem(file: BinaryIO, end: int) -> str | None:
    """What is wrong with an archive whose last member ends at byte `end`."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        return "no header of a member"
    if len(block) < tarfile.BLOCKSIZE:
        return "the mark of the archive's end is missing, so something may be cut off"
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            return "the archive ends here, but more follows, as where archives were joined"
    return None


def _value(row: _Row, file: BinaryIO, uri: str, fields: tuple[str, str, str]) -> dict[str, Any]:
    if row.problem is not None:
        raise row.problem
    own_id, text, images = fields
    value: dict[str, Any] = {}
    if "json" in row.members:
        parsed = parse_row(_content(row.members["json"], file))
        if isinstance(parsed, RowError):
            raise parsed
        value = parsed
    elif "txt" not in row.members:
        names = ", ".join(member.name for member in row.members.values())
        raise RowError("missing_column", f"the sample has no .json and no .txt; its members are {names:.200}")
    if "txt" in row.members:
        value.setdefault(text, _text(row.members["txt"], file))
    value.setdefault(own_id, f"{posixpath.basename(uri)}/{row.key}")
    value[images] = _images(row, uri, value.get(images))
    return value


def _images(row: _Row, uri: str, named: object) -> object:
    """The images of a row: those its JSON names, by ending or name of a member; all where it names none."""
    refs: dict[str, ImageRef] = {}
    every = []
    for ending, member in row.members.items():
        if ending.lower().rpartition(".")[2] in IMAGE_ENDINGS:
            name = posixpath.basename(member.name)
            ref = ImageRef(str(PartOfFile(uri, name, member.offset_data, member.size)))
            every.append(ref)
            refs |= dict.fromkeys((ending, name, member.name), ref)
    if named is None:
        return every
    if not isinstance(named, list):
        return named
    return [refs.get(each, each) if isinstance(each, str) else each for each in named]


def _text(member: tarfile.TarInfo, file: BinaryIO) -> str:
    try:
        return _content(member, file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError(
            "not_utf8", f"byte {error.start} of {member.name!r} is not UTF-8; save the file as UTF-8"
        ) from error


def _content(member: tarfile.TarInfo, file: BinaryIO) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)
