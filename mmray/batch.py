"""From bins to the micro-batches a model takes: render, mask, and on the training device pixels.

A micro-batch is one packed row: the samples of its bins one after another, `[1, L]`, without padding between them.
Where it holds no image (or no bin at all, at the end of an epoch) a sample of one small white picture is added, outside
every loss, so that each rank runs the vision tower in every pass and no collective operation waits for a rank that
does not come.

The three steps are three functions so that they can run in three places: `render` on CPU actors (decode, crop, resize;
pictures stay uint8), `mask` on GPU actors (labels, positions), `MicroBatch.model_inputs` in the training process
(rescale, normalise, patch layout).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mmray.arrow import binary_cell
from mmray.errors import RowError, UserError
from mmray.families import Family
from mmray.images import TilingPolicy, cut_tiles, load_image, plan_tiles
from mmray.images.header import MAX_PIXELS
from mmray.images.source import describe_source
from mmray.masks.labels import IGNORE_INDEX, LabelMaker, segment_ids
from mmray.prepared import Bin


@dataclass(frozen=True)
class Place:
    """Which micro-batch of a run this is. step counts global batches; micro counts within the rank's step."""

    step: int
    rank: int
    micro: int


@dataclass(frozen=True)
class Rendered:
    """A micro-batch as arrays, pictures decoded. L: tokens; S: samples, the added one included; I: images."""

    place: np.ndarray  # int64 [3]: step, rank, micro
    bins: np.ndarray  # int64, the numbers of its bins; empty bins are left out
    input_ids: np.ndarray  # int32 [L]
    lengths: np.ndarray  # int32 [S]
    rules: np.ndarray  # int8 [S], LossRule
    given: np.ndarray  # bool [L], for LossRule.GIVEN
    blocks: np.ndarray  # int32 [I, 2], first token and number of tokens of each image
    padding: np.ndarray  # int32 [1], tokens of the added sample, at the end
    trained_tokens: np.ndarray  # int64 [1], as counted when preparing
    frame_sizes: np.ndarray  # int32 [frames, 2], (width, height) in pixels
    pixels: np.ndarray  # uint8, the frames one after another, each [height, width, 3]


@dataclass(frozen=True)
class Masked(Rendered):
    """A micro-batch with its masks."""

    labels: np.ndarray  # int64 [L]
    position_ids: np.ndarray  # int64 [rows, L]: 1 row, or 4 for M-RoPE


def render(bins: Sequence[Bin | None], place: Place, family: Family, policy: TilingPolicy) -> Rendered:
    """Decode and tile the images of some bins and put their samples into one row. None is an empty bin.

    Raises UserError naming the row and the image when a picture is gone, broken or no longer what was prepared.
    """
    present = [each for each in bins if each is not None]
    frames = [frame for each in present for frame in _frames(each, family, policy)]
    ids = [each.input_ids for each in present]
    starts = np.cumsum([0] + [len(each) for each in ids])
    blocks = [
        (image["first_token"] + start, image["num_tokens"])
        for each, start in zip(present, starts)
        for image in each.images
    ]
    lengths = [each.sample_lengths for each in present]
    padding = 0
    if not frames:
        frames = [family.dummy_frame]
        (padding,) = family.feature_counts([(frames[0].shape[1], frames[0].shape[0])])
        dummy = np.full(padding, family.image_token_id, dtype=np.int32)
        ids, lengths = [*ids, dummy], [*lengths, np.asarray([padding])]
    input_ids = np.concatenate(ids).astype(np.int32)
    sizes = np.asarray([(frame.shape[1], frame.shape[0]) for frame in frames], dtype=np.int32)
    _check_features(input_ids, sizes, family, present)
    given = np.zeros(len(input_ids), dtype=bool)
    for each, start in zip(present, starts):
        given[start : start + len(each.given)] = each.given
    rules = [*(each.sample_rules for each in present), np.zeros(1 if padding else 0, dtype=np.int8)]
    return Rendered(
        place=np.asarray([place.step, place.rank, place.micro], dtype=np.int64),
        bins=np.asarray([each.index for each in present], dtype=np.int64),
        input_ids=input_ids,
        lengths=np.concatenate(lengths).astype(np.int32),
        rules=np.concatenate(rules),
        given=given,
        blocks=np.asarray(blocks, dtype=np.int32).reshape(-1, 2),
        padding=np.asarray([padding], dtype=np.int32),
        trained_tokens=np.asarray([sum(each.trained_tokens for each in present)], dtype=np.int64),
        frame_sizes=sizes,
        pixels=np.concatenate([frame.reshape(-1) for frame in frames]),
    )


def _frames(each: Bin, family: Family, policy: TilingPolicy) -> list[np.ndarray]:
    frames = []
    for image in each.images:
        size = image["width"], image["height"]
        source = image["data"] if image["data"] is not None else image["uri"]
        try:
            page = load_image(source, max_pixels=max(MAX_PIXELS, size[0] * size[1]))  # checked when preparing
            tiles = cut_tiles(page, plan_tiles(size, policy))
        except RowError as error:
            row, line = each.sample_ids[image["sample"]], each.sample_sources[image["sample"]]
            name = describe_source(source)
            what = str(error) if name in error.message else f"{name}: {error}"
            raise UserError(
                f"row {row!r} ({line}): {what}. Its header was read when preparing; put it back, or another "
                "picture of that size in its place"
            ) from error
        frames += [frame for tile in tiles for frame in family.frames(tile)]
    return frames


