"""Reads WebDataset shards (`.tar`) as row files: consecutive members of one key are one row.

    0007.jpg 0007.txt | 0008.0.jpg 0008.1.jpg 0008.json | …

The key is a member's name up to the first dot behind its folder. `.json` is the row, `.txt` its text, and pictures are
its images: as the row names them, by number where all are numbered (`0008.2.jpg` before `0008.10.jpg`, which names sort
the other way), else in the order of the shard. `members` chooses some of them. Only headers, texts and JSON are read
here: an image becomes a reference to a range of bytes of the shard (`PartOfFile`), from which it is measured now and
read when training, so no image is stored twice. A shard is indexed once, by one pass over its headers (a remote shard
is streamed); every later reader seeks to its rows.

A bad member makes its row bad. So does a key that comes back later in the shard: its members are spread, and a row made
of a part of them would be trained on as a text without its image. Behind a damaged header nothing can be found, and the
row before it may lack members: that row stands for the remainder of the shard, and is rejected with the place.
"""

import fnmatch
import io
import posixpath
import re
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from mmray.base.words import one_line
from mmray.errors import RowError
from mmray.images.paged import each_page
from mmray.images.tar_member import PartOfFile
from mmray.rows.image_refs import ImageRef
from mmray.rows.json_rows import parse_row
from mmray.rows.settings import ONE_IMAGE

IMAGE_ENDINGS = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "tif", "tiff", "jp2", "j2k", "jpx", "j2c", "gif"),
        *("bmp", "dib", "ppm", "pgm", "pbm", "pnm", "avif", "heic", "heif"),
    )
)
"""Endings of the members that are images, in lower case; members may have them in any case."""
_PDF = "pdf"
_OTHER_PICTURES = ("jxl", "jxr", "svg", "psd", "eps", "djvu", "tga", "ico", "exr", "hdr", "dng", "cr2", "nef")

_NUMBERED = re.compile(r"(?P<name>.*?)(?P<number>\d+)\.[^.]+")
BY_NUMBER = "image_order"
"""The note on a row whose images are used in the order of their numbers but stored in another order."""
WITHOUT_IMAGE = "missing_image"
"""The note on a text that has no image in a shard."""


@dataclass(frozen=True)
class ShardRules:
    """Says which fields of a row the members of a shard become.

    id, text, images: the names of these fields in a row.
    members: patterns of the endings that are read; () for all.
    """

    id: str = "id"
    text: str = "text"
    images: str = "images"
    members: tuple[str, ...] = ()


ALL_MEMBERS = ShardRules()


@dataclass(frozen=True)
class ShardIndex:
    """The rows of a shard.

    starts: where each row starts, and the shard's end, int64 [rows + 1].
    refused: the numbers of rows whose key another row has too.
    endings: the endings of the members, with every number in them written as 0.
    """

    starts: np.ndarray
    refused: tuple[int, ...]
    endings: frozenset[str]


@dataclass
class _Row:
    """The members of one key, by their endings. start: the byte of the first member's header in the shard."""

    key: str
    start: int
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    problem: RowError | None = None
    """The error that says why these members are no row; None where they are."""

    def add(self, ending: str, member: tarfile.TarInfo, size: int) -> None:
        """Adds a member by its ending. size: the bytes of the shard."""
        if not member.isreg():
            self.problem = RowError("bad_tar", f"member {member.name!r} is a link, no file; store the file itself")
        if member.issparse():  # the bytes in the shard are not those of the file
            self.problem = RowError("bad_tar", f"member {member.name!r} is stored sparse; run tar without --sparse")
        if member.offset_data + member.size > size:
            self.problem = RowError("bad_tar", f"the shard ends inside member {member.name!r}; write the shard anew")
        if ending in self.members:
            self.problem = RowError("bad_tar", f"member {member.name!r} is there twice; store each member once")
        self.members[ending] = member

    def chosen(self, members: tuple[str, ...]) -> dict[str, tarfile.TarInfo]:
        """Returns the members whose endings match one of the patterns `members`; () for all."""
        if not members:
            return self.members
        return {name: member for name, member in self.members.items() if any(is_member(name, one) for one in members)}


