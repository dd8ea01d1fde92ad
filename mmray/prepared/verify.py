"""Decodes every picture of a prepared dataset once, and lists those that are broken, blank, or not as prepared.

Preparing reads headers alone, so only training would find a picture that is broken behind its header, and would leave
its sample out of the loss. `verify` finds it before, at the cost of decoding once as training's render actors do.

The dataset is checked in parts of some bins, by as many processes as there are CPUs, or by a cluster
(`pipelines/verify.py`). The result of each part is written whole into a folder beside the dataset; after a stop, the
same command continues with the missing parts. A process holds one group of rows and one decoded picture.
"""

import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Self

import numpy as np
from PIL import Image

from mmray.errors import RowError, UserError
from mmray.images import ImageSource, TilingPolicy, plan_tiles, render_tiles
from mmray.images.header import MAX_PIXELS, read_header
from mmray.images.holes import hole
from mmray.images.jpeg import lacks_pixels
from mmray.images.paged import file_of
from mmray.images.retries import with_retries
from mmray.images.source import describe_source, image_file
from mmray.prepared.dataset import PreparedDataset
from mmray.prepared.sample_columns import BINS_PER_ROW_GROUP
from mmray.storage import Folder

BINS_PER_PART = 16 * BINS_PER_ROW_GROUP
"""Number of bins that a process checks at a time: the work that a stop loses."""

BLANK, HOLE, OTHER_FORMAT = "blank", "hole", "other_format"
"""Reasons that are listed beside those of docs/rows.md; training keeps such pictures."""

BLANK_RANGE = 4
"""Largest difference between the pixels of a blank picture, in levels of 255."""

BLACK_SHARE = 1 / 8
"""Share of a picture that is listed if it is black up to an edge."""

_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "PNG": (".png", ".apng"), "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"), "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf"), "GIF": (".gif",), "BMP": (".bmp", ".dib"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"), "AVIF": (".avif",), "HEIF": (".heic", ".heif"), "PDF": (".pdf",),
}  # fmt: skip
_WITHOUT_CHECKSUMS = ("JPEG", "MPO", "WEBP", "TIFF", "BMP", "PPM", "GIF", "JPEG2000")
_PLAN, _REPORT, _SUMMARY = "plan.json", "report.jsonl", "summary.json"


@dataclass(frozen=True)
class ListedPicture:
    """A picture that a person should look at. row: the id of its row; source: the place of its row."""

    reason: str
    message: str
    image: str
    row: str
    source: str


@dataclass
class VerifyResult:
    """The result of verifying a dataset's pictures.

    pictures: number of pictures that were decoded; listed: number of listed pictures by reason; examples: one listed
    picture of each reason; folder: the folder whose report.jsonl lists them all.
    """

    pictures: int = 0
    listed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, ListedPicture] = field(default_factory=dict)
    folder: str = ""

    @property
    def broken(self) -> int:
        """Number of pictures whose samples training leaves out of the loss."""
        return sum(count for reason, count in self.listed.items() if reason not in (BLANK, HOLE, OTHER_FORMAT))


@dataclass(frozen=True)
class Part:
    """The bins `first` to `stop` - 1 of a dataset."""

    first: int
    stop: int


@dataclass
class PartResult:
    """The result of one part: the number of its pictures, and those to list."""

    pictures: int = 0
    listed: list[ListedPicture] = field(default_factory=list)

    def encoded(self) -> bytes:
        """Returns the result as JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decoded(cls, data: bytes) -> Self:
        """Reads what `encoded` returned."""
        result = json.loads(data)
        return cls(result["pictures"], [ListedPicture(**picture) for picture in result["listed"]])


RunParts = Callable[[str, Sequence[Part]], Iterable[tuple[int, PartResult]]]
"""Decodes the pictures of some parts of a dataset, by its path; yields (first bin, result) of each as it is done."""


def verify(
    path: str, *, run_parts: RunParts | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> VerifyResult:  # fmt: skip
    """Decode every picture of a prepared dataset, and list the faulty ones in the folder `PATH-verify`.

    run_parts: decodes; default: `in_processes`, one for each CPU of this machine.
    on_progress: called with (bins done, all bins).

    Raises UserError when there is no prepared dataset, and when storage cannot be reached.
    """
    prepared = PreparedDataset(path)
    folder = Folder(f"{path.rstrip('/')}-verify")
    plan = json.dumps({"fingerprint": prepared.fingerprint, "bins_per_part": BINS_PER_PART}).encode()
    if folder.exists(_PLAN) and folder.read(_PLAN) != plan:
        folder.remove_tree("")
    folder.create()
    folder.write(_PLAN, plan)
    written_parts = set(folder.names())
    parts = {_name(first): first for first in range(0, len(prepared), BINS_PER_PART)}
    missing = [first for name, first in parts.items() if name not in written_parts]
    done = len(parts) - len(missing)
    on_progress(min(done * BINS_PER_PART, len(prepared)), len(prepared))
    missing_parts = [Part(first, min(first + BINS_PER_PART, len(prepared))) for first in missing]
    for first, result in (run_parts or in_processes())(path, missing_parts):
        folder.write(_name(first), result.encoded())
        done += 1
        on_progress(min(done * BINS_PER_PART, len(prepared)), len(prepared))
    return _write_report(folder, list(parts))


def _name(first: int) -> str:
    return f"part-{first:012d}.json"


def in_processes(processes: int | None = None) -> RunParts:
    """Returns a function that decodes in processes of this machine. processes: default: one for each CPU."""
    return partial(_in_processes, processes=processes or os.cpu_count() or 1)


def _in_processes(path: str, parts: Sequence[Part], *, processes: int) -> Iterator[tuple[int, PartResult]]:
    if processes == 1 or len(parts) < 2:
        yield from ((part.first, verify_part(path, part)) for part in parts)
        return
    with ProcessPoolExecutor(min(processes, len(parts)), multiprocessing.get_context("spawn")) as pool:
        waiting, left = dict[Future[PartResult], int](), list(reversed(parts))
        try:
            while waiting or left:
                while left and len(waiting) < 2 * processes:
                    part = left.pop()
                    waiting[pool.submit(verify_part, path, part)] = part.first
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"a process that decoded pictures of {path} was ended, by a lack of memory or by a picture; the same "
                "command continues; fewer --processes take less memory"
            ) from error


def verify_part(path: str, part: Part) -> PartResult:
    """Decode the pictures of a part's bins, each once."""
    prepared, result = PreparedDataset(path), PartResult()
    decoded_images: set[tuple[str, int, int]] = set()
    for packed in prepared.bins(part.first, part.stop):
        for image in packed.images:
            size = image["width"], image["height"]
            source = image["data"] if image["data"] is not None else image["uri"]
            if isinstance(source, str):
                if (source, *size) in decoded_images:
                    continue
                decoded_images.add((source, *size))
            result.pictures += 1
            name, sample = describe_source(source), image["sample"]
            result.listed += [
                ListedPicture(reason, message, name, packed.sample_ids[sample], packed.sample_sources[sample])
                for reason, message in picture_problems(source, size)
            ]
    return result