def _check_features(input_ids: np.ndarray, sizes: np.ndarray, family: Family, bins: Sequence[Bin]) -> None:
    features = sum(family.feature_counts([(int(width), int(height)) for width, height in sizes]))
    tokens = int((input_ids == family.image_token_id).sum())
    if features != tokens:
        raise UserError(
            f"bins {[each.index for each in bins]}: {tokens} image tokens but {features} image features. The prepared "
            "dataset was made with another processor or version; prepare it anew with --replace"
        )


def mask(rendered: Rendered, family: Family, maker: LabelMaker, device: torch.device) -> Masked:
    """Labels and positions of a micro-batch, computed on `device`.

    Raises RuntimeError when the trained tokens are not as many as were counted when preparing.
    """
    ids = _tensor(rendered.input_ids).to(device, torch.int64)
    lengths = _tensor(rendered.lengths).to(device, torch.int64)
    padding = int(rendered.padding[0])
    segments = segment_ids(lengths, padding)
    rules = _tensor(rendered.rules).to(device, torch.int64)
    labels = maker.labels(
        ids,
        segments,
        torch.repeat_interleave(rules, lengths),
        _tensor(rendered.given).to(device),
        _tensor(rendered.blocks).to(device, torch.int64),
    )
    sizes = [(int(width), int(height)) for width, height in rendered.frame_sizes]
    positions = family.position_ids(ids, lengths, sizes).reshape(-1, len(ids))
    trained, expected = int((labels != IGNORE_INDEX).sum()), int(rendered.trained_tokens[0])
    if trained != expected:
        raise RuntimeError(f"bins {rendered.bins.tolist()}: {trained} trained tokens, {expected} when prepared")
    rendered_arrays = {field.name: getattr(rendered, field.name) for field in fields(Rendered)}
    return Masked(**rendered_arrays, labels=labels.cpu().numpy(), position_ids=positions.cpu().numpy())


class MicroBatch:
    """A micro-batch in the training process: `labels` [1, L] and the arguments of the model's forward."""

    def __init__(self, masked: Masked, family: Family) -> None:
        self.masked = masked
        self.family = family
        self.labels = _tensor(masked.labels)[None]

    @property
    def place(self) -> Place:
        step, rank, micro = (int(value) for value in self.masked.place)
        return Place(step, rank, micro)

    @property
    def num_tokens(self) -> int:
        """Tokens of its samples, without the added one."""
        return len(self.masked.input_ids) - int(self.masked.padding[0])

    @property
    def bins(self) -> list[int]:
        """The numbers of its bins, without empty ones."""
        return [int(number) for number in self.masked.bins]

    def model_inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The keyword arguments of the model's forward, on `device`; pixels as `dtype`.

        No attention mask is among them: the model finds the samples by their positions, which restart.
        """
        masked = self.masked
        pixels = _tensor(masked.pixels).to(device, non_blocking=True)
        sizes = [(int(width), int(height)) for width, height in masked.frame_sizes]
        frames = [
            frame.reshape(height, width, 3)
            for frame, (width, height) in zip(pixels.split([width * height * 3 for width, height in sizes]), sizes)
        ]
        positions = _tensor(masked.position_ids).to(device)
        return {
            "input_ids": _tensor(masked.input_ids).to(device, torch.int64)[None],
            "position_ids": positions[:, None] if self.family.rotary_sections else positions,
            **self.family.pixel_inputs(frames, dtype),
        }


def _tensor(array: np.ndarray) -> Tensor:
    """A tensor on the array's memory. Arrays out of Arrow are read-only: torch warns of it, nothing here writes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


# -------------------------------------------------------------------- between processes


def to_table(arrays: Rendered) -> pa.Table:
    """A one-row Arrow table with every array as bytes; the pictures are not copied."""
    return pa.table(
        {field.name: binary_cell(np.ascontiguousarray(getattr(arrays, field.name))) for field in fields(arrays)}
    )


Arrays = TypeVar("Arrays", bound=Rendered)


def from_table(kind: type[Arrays], table: pa.Table) -> Arrays:
    """The inverse of `to_table`; the arrays are views of the table's memory."""
    arrays = {field.name: _array(table[field.name], field.name) for field in fields(kind)}
    if "position_ids" in arrays:
        arrays["position_ids"] = arrays["position_ids"].reshape(-1, len(arrays["input_ids"]))
    return kind(**arrays)


_DTYPES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "place": (np.int64, (-1,)), "bins": (np.int64, (-1,)), "input_ids": (np.int32, (-1,)),
    "lengths": (np.int32, (-1,)), "rules": (np.int8, (-1,)), "given": (np.bool_, (-1,)),
    "blocks": (np.int32, (-1, 2)), "padding": (np.int32, (-1,)), "trained_tokens": (np.int64, (-1,)),
    "frame_sizes": (np.int32, (-1, 2)), "pixels": (np.uint8, (-1,)), "labels": (np.int64, (-1,)),
    "position_ids": (np.int64, (-1,)),
}  # fmt: skip


def _array(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """The array in the one cell of a column. Not `column[0].as_buffer()`: a scalar is a copy, 0.6 ms a megabyte."""
    (cell,) = (chunk for chunk in column.chunks if len(chunk))
    _, offsets, data = cell.buffers()
    start, stop = np.frombuffer(offsets, dtype=np.int64)[cell.offset : cell.offset + 2]
    dtype, shape = _DTYPES[name]
    return np.frombuffer(data.slice(start, stop - start), dtype=dtype).reshape(shape)
