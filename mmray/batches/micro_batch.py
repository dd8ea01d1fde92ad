"""Makes the micro-batches that a model takes from bins, in three steps that can run in three places.

- `render`, on CPU actors: decodes, crops and resizes pictures, which stay uint8.
- `mask`, on GPU actors: makes labels and positions.
- `MicroBatch.model_inputs`, in the training process: rescales, normalises and lays out pixels on the training device.

A micro-batch is one packed row: the samples of its bins one after another, `[1, L]`, without padding between them.
Two samples of 3 tokens and 2 tokens with an image of 2 tokens in the first, `x I I` and `y z`, become:

| array | value |
| --- | --- |
| input_ids | `x I I y z` |
| lengths | 3 2 |
| blocks (first token and number of tokens of each image) | (1, 2) |
| tiles (number of the sample, width, height, frames) | (0, 56, 28, 1) |

A micro-batch without an image (or without a bin, at the end of an epoch) gets a sample of one small white picture,
outside every loss: each rank then runs the vision tower in every pass, and no collective operation waits for a rank
that does not take part. A sample with a picture that cannot be used keeps its place, outside the loss
(`mmray.batches.render`).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice, pairwise
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PretrainedConfig

from mmray.batches.render import (
    OnBadRow,
    Pages,
    RenderPage,
    SkippedSample,
    render_pages,
    skipped_from_array,
    skipped_to_array,
)
from mmray.errors import UserError
from mmray.families import Family, PackedRow, Tile
from mmray.images import TilingPolicy, render_tiles
from mmray.loss.labels import LabelMaker, segment_ids
from mmray.loss.rules import IGNORE_INDEX
from mmray.prepared import Bin
from mmray.prepared.arrow import binary_cell

log = logging.getLogger("mmray")

_reported_limits: set[int] = set()
"""Position limits of models for which a warning about longer samples was logged."""


@dataclass(frozen=True)
class Place:
    """Identifies a micro-batch of a run.

    step: global batches before it; rank: the rank that trains on it; micro: its number within the rank's step.
    """

    step: int
    rank: int
    micro: int


@dataclass(frozen=True)
class Layout:
    """The tokens of a micro-batch and the sizes of its pictures, from which labels and positions are computed.

    L: number of tokens; S: number of samples, where gaps and the added picture count too; I: number of images.
    """

    bins: np.ndarray  # int64 [bins], the numbers of its bins; empty bins are left out
    input_ids: np.ndarray  # int32 [L]
    lengths: np.ndarray  # int32 [S]
    padding: np.ndarray  # bool [S], True for what is no sample: gaps between samples, the added picture
    skipped: np.ndarray  # bool [S], True for samples outside the loss: one of their pictures cannot be used
    rules: np.ndarray  # int8 [S], LossRule
    given_mask: np.ndarray  # bool [L], the tokens that rows with LossRule.GIVEN mark as trained on
    blocks: np.ndarray  # int32 [I, 2], first token and number of tokens of each image
    trained_tokens: np.ndarray  # int64 [1], as counted when preparing; below 0 where that is not known
    tiles: np.ndarray  # int32 [tiles, 4]: number of the sample, width and height in pixels, number of frames
    frame_sizes: np.ndarray  # int32 [frames, 2], (width, height) in pixels


@dataclass(frozen=True)
class Rendered(Layout):
    """A micro-batch as arrays, with its pictures decoded."""

    place: np.ndarray  # int64 [3]: step, rank, micro
    problems: np.ndarray  # uint8, why samples are skipped (`skipped_to_array`)
    sets: np.ndarray  # int32 [S], number of each sample's set of rows (`Bin.sample_sets`); -1 where there is none
    pixels: np.ndarray  # uint8, the frames one after another, each [height, width, 3]


@dataclass(frozen=True)
class Labelled:
    """The labels and positions of a micro-batch."""

    labels: np.ndarray  # int64 [L]
    position_ids: np.ndarray  # int64 [rows, L] (`Family.position_rows`)


@dataclass(frozen=True)
class Masked(Labelled, Rendered):
    """A rendered micro-batch with its labels and positions."""


def render(
    bins: Sequence[Bin | None], place: Place, family: Family, policy: TilingPolicy,
    render_page: RenderPage = render_tiles, *, on_bad_row: OnBadRow = "error",
) -> Rendered:  # fmt: skip
    """Decode and tile the images of some bins and put their samples into one row.

    bins: the bins of the micro-batch; None is an empty bin.
    on_bad_row: what happens when a picture is missing, cannot be read or no longer has the prepared size: "reject"
    leaves its sample out of the loss, "error" raises UserError naming the row and the image.
    """
    present = [packed_bin for packed_bin in bins if packed_bin is not None]
    row = _RowBuilder(family)
    for packed_bin in present:
        row.add(packed_bin, render_pages(packed_bin, policy, render_page, on_bad_row))
    if sum(map(family.feature_count, row.tiles)) < family.least_features:
        row.add_dummy()
    _check_features(row, present)
    return Rendered(
        place=np.asarray([place.step, place.rank, place.micro], dtype=np.int64),
        bins=np.asarray([packed_bin.index for packed_bin in present], dtype=np.int64),
        input_ids=np.concatenate(row.ids).astype(np.int32),
        lengths=np.asarray([len(ids) for ids in row.ids], dtype=np.int32),
        padding=np.asarray(row.padding, dtype=bool),
        skipped=np.asarray(row.skipped, dtype=bool),
        problems=skipped_to_array(row.problems),
        rules=np.asarray(row.rules, dtype=np.int8),
        sets=np.asarray(row.sets, dtype=np.int32),
        given_mask=np.concatenate(row.given_masks),
        blocks=np.asarray(row.blocks, dtype=np.int32).reshape(-1, 2),
        trained_tokens=np.asarray([sum(packed_bin.trained_tokens for packed_bin in present)], dtype=np.int64),
        tiles=np.asarray(
            [(tile.sample, *tile.size, len(tile.frame_sizes)) for tile in row.tiles], dtype=np.int32
        ).reshape(-1, 4),
        frame_sizes=np.asarray([_size_of(frame) for frame in row.frames], dtype=np.int32),
        pixels=np.concatenate([frame.reshape(-1) for frame in row.frames]),
    )


class _RowBuilder:
    """Joins samples into one row. Each sample is one entry in every list from `ids` to `given_masks`."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.ids: list[np.ndarray] = []
        self.padding: list[bool] = []
        self.skipped: list[bool] = []
        self.problems: list[SkippedSample] = []
        self.rules: list[int] = []
        self.sets: list[int] = []
        self.given_masks: list[np.ndarray] = []
        self.blocks: list[tuple[int, int]] = []
        self.tiles: list[Tile] = []
        self.frames: list[np.ndarray] = []
        self.length = 0

    def add(self, packed: Bin, pages: Pages) -> None:
        """Append all samples of a bin with its pages."""
        starts = np.concatenate([[0], packed.sample_lengths.cumsum()]).tolist()
        given_mask = packed.given_mask if len(packed.given_mask) else np.zeros(starts[-1], dtype=bool)
        for number, (start, stop) in enumerate(pairwise(starts)):
            if self.ids and self.family.sample_gap:
                self._append(self._gap, padding=True)
            sample_images = [
                (image, tiles) for image, tiles in zip(packed.images, pages.tiles) if image["sample"] == number
            ]
            self.blocks += [
                (image["first_token"] - start + self.length, image["num_tokens"]) for image, _ in sample_images
            ]
            num_tiles = sum(len(tiles) for _, tiles in sample_images)
            for tile in (tile for _, tiles in sample_images for tile in tiles):
                self._picture(tile.size, self.family.frames(tile, num_tiles))
            self._append(
                packed.input_ids[start:stop], skipped=number in pages.skipped, rule=packed.sample_rules[number],
                set_number=packed.sample_sets[number], given_mask=given_mask[start:stop],
            )  # fmt: skip
        self.problems += pages.skipped.values()

    def add_dummy(self) -> None:
        """Append a sample of one small picture, outside every loss."""
        tile = self._picture(self.family.dummy_size, self.family.dummy_frames)
        count = self.family.feature_count(tile)
        self._append(np.full(count, self.family.image_token_id, dtype=np.int32), padding=True)

    @property
    def _gap(self) -> np.ndarray:
        return np.full(self.family.sample_gap, self.family.padding_id, dtype=np.int32)

    def _picture(self, size: tuple[int, int], frames: list[np.ndarray]) -> Tile:
        tile = Tile(len(self.ids), size, tuple(map(_size_of, frames)))
        self.tiles.append(tile)
        self.frames += frames
        return tile

    def _append(
        self, ids: np.ndarray, *, padding: bool = False, skipped: bool = False, rule: int = 0,
        set_number: int = -1, given_mask: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.ids.append(ids)
        self.padding.append(padding)
        self.skipped.append(skipped)
        self.rules.append(rule)
        self.sets.append(set_number)
        self.given_masks.append(np.zeros(len(ids), dtype=bool) if given_mask is None else given_mask)
        self.length += len(ids)


def _size_of(frame: np.ndarray) -> tuple[int, int]:
    return frame.shape[1], frame.shape[0]


def _check_features(row: _RowBuilder, bins: Sequence[Bin]) -> None:
    features = sum(map(row.family.feature_count, row.tiles))
    tokens = sum(int((ids == row.family.image_token_id).sum()) for ids in row.ids)
    if features != tokens:
        raise UserError(
            f"bins {[packed_bin.index for packed_bin in bins]}: {tokens} image tokens but {features} image features. "
            "The prepared dataset was made with another processor or version; prepare it anew with --replace"
        )


def mask(rendered: Rendered, family: Family, maker: LabelMaker, device: torch.device) -> Masked:
    """A rendered micro-batch with its labels and positions, made on `device`; raises what `labelled` raises."""
    made = labelled(rendered, family, maker, device)
    arrays = {field.name: getattr(rendered, field.name) for field in fields(Rendered)}
    return Masked(**arrays, labels=made.labels, position_ids=made.position_ids)


def labelled(layout: Layout, family: Family, maker: LabelMaker, device: torch.device) -> Labelled:
    """Make the labels and positions of a micro-batch, on `device`.

    Raises RuntimeError when the number of trained tokens, skipped samples included, differs from the number that was
    counted when preparing.
    """
    row = packed_row(layout, device)
    labels = maker.labels(
        row.input_ids,
        row.segment_ids,
        _on(device, layout.rules).to(torch.int64),
        _on(device, layout.given_mask),
        _on(device, layout.blocks).to(torch.int64),
    )
    positions = family.position_ids(row)
    trained, expected = int((labels != IGNORE_INDEX).sum()), int(layout.trained_tokens[0])
    if trained != expected and expected >= 0:
        raise RuntimeError(f"bins {layout.bins.tolist()}: {trained} trained tokens, {expected} when prepared")
    labels = labels.masked_fill(_skipped_tokens(layout, device), IGNORE_INDEX)
    return Labelled(labels=labels.cpu().numpy(), position_ids=positions.cpu().numpy())


def _skipped_tokens(layout: Layout, device: torch.device) -> Tensor:
    """Marks the tokens of samples that are left out of the loss, bool [L]."""
    lengths = _on(device, layout.lengths).to(torch.int64)
    return torch.repeat_interleave(_on(device, layout.skipped), lengths, output_size=len(layout.input_ids))


def packed_row(layout: Layout, device: torch.device) -> PackedRow:
    """The row of a micro-batch as a family takes it, on `device`."""
    lengths = _on(device, layout.lengths).to(torch.int64)
    sizes = iter((int(width), int(height)) for width, height in layout.frame_sizes)
    return PackedRow(
        input_ids=_on(device, layout.input_ids).to(torch.int64),
        lengths=lengths,
        segment_ids=segment_ids(lengths, _on(device, layout.padding), total=len(layout.input_ids)),
        tiles=tuple(
            Tile(sample, (width, height), tuple(islice(sizes, count)))
            for sample, width, height, count in layout.tiles.tolist()
        ),
    )


class MicroBatch:
    """A micro-batch in the training process: `labels` [1, L] and the arguments of the model's forward.

    Where the arguments are made ahead of their use (`made_ahead`, set by `InputsAhead`), the first call of
    `model_inputs` takes them, and `labels` are on the device from then on.
    """

    def __init__(self, masked: Masked, family: Family) -> None:
        self.masked = masked
        self.family = family
        self.labels = _tensor(masked.labels)[None]
        self.made_ahead: Callable[[], DeviceInputs] | None = None

    @property
    def row(self) -> PackedRow:
        """Its tokens, samples and tiles, on the CPU."""
        return packed_row(self.masked, torch.device("cpu"))

    @property
    def place(self) -> Place:
        step, rank, micro = (int(value) for value in self.masked.place)
        return Place(step, rank, micro)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of its samples, without gaps and the added picture."""
        return int(self.masked.lengths[~self.masked.padding].sum())

    @property
    def trained_segments(self) -> Tensor:
        """The number of each token's sample, int64 [L]; -1 outside samples and in skipped ones."""
        masked = self.masked
        left_out = _tensor(masked.padding | masked.skipped)
        return segment_ids(_tensor(masked.lengths), left_out, total=len(masked.input_ids))

    @property
    def token_sets(self) -> Tensor:
        """The number of the set of rows of each token's sample, int64 [L]; -1 outside samples."""
        masked = self.masked
        sets, lengths = _tensor(masked.sets).to(torch.int64), _tensor(masked.lengths).to(torch.int64)
        return torch.repeat_interleave(sets, lengths, output_size=len(masked.input_ids))

    @property
    def num_samples(self) -> int:
        """Number of its samples, skipped ones included."""
        return int((~self.masked.padding).sum())

    @property
    def skipped(self) -> list[SkippedSample]:
        """Its samples that are outside the loss because one of their pictures cannot be used."""
        return skipped_from_array(self.masked.problems)

    @property
    def bins(self) -> list[int]:
        """Numbers of its bins, without empty ones."""
        return [int(number) for number in self.masked.bins]

    def _warn_of_long_samples(self, config: PretrainedConfig) -> None:
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        if limit and (positions := _positions(self.masked)) > limit:
            _warn_of_long_samples(limit, f"bins {self.bins}: a sample has {positions} positions")

    def model_inputs(self, device: torch.device, dtype: torch.dtype, config: PretrainedConfig) -> dict[str, Any]:
        """The keyword arguments of the model's forward, on `device`.

        dtype: that of pixels and attention masks.
        config: the model's configuration, with the attention implementation it runs.
        """
        if self.made_ahead is None:
            return self.inputs_on(device, dtype, config).arguments
        taken, self.made_ahead = self.made_ahead(), None
        self.labels = taken.labels
        return taken.arguments

    def inputs_on(self, device: torch.device, dtype: torch.dtype, config: PretrainedConfig) -> "DeviceInputs":
        """Makes the keyword arguments of the model's forward, and the labels, on `device`, as `model_inputs` says."""
        masked = self.masked
        self._warn_of_long_samples(config)
        labels = _on(device, masked.labels)
        row = replace(packed_row(masked, device), trained=labels != IGNORE_INDEX)
        pixels = _on(device, masked.pixels)
        sizes = [size for tile in row.tiles for size in tile.frame_sizes]
        frames = [
            frame.reshape(height, width, 3)
            for frame, (width, height) in zip(pixels.split([width * height * 3 for width, height in sizes]), sizes)
        ]
        positions = _on(device, masked.position_ids)
        return DeviceInputs(self.family.model_inputs(row, positions, frames, dtype, config), labels[None])


@dataclass(frozen=True)
class DeviceInputs:
    """A micro-batch on the training device.

    arguments: the keyword arguments of the model's forward; labels: int64 [1, L].
    """

    arguments: dict[str, Any]
    labels: Tensor


def _positions(masked: Masked) -> int:
    """The number of positions of the sample that has the most; under M-RoPE, of its axes."""
    positions = masked.position_ids[-3:]
    return int(positions.max()) + 1 if positions.size else int(masked.lengths.max())


def _warn_of_long_samples(limit: int, example: str) -> None:
    if limit in _reported_limits:
        return
    _reported_limits.add(limit)
    log.warning(
        "%s, more than the %d that the model was made for (max_position_embeddings); packing.token_capacity rejects "
        "longer rows. Others are not told",
        example, limit,
    )  # fmt: skip


def _tensor(array: np.ndarray) -> Tensor:
    """A tensor that shares the array's memory.

    Arrays that come out of Arrow are read-only. torch warns about that; nothing here writes to them.
    """
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Writable(array)))