def picture_problems(source: ImageSource, size: tuple[int, int]) -> list[tuple[str, str]]:
    """Find the problems of a picture, as (reason, message); a sound picture has none.

    size: the (width, height) in pixels that it was prepared with. Raises UserError when its storage cannot be reached.
    """
    try:
        return with_retries(lambda: _picture_problems(source, size), source)
    except RowError as error:
        name = describe_source(source)
        return [(error.reason, error.message if name in error.message else f"{name}: {error.message}")]


def _picture_problems(source: ImageSource, size: tuple[int, int]) -> list[tuple[str, str]]:
    name, max_pixels = describe_source(source), max(MAX_PIXELS, size[0] * size[1])
    (page,) = render_tiles(source, plan_tiles(size, TilingPolicy()), max_pixels=max_pixels)  # as training does
    header = read_header(source, max_pixels=max_pixels)
    if header.format == "JPEG":
        with image_file(source) as file:
            file.seek(0)
            if lacks_pixels(file.read()):
                return [("image_corrupt", f"{name}: it ends before its pixels do; store the image anew")]
    listed = []
    lows, highs = np.asarray(page.getextrema()).reshape(-1, 2).T
    if (highs - lows).max() <= BLANK_RANGE:
        listed.append((BLANK, f"{name}: all pixels are {tuple(lows.tolist())}, as of an empty page"))
    elif black_share(page) >= BLACK_SHARE:
        message = "is black up to one edge, as where a file was not written to its end"
        listed.append((BLANK, f"{name}: {black_share(page):.0%} of it {message}"))
    elif header.format in _WITHOUT_CHECKSUMS and (zeros := _hole(source)):
        message = f"{zeros[1]:,} zeros stand in the place of its bytes from {zeros[0]:,} on, as where a block was lost"
        listed.append((HOLE, f"{name}: {message}"))
    suffix = os.path.splitext(file_of(source))[1].lower() if isinstance(source, str) else ""
    kind = "JPEG" if header.format == "MPO" else header.format
    if suffix not in _SUFFIXES.get(kind, ()) and any(suffix in known for known in _SUFFIXES.values()):
        listed.append((OTHER_FORMAT, f"{name}: the file is {kind}, whatever its name says"))
    return listed


def _hole(source: ImageSource) -> tuple[int, int] | None:
    with image_file(source) as file:
        file.seek(0)
        return hole(file)


def black_share(page: Image.Image) -> float:
    """Returns the share of a picture between one edge and the nearest pixel that is not entirely black."""
    left, top, right, bottom = page.getbbox() or (0, 0, 0, 0)
    return max(left / page.width, top / page.height, 1 - right / page.width, 1 - bottom / page.height)


def _write_report(folder: Folder, names: list[str]) -> VerifyResult:
    """Join the results of all parts, in the order of bins, and write the report and the summary."""
    verified = VerifyResult(folder=folder.uri)
    with folder.writing(_REPORT) as file:
        for name in names:
            result = PartResult.decoded(folder.read(name))
            verified.pictures += result.pictures
            for picture in result.listed:
                verified.listed[picture.reason] += 1
                verified.examples.setdefault(picture.reason, picture)
                file.write((json.dumps(asdict(picture), ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape"))
    summary = {
        "pictures": verified.pictures,
        "broken": verified.broken,
        "listed": dict(sorted(verified.listed.items())),
    }
    folder.write(_SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    return verified