def is_member(ending: str, pattern: str) -> bool:
    """Tells whether a pattern of `ShardRules.members` matches an ending, ignoring case."""
    return fnmatch.fnmatchcase(ending.lower(), pattern.lower())


def index_shard(file: BinaryIO, size: int, max_rows: int | None = None) -> ShardIndex:
    """Indexes the rows of a shard by one pass over its headers.

    size: the bytes of the shard.
    max_rows: how many rows to find; None: all.
    """
    starts: list[int] = []
    numbers: dict[str, list[int]] = {}
    endings: set[str] = set()
    for row in _rows(file, 0, size):
        if len(starts) == max_rows:
            size = row.start
            break
        numbers.setdefault(row.key, []).append(len(starts))
        starts.append(row.start)
        endings |= {re.sub(r"\d+", "0", ending.lower()) for ending in row.members}
    refused = sorted(number for same in numbers.values() if len(same) > 1 for number in same)
    return ShardIndex(np.asarray([*starts, size], dtype=np.int64), tuple(refused), frozenset(endings))


def read_rows(
    file: BinaryIO, uri: str, start: int, stop: int, rules: ShardRules, refused: Collection[int] = ()
) -> Iterator[tuple[dict[str, Any] | RowError, tuple[str, ...]]]:
    """Yields the rows of a shard that start in bytes [start, stop), in order, each with the notes on it.

    refused: the numbers, from 0, of those of them whose key another row of the shard has (`ShardIndex.refused`).

    The id of a row whose JSON has none is `SHARD/KEY`, because keys often begin anew in each shard.
    """
    for number, row in enumerate(_rows(file, start, stop)):
        if number in refused:
            message = (
                f"key {row.key!r} stands in several places of the shard, so no row can be made of its members; store "
                "the members of a sample one behind another (tar --sort=name)"
            )
            yield RowError("bad_tar", message), ()
            continue
        try:
            yield _value(row, file, uri, rules)
        except RowError as error:
            yield error, ()


