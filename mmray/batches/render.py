"""Renders the pages of a bin for training, and decides what happens to a sample with a picture that cannot be used.

Preparing reads headers only, and files change, disappear and decay in the weeks of a run. With `on_bad_row: reject`
such a picture does not stop the run: white tiles of the planned sizes take its place, so that tokens, positions and
masks of all other samples stay the same to the bit; its whole sample is left out of the loss, and reported. The sample
is not cut out of its bin, since the order of a run, its loads and its checks all rely on bins as they were prepared.

Storage that fails is another matter: see `mmray.images.retries`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from mmray.base.ahead import in_order
from mmray.errors import RowError, UserError
from mmray.images import ImageSource, TilePlan, TilingPolicy, plan_tiles
from mmray.images.header import MAX_PIXELS
from mmray.images.retries import with_retries
from mmray.images.source import describe_source
from mmray.prepared import Bin

THREADS, AHEAD = 16, 32
"""Threads that read the images of a bin from object storage, and the most images that are rendered before their turn. A
read waits for 20 to 50 ms, as long as decoding takes. Local images are rendered in turn."""

OnBadRow = Literal["reject", "error"]


class RenderPage(Protocol):
    """Renders the tiles of one page: `render_tiles`, or the method of a `TileCache`."""

    def __call__(self, source: ImageSource, plan: TilePlan, *, max_pixels: int) -> list[Image.Image]: ...


@dataclass(frozen=True)
class SkippedSample:
    """A sample that is outside the loss because one of its pictures cannot be used; fields as in `rejected.parquet`."""

    id: str
    source: str
    """The place of its row: file:line, or file:row in Parquet."""
    reason: str
    """A reason of docs/rows.md, such as `image_corrupt`."""
    message: str
    """One line for a person: the picture, and what is wrong with it."""

    def __str__(self) -> str:
        return f"row {self.id!r} ({self.source}): {self.reason}: {self.message}"


@dataclass(frozen=True)
class Pages:
    """The rendered images of a bin.

    tiles: the tiles of each image; skipped: the samples with a picture that cannot be used, by number in the bin.
    """

    tiles: list[list[Image.Image]]
    skipped: dict[int, SkippedSample]


def render_pages(packed: Bin, policy: TilingPolicy, render_page: RenderPage, on_bad_row: OnBadRow) -> Pages:
    """Decode all images of a bin and cut them into tiles.

    Raises UserError naming the row and the image when a picture is missing, cannot be read or no longer has the
    prepared size, and `on_bad_row` is "error"; and when its storage cannot be reached.
    """
    tiles: list[list[Image.Image]] = []
    skipped: dict[int, SkippedSample] = {}
    render = partial(_tiles_or_error, policy=policy, render_page=render_page)
    is_remote = any("://" in (image["uri"] or "") for image in packed.images)
    rendered = (
        in_order(render, packed.images, threads=THREADS, ahead=AHEAD) if is_remote else map(render, packed.images)
    )
    for image, result in zip(packed.images, rendered, strict=True):
        if not isinstance(result, RowError):
            tiles.append(result)
            continue
        sample = image["sample"]
        problem = _problem(packed, sample, _source(image), result)
        if on_bad_row == "error":
            raise UserError(
                f"{problem}. Its header was read when preparing; put it back, or another picture of that size in "
                "its place (or let such samples be left out: data.on_bad_row: reject)"
            ) from result
        skipped.setdefault(sample, problem)
        plan = plan_tiles((image["width"], image["height"]), policy)
        tiles.append([Image.new("RGB", tile_size, "white") for tile_size in plan.tile_sizes])
    return Pages(tiles, skipped)


def _source(image: Mapping[str, Any]) -> ImageSource:
    source: ImageSource = image["data"] if image["data"] is not None else image["uri"]
    return source


def _tiles_or_error(
    image: Mapping[str, Any], *, policy: TilingPolicy, render_page: RenderPage
) -> list[Image.Image] | RowError:  # fmt: skip
    """Renders the tiles of an image; returns the RowError of one that cannot be used."""
    size, source = (image["width"], image["height"]), _source(image)
    max_pixels = max(MAX_PIXELS, size[0] * size[1])  # checked when preparing
    try:
        return with_retries(partial(render_page, source, plan_tiles(size, policy), max_pixels=max_pixels), source)
    except RowError as error:
        return error


def _problem(packed: Bin, sample: int, source: ImageSource, error: RowError) -> SkippedSample:
    name = describe_source(source)
    message = error.message if name in error.message else f"{name}: {error.message}"
    return SkippedSample(packed.sample_ids[sample], packed.sample_sources[sample], error.reason, message)


def skipped_to_array(skipped: Sequence[SkippedSample]) -> np.ndarray:
    """Encode skipped samples as JSON bytes, uint8 [n], that travel with a micro-batch."""
    return np.frombuffer(json.dumps([asdict(sample) for sample in skipped]).encode(), dtype=np.uint8)


def skipped_from_array(array: np.ndarray) -> list[SkippedSample]:
    """Decode the skipped samples that `skipped_to_array` encoded."""
    records: list[dict[str, Any]] = json.loads(array.tobytes())
    return [SkippedSample(**record) for record in records]