class _Writable:
    """A read-only array that says it may be written to. Filters of warnings are no way for several threads."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array  # which lives as long as the memory is used
        interface = array.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def _on(device: torch.device, array: np.ndarray) -> Tensor:
    """The array as a tensor on `device`; on the CPU it shares the array's memory.

    A GPU copies it from pinned memory, which the host does not wait for. From ordinary memory the host would wait until
    the GPU has done all its work of that stream.
    """
    tensor = _tensor(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


# -------------------------------------------------------------------- between processes


def to_table(arrays: Layout | Labelled) -> pa.Table:
    """A one-row Arrow table with each array as the bytes of one cell; pictures are not copied."""
    return pa.table(
        {field.name: binary_cell(np.ascontiguousarray(getattr(arrays, field.name))) for field in fields(arrays)}
    )


Arrays = TypeVar("Arrays", Layout, Rendered, Labelled, Masked)


def from_table(kind: type[Arrays], table: pa.Table) -> Arrays:
    """The arrays that `to_table` wrote, as views of the table's memory."""
    arrays = {field.name: _array(table[field.name], field.name) for field in fields(kind)}
    if "position_ids" in arrays:
        arrays["position_ids"] = arrays["position_ids"].reshape(-1, len(arrays["labels"]))
    return kind(**arrays)


