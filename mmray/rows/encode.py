"""Rows to samples: exact token ids from image headers, without decoding a pixel.

Text is tokenised once, in batches, with one placeholder token for each tile; then each placeholder gives way to the
tokens its tile becomes. A placeholder is a special token, so tokenisers split text at it before anything else, and the
result equals tokenising the expanded text; `verify` compares it with the real processor all the same.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from mmray.errors import RowError, UserError
from mmray.families import Family
from mmray.images import TilePlan, TilingPolicy, image_size, plan_tiles
from mmray.images.source import one_line
from mmray.masks.labels import IGNORE_INDEX, LossRule
from mmray.packing_settings import PackingSettings
from mmray.rows.document import Document, DocumentReader, ImageRef, check_image_count, missing_column
from mmray.rows.read import RawRow
from mmray.rows.settings import DatasetSettings, DataSettings

NO_BLOCKS = np.zeros((0, 2), dtype=np.int32)


@dataclass(frozen=True)
class Sample:
    """One row, encoded. A sample's position in its window is that of its row.

    input_ids: int32 [n]; given: bool [n] for LossRule.GIVEN, else empty; blocks: int32 [images, 2], the first token
    and the number of tokens that stand for each image; sizes: upright (width, height) of each image in pixels.
    """

    id: str
    source: str
    rule: LossRule
    bucket: str
    visual_tokens: int
    input_ids: np.ndarray
    images: tuple[ImageRef, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    blocks: np.ndarray = field(default_factory=lambda: NO_BLOCKS)
    given: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))


@dataclass(frozen=True)
class RejectedRow:
    """A row that cannot be used. row: the row as JSON, shortened, for a person who looks for the cause."""

    id: str
    source: str
    reason: str
    message: str
    row: str


@dataclass(frozen=True)
class _Pending:
    """A row between reading and tokenising."""

    row: RawRow
    document: Document
    plans: tuple[TilePlan, ...]
    sizes: tuple[tuple[int, int], ...]
    text: str


class Encoder:
    """Encodes the rows of a job. Holds the tokenizer; safe to build once per actor."""

    def __init__(
        self, data: DataSettings, datasets: Sequence[DatasetSettings], family: Family, policy: TilingPolicy,
        packing: PackingSettings, *, train_on_inputs: bool = False,
    ) -> None:  # fmt: skip
        self.data, self.datasets, self.family, self.policy, self.packing = data, datasets, family, policy, packing
        self.chat_rule = LossRule.ALL if train_on_inputs else LossRule.ROLES
        self._ends = [self._end_of_document(dataset) if self._adds_eos(dataset) else None for dataset in datasets]
        self._readers = [DocumentReader(dataset, family) for dataset in datasets]
        self._plan = functools.lru_cache(maxsize=65_536)(lambda size: plan_tiles(size, policy))
        backend = family.tokenizer.backend_tokenizer
        backend.no_truncation()  # some tokenizer.json files cut at a length of their own
        backend.no_padding()
        self._backend = backend
        self._vocabulary_size = len(family.tokenizer)

    def encode(self, rows: Sequence[RawRow], verify: Sequence[int] = ()) -> list[Sample | RejectedRow]:
        """One sample or rejected row for each row, in order.

        verify: positions in `rows` to compare with the real processor. Raises UserError when one differs, and for the
        first bad row under `on_bad_row: error`.
        """
        prepared = [self._guard(row, self._prepare, row) for row in rows]
        encoded = iter(self._tokenize([item for item in prepared if isinstance(item, _Pending)]))
        results: list[Sample | RejectedRow] = []
        for number, (row, item) in enumerate(zip(rows, prepared)):
            result: Any = item
            if isinstance(item, _Pending):
                ids = next(encoded)
                result = self._guard(row, self._sample, item, ids)
                if number in verify and isinstance(result, Sample):
                    self._verify(item, result)
            results.append(result)
        return results

    def _guard(self, row: RawRow, step: Any, *arguments: Any) -> Any:
        try:
            return step(*arguments)
        except RecursionError:
            return self._reject(row, RowError("bad_json", "the row nests too deeply; write it flat"))
        except RowError as error:
            return self._reject(row, error)

    def _reject(self, row: RawRow, error: RowError) -> RejectedRow:
        if self.data.on_bad_row == "error":
            raise UserError(
                f"{row.source}: {error}. (on_bad_row: reject would set such rows aside in rejected.parquet)"
            ) from error
        value = row.value if isinstance(row.value, dict) else {}
        row_id = value.get(self.datasets[row.dataset].column("id"))
        named = isinstance(row_id, (str, int)) and not isinstance(row_id, bool)
        return RejectedRow(str(row_id) if named else row.source, row.source, error.reason, error.message, _shown(value))

    # ---------------------------------------------------------------- images

    def _prepare(self, row: RawRow) -> "_Pending | Sample":
        if isinstance(row.value, RowError):
            raise row.value
        if self.datasets[row.dataset].kind == "tokenized":
            return self._ready_made(row, row.value)
        document = self._readers[row.dataset].read(row.value, row.source)
        sizes = tuple(self._size(image) for image in document.images)
        plans = tuple(self._plan(size) for size in sizes)
        return _Pending(row, document, plans, sizes, self._expand_units(document.text, plans))

    def _size(self, image: ImageRef) -> tuple[int, int]:
        source = image.data if image.data is not None else image.uri
        return image_size(source, max_pixels=self.data.max_image_pixels)

    def _expand_units(self, text: str, plans: Sequence[TilePlan]) -> str:
        """Each image's unit, repeated for its tiles, each after its label and a newline."""
        unit = self.family.placeholder_unit
        head, *tails = text.split(unit)
        pieces = [head]
        for plan, tail in zip(plans, tails, strict=True):
            pieces += [f"{label}\n{unit}" if label else unit for label in plan.labels]
            pieces.append(tail)
        return "".join(pieces)

    def _tile_tokens(self, plan: TilePlan) -> list[tuple[np.ndarray, int]]:
        try:
            spans = [self.family.span(size) for size in plan.tile_sizes]
        except ValueError as error:
            raise RowError(
                "image_shape",
                f"the processor takes no image of {plan.size}: {one_line(error)}; crop it or cut it in tiles",
            ) from error
        return [(span.token_ids, span.visual_tokens) for span in spans]

    # ---------------------------------------------------------------- tokens

    def _tokenize(self, pending: Sequence[_Pending]) -> list[np.ndarray]:
        """Token ids with one placeholder token per tile, int32 each; one tokenizer call for each kind of text."""
        ids: list[np.ndarray] = [np.zeros(0, dtype=np.int32)] * len(pending)
        for special in (True, False):
            chosen = [index for index, item in enumerate(pending) if item.document.add_special_tokens is special]
            encodings = self._backend.encode_batch_fast([pending[i].text for i in chosen], add_special_tokens=special)
            for index, encoding in zip(chosen, encodings):
                ids[index] = np.asarray(encoding.ids, dtype=np.int32)
        return ids

    def _sample(self, item: _Pending, ids: np.ndarray) -> Sample:
        dataset = self.datasets[item.row.dataset]
        places = np.flatnonzero(ids == self.family.placeholder_id)
        tiles = [self._tile_tokens(plan) for plan in item.plans]
        if len(places) != sum(map(len, tiles)):
            raise RowError(
                "placeholder_count", f"the text holds {len(places)} image tokens for {sum(map(len, tiles))} tiles"
            )
        pieces, blocks, length, read, tile = [], [], 0, 0, 0
        for plan, spans in zip(item.plans, tiles):
            start = length + int(places[tile]) - read - self._label_tokens(plan, ids[: places[tile]])
            for token_ids, _ in spans:
                pieces += [ids[read : places[tile]], token_ids]
                length += int(places[tile]) - read + len(token_ids)
                read, tile = int(places[tile]) + 1, tile + 1
            blocks.append((start, length - start))
        pieces.append(ids[read:])
        if self._adds_eos(dataset):
            pieces.append(np.asarray([self._ends[item.row.dataset]], dtype=np.int32))
        sample = Sample(
            id=item.document.id,
            source=item.row.source,
            rule=LossRule.ALL if dataset.kind == "pretrain" else self.chat_rule,
            bucket=_bucket(item.plans),
            visual_tokens=sum(visual for spans in tiles for _, visual in spans),
            input_ids=np.concatenate(pieces),
            images=item.document.images,
            sizes=item.sizes,
            blocks=np.asarray(blocks, dtype=np.int32).reshape(-1, 2),
        )
        return self._check_capacity(sample)

    def _end_of_document(self, dataset: DatasetSettings) -> int:
        token = dataset.end_of_document or self.family.tokenizer.eos_token
        if token is None:
            raise UserError("the tokenizer has no end-of-document token (eos_token); set add_eos: false")
        try:
            return self.family.token_id(token)
        except ValueError as error:
            raise UserError(f"end_of_document: {error}") from error

    @staticmethod
    def _adds_eos(dataset: DatasetSettings) -> bool:
        return dataset.kind == "pretrain" and dataset.add_eos

    def _label_tokens(self, plan: TilePlan, before: np.ndarray) -> int:
        """Tokens of an image's first label, which end the text before its placeholder. Where a token holds the last
        letter before the label too, it counts."""
        label = plan.labels[0]
        if not label:
            return 0
        prefix = self.family.placeholder_unit.split(self.family.placeholder)[0]
        tokens = self._backend.encode(f"{label}\n{prefix}", add_special_tokens=False).ids
        if before[-len(tokens) :].tolist() == tokens:
            return len(tokens)
        tails = ((count, self._backend.decode(before[-count:], skip_special_tokens=False)) for count in range(1, 99))
        return next((count for count, tail in tails if label in tail), 0)

    def _check_capacity(self, sample: Sample) -> Sample:
        tokens, room = len(sample.input_ids), self.packing.token_capacity
        if tokens > room:
            raise RowError("too_long", f"{tokens} tokens, packing.token_capacity is {room}; raise it or split the row")
        visual, room = sample.visual_tokens, self.packing.visual_capacity
        if visual > room:
            raise RowError(
                "too_many_visual_tokens",
                f"{visual} visual tokens, packing.visual_capacity is {room}; raise it, use fewer or smaller tiles, or "
                "split the row",
            )
        return sample

    # ---------------------------------------------------------------- tokenized rows

    def _ready_made(self, row: RawRow, value: dict[str, Any]) -> Sample:
        """A `tokenized` row: its ids hold every image token already, and must hold the right number."""
        dataset, reader = self.datasets[row.dataset], self._readers[row.dataset]
        ids = _integers(value, dataset.column("input_ids"))
        labels = _integers(value, dataset.column("labels"))
        if len(ids) != len(labels) or not len(ids):
            raise RowError(
                "wrong_type",
                f"input_ids has {len(ids)} entries and labels {len(labels)}; give one label for each token",
            )
        unknown = np.flatnonzero((ids < 0) | (ids >= self._vocabulary_size))
        if len(unknown):
            raise RowError(
                "wrong_type",
                f"input_ids[{unknown[0]}] is {ids[unknown[0]]}: the tokenizer has 0 to {self._vocabulary_size - 1}",
            )
        given = labels != IGNORE_INDEX
        if not np.array_equal(labels[given], ids[given]):
            where = int(np.flatnonzero(given & (labels != ids))[0])
            raise RowError(
                "wrong_type",
                f"labels[{where}] is {labels[where]}: a label is its token ({ids[where]}) or {IGNORE_INDEX}",
            )
        images = reader.images(value, row.source)
        sizes = tuple(self._size(image) for image in images)
        plans = tuple(self._plan(size) for size in sizes)
        blocks, visual_tokens = self._image_blocks(ids, plans)
        return self._check_capacity(
            Sample(
                id=reader.row_id(value, row.source), source=row.source, rule=LossRule.GIVEN, bucket=_bucket(plans),
                visual_tokens=visual_tokens, input_ids=ids, images=images, sizes=sizes, blocks=blocks, given=given,
            )
        )  # fmt: skip

    def _image_blocks(self, ids: np.ndarray, plans: Sequence[TilePlan]) -> tuple[np.ndarray, int]:
        """Where the images of ready-made ids stand (`Sample.blocks`), and their visual tokens together.

        Each tile must stand there with just the tokens it becomes: a wrong number, or the images in another order than
        their tokens, would give the model the features of one image for another.
        """
        places = np.flatnonzero(ids == self.family.image_token_id)
        tiles = [self._tile_tokens(plan) for plan in plans]
        total = sum(visual for spans in tiles for _, visual in spans)
        if len(places) != total:
            check_image_count(0 if not len(places) else len(plans), len(plans))
            sizes = [plan.size for plan in plans]
            raise RowError(
                "image_tokens", f"input_ids hold {len(places)} image tokens; images of {sizes!r:.200} make {total}"
            )
        blocks, read = [], 0
        for number, spans in enumerate(tiles):
            first = stop = -1
            for token_ids, visual in spans:
                start = int(places[read]) - int(np.flatnonzero(token_ids == self.family.image_token_id)[0])
                stop = start + len(token_ids)
                if not np.array_equal(ids[max(start, 0) : stop], token_ids):
                    raise RowError(
                        "image_tokens",
                        f"input_ids[{max(start, 0)}:{stop}] are not the {len(token_ids)} tokens of a tile of image "
                        f"{number}, of {plans[number].size}; write them in the order of images, as the processor does",
                    )
                first = start if first < 0 else first
                read += visual
            blocks.append((first, stop - first))
        return np.asarray(blocks, dtype=np.int32).reshape(-1, 2), total

    # ---------------------------------------------------------------- verification

    def _verify(self, item: _Pending, sample: Sample) -> None:
        """Compare with the processor's own tokens, run on blank tiles of the planned sizes."""
        tiles = [Image.new("RGB", size, (255, 255, 255)) for plan in item.plans for size in plan.tile_sizes]
        output = self.family.processor(
            text=[item.text],
            images=tiles or None,
            add_special_tokens=item.document.add_special_tokens,
            **self.family.processor_kwargs,
        )
        expected = np.asarray(output["input_ids"][0], dtype=np.int32)
        found = sample.input_ids[:-1] if self._adds_eos(self.datasets[item.row.dataset]) else sample.input_ids
        if not np.array_equal(found, expected):
            raise UserError(
                f"{sample.source}: row {sample.id!r} has {len(found)} tokens by mmray and {len(expected)} "
                f"by {type(self.family.processor).__name__}. The lengths of this model cannot be trusted; please "
                "report the processor's files and the image sizes"
            )


def _bucket(plans: Sequence[TilePlan]) -> str:
    """The shape bucket of a sample: its images' common shape, `mixed`, or `text`."""
    shapes = {plan.shape for plan in plans}
    return "text" if not shapes else shapes.pop() if len(shapes) == 1 else "mixed"


def _integers(value: dict[str, Any], column: str) -> np.ndarray:
    found = value.get(column)
    if found is None:
        raise missing_column(repr(column), value)
    if not isinstance(found, list) or not all(type(entry) is int for entry in found):
        raise RowError("wrong_type", f"{column} must be a list of integers, not {found!r:.60}")
    try:
        return np.asarray(found, dtype=np.int32)
    except OverflowError as error:
        raise RowError("wrong_type", f"{column} holds a number that is no token id: {one_line(error)}") from error


def _shown(value: dict[str, Any]) -> str:
    """A row as JSON, shortened."""
    try:
        return json.dumps(value, default=lambda other: f"<{type(other).__name__}>", ensure_ascii=False)[:500]
    except RecursionError:
        return "{}"