def _rows(file: BinaryIO, start: int, stop: int) -> Iterator[_Row]:
    """Yields the rows that start in bytes [start, stop), each once its last member is known."""
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
    """Yields the members that start in bytes [start, stop), and at a damaged one, last, the error.

    `tarfile` takes a damaged header behind the first for the end of the archive, so the bytes there are checked.
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
    """Describes what is wrong with an archive whose last member ends at byte `end`; returns None where nothing is."""
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


def _value(
    row: _Row, file: BinaryIO, uri: str, rules: ShardRules
) -> tuple[dict[str, Any], tuple[str, ...]]:  # fmt: skip
    if row.problem is not None:
        raise row.problem
    members = row.chosen(rules.members)
    content, caption = _only(members, "json", rules), _only(members, "txt", rules)
    value: dict[str, Any] = {}
    if content:
        parsed = parse_row(_content(content, file))
        if isinstance(parsed, RowError):
            raise parsed
        value = parsed
    elif not caption:
        names = ", ".join(member.name for member in row.members.values())
        chosen = f"; members are {', '.join(rules.members)}" if rules.members else ""
        raise RowError("missing_column", f"the sample has no .json and no .txt; its members are {names:.200}{chosen}")
    if caption:
        value.setdefault(rules.text, _text(caption, file))
    value.setdefault(rules.id, f"{posixpath.basename(uri)}/{row.key}")
    named = value.get(rules.images)
    if named is None and rules.images == "images":
        named = value.get(ONE_IMAGE)
    images = [named] if isinstance(named, str) and named else named
    value[rules.images] = _image_refs(members, uri, images)
    return value, _notes(members) if named is None else ()


def _only(members: dict[str, tarfile.TarInfo], ending: str, rules: ShardRules) -> tarfile.TarInfo | None:
    """Returns the member that is the row's JSON or text: by its exact ending or, where `members` chooses, by the last
    part of its ending. Raises RowError where several members match."""
    if ending in members or not rules.members:
        return members.get(ending)
    chosen = [member for name, member in members.items() if name.lower().rpartition(".")[2] == ending]
    if len(chosen) > 1:
        names = ", ".join(member.name for member in chosen)
        raise RowError("bad_tar", f"members chooses {len(chosen)} .{ending} of the sample, {names:.200}; choose one")
    return chosen[0] if chosen else None


def _images(members: dict[str, tarfile.TarInfo]) -> dict[str, tarfile.TarInfo]:
    """Returns the images in order: by number where all have one, else as stored in the shard. Raises RowError where
    only some have one."""
    images = {
        ending: member for ending, member in members.items() if ending.lower().rpartition(".")[2] in IMAGE_ENDINGS
    }
    matches = [_NUMBERED.fullmatch(ending) for ending in images]
    numbered = [match for match in matches if match]
    numbers = [int(match["number"]) for match in numbered]
    if numbers == sorted(numbers):
        return images
    if len(numbered) < len(images) or len({match["name"] for match in numbered}) > 1:
        raise RowError(
            "bad_tar", f"the images {', '.join(images):.200} are neither stored in the order of their numbers nor all "
            "numbered alike; name them in the sample's JSON, or choose some by members"
        )  # fmt: skip
    return dict(sorted(images.items(), key=lambda item: int(_NUMBERED.fullmatch(item[0])["number"])))  # type: ignore[index]


def _notes(members: dict[str, tarfile.TarInfo]) -> tuple[str, ...]:
    """Returns the notes on a row whose JSON names no images."""
    images = _images(members)
    if not images:
        _check_no_picture(members)
        return (WITHOUT_IMAGE,)
    return (BY_NUMBER,) if list(images) != [ending for ending in members if ending in images] else ()


def _check_no_picture(members: dict[str, tarfile.TarInfo]) -> None:
    """Raises RowError for a sample without images that has a picture of another kind: it would train without it."""
    for ending, member in members.items():
        kind = ending.lower().rpartition(".")[2]
        if kind == _PDF:
            pages = f"name pages in the sample's JSON, images: ['{posixpath.basename(member.name)}#page=1']"
            raise RowError("image_unreadable", f"{member.name} is a PDF; {pages}, or choose other members")
        if kind in _OTHER_PICTURES:
            raise RowError(
                "image_unreadable", f"{member.name} is a picture that cannot be read; store it as JPEG or PNG, or "
                "choose other members"
            )  # fmt: skip


def _image_refs(members: dict[str, tarfile.TarInfo], uri: str, named: object) -> object:
    """Returns the images of a row: those that its JSON names, by ending or name of a member; all where it names
    none."""
    if named is not None and not isinstance(named, list):
        return named
    parts: dict[str, str] = {}
    for ending, member in members.items():
        if ending.lower().rpartition(".")[2] in (*IMAGE_ENDINGS, _PDF):
            name = posixpath.basename(member.name)
            part = str(PartOfFile(uri, name, member.offset_data, member.size))
            parts |= dict.fromkeys((ending, name, member.name), part)
    if named is None:
        return [ImageRef(parts[ending]) for ending in _images(members)]
    return [ref for entry in named for ref in _named_refs(entry, parts)]


def _named_refs(entry: object, parts: dict[str, str]) -> list[object]:
    """Returns the images that an entry of a sample's JSON names: a member, a page of one, or something else as it is.

    parts: the members by ending, name and path.
    """
    if not isinstance(entry, str):
        return [entry]
    member, mark, page = entry.partition("#")
    if member not in parts:
        return [entry]
    return [ImageRef(text) for text in each_page(f"{parts[member]}{mark}{page}")]


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