_DTYPES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "place": (np.int64, (-1,)), "bins": (np.int64, (-1,)), "input_ids": (np.int32, (-1,)),
    "lengths": (np.int32, (-1,)), "padding": (np.bool_, (-1,)), "skipped": (np.bool_, (-1,)),
    "problems": (np.uint8, (-1,)), "rules": (np.int8, (-1,)), "sets": (np.int32, (-1,)),
    "given_mask": (np.bool_, (-1,)),
    "blocks": (np.int32, (-1, 2)), "trained_tokens": (np.int64, (-1,)), "tiles": (np.int32, (-1, 4)),
    "frame_sizes": (np.int32, (-1, 2)), "pixels": (np.uint8, (-1,)), "labels": (np.int64, (-1,)),
    "position_ids": (np.int64, (-1,)),
}  # fmt: skip


def _array(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """The array in the one cell of a column.

    `column[0].as_buffer()` would give it too, but a scalar is a copy: 0.6 ms a megabyte.
    """
    (cell,) = (chunk for chunk in column.chunks if len(chunk))
    _, offsets, data = cell.buffers()
    start, stop = np.frombuffer(offsets, dtype=np.int64)[cell.offset : cell.offset + 2]
    dtype, shape = _DTYPES[name]
    return np.frombuffer(data.slice(start, stop - start), dtype=dtype).reshape(shape)
