"""Rows to samples: exact token ids from image headers, without decoding a pixel.

Text is tokenised once, in batches, with one placeholder token for each tile; then each placeholder gives way to the
tokens its tile becomes. A placeholder is a special token, so tokenisers split text at it before anything else, and the
result equals tokenising the expanded text; `verify` compares it with the real processor all the same.
"""

import functools
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Encoding

from mmray.errors import RowError, UserError
from mmray.families import Family
from mmray.images import TilePlan, TilingPolicy, plan_tiles
from mmray.images.header import measured
from mmray.images.measure_ahead import Measure, MeasureAhead
from mmray.images.source import one_line
from mmray.loss.labels import LossRule, with_stop_tokens
from mmray.loss.settings import (
    Loss,
    LossSource,
    label_maker,
    loss_source,
    turn_markers,
)
from mmray.packing.settings import PackingSettings
from mmray.rows.document import Document, DocumentReader, check_chats
from mmray.rows.duplicates import id_of
from mmray.rows.endings import Endings
from mmray.rows.image_refs import ImageRef, image_refs, remote_images
from mmray.rows.read import RawRow
from mmray.rows.sample import RejectedRow, Sample, shown
from mmray.rows.settings import DatasetSettings, DataSettings
from mmray.rows.tokenized import image_blocks, own_ids, own_mask
from mmray.rows.typed import TypedMarkers


@dataclass(frozen=True)
class _Pending:
    """A row between reading and tokenising."""

    row: RawRow
    document: Document
    plans: tuple[TilePlan, ...]
    sizes: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]
    text: str
    generated: tuple[tuple[int, int], ...] | None
    """What the model generates of the text that the tokenizer gets; None where the chat template is not asked."""


class Encoder:
    """Encodes the rows of a job. Holds the tokenizer; safe to build once per actor."""

    def __init__(
        self, data: DataSettings, datasets: Sequence[DatasetSettings], family: Family, policy: TilingPolicy,
        packing: PackingSettings, *, loss: Loss = "sampled", measure: Measure = measured,
    ) -> None:  # fmt: skip
        self.data, self.datasets, self.family, self.policy, self.packing = data, datasets, family, policy, packing
        self._measure = MeasureAhead(
            measure, max_pixels=data.max_image_pixels, one_frame=data.image_frames == "reject"
        )  # fmt: skip
        for dataset in datasets:
            check_chats(dataset, family)
        self.sources = [loss_source(loss, dataset.kind, family) for dataset in datasets]
        self._markers = None
        if LossRule.ROLES in {source.rule for source in self.sources}:
            self._markers = TypedMarkers(family, turn_markers(loss, family), label_maker(loss, family).boundaries)
        self._readers = [
            DocumentReader(dataset, family, self._markers if source.rule == LossRule.ROLES else None)
            for dataset, source in zip(datasets, self.sources)
        ]
        self._endings = Endings(datasets, self.sources, family)
        self.ending_token_ids = self._endings.token_ids
        self._plan = functools.lru_cache(maxsize=65_536)(lambda size: plan_tiles(size, policy))
        backend = family.tokenizer.backend_tokenizer
        backend.no_truncation()  # some tokenizer.json files cut at a length of their own
        backend.no_padding()
        self._backend = backend
        self._vocabulary_size = len(family.tokenizer)

    def encode(
        self, rows: Sequence[RawRow], verify: Sequence[int] = (), duplicates: Collection[int] = ()
    ) -> list[Sample | RejectedRow]:
        """One sample or rejected row for each row, in order.

        verify: positions in `rows` to compare with the real processor; duplicates: positions of rows to reject, since
        an earlier row has their id. Raises UserError when a verified row differs, and for the first bad row under
        `on_bad_row: error`.
        """
        self._measure.expect(uri for row in rows for uri in self._remote_images(row))
        prepared = [
            self._guard(row, self._refuse_duplicate if number in duplicates else self._prepare, row)
            for number, row in enumerate(rows)
        ]
        encoded = iter(self._tokenize([item for item in prepared if isinstance(item, _Pending)]))
        results: list[Sample | RejectedRow] = []
        for number, (row, item) in enumerate(zip(rows, prepared)):
            result: Any = item
            if isinstance(item, _Pending):
                result = self._guard(row, self._sample, item, *next(encoded))
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
        row_id = id_of(row, self.datasets[row.dataset])
        return RejectedRow(row_id, row.source, error.reason, error.message, shown(row.value))

    def _refuse_duplicate(self, row: RawRow) -> None:
        row_id = id_of(row, self.datasets[row.dataset])
        raise RowError(
            "duplicate_id", f"an earlier row has the id {row_id!r:.200} too; give it another, or keep such rows "
            "(data.duplicate_ids)"
        )  # fmt: skip

    # ---------------------------------------------------------------- images

    def _prepare(self, row: RawRow) -> "_Pending | Sample":
        if isinstance(row.value, RowError):
            raise row.value
        if self.datasets[row.dataset].kind == "tokenized":
            return self._ready_made(row, row.value)
        document = self._readers[row.dataset].read(row.value, row.source)
        sizes, notes = self._measured(document.images)
        plans = tuple(self._plan(size) for size in sizes)
        text, generated = self._expanded(document.text, plans), self._generated(row, document, plans)
        if document.typed and self._markers is not None:
            blanked = self._expanded(document.blanked, plans)
            found, expected = (self.family.tokenizer_text(each, _tile_sizes(plans)) for each in (text, blanked))
            self._markers.check(found, expected, document.typed)
        return _Pending(row, document, plans, sizes, notes, text, generated)

    def _remote_images(self, row: RawRow) -> list[str]:
        if isinstance(row.value, RowError):
            return []
        return remote_images(row.value, row.source, self.datasets[row.dataset])

    def _measured(self, images: Sequence[ImageRef]) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
        """The sizes of images, and the notes on them."""
        found = [self._measure(image.uri if image.data is None else image.data) for image in images]
        return tuple(each.size for each in found), tuple(each.note for each in found if each.note)

    def _expanded(self, text: str, plans: Sequence[TilePlan]) -> str:
        return expanded_units(text, plans, self.family.placeholder_unit)

    def _generated(
        self, row: RawRow, document: Document, plans: Sequence[TilePlan]
    ) -> tuple[tuple[int, int], ...] | None:
        """`document.generated` in the text that the tokenizer gets, where images have grown before it."""
        if self.sources[row.dataset] is not LossSource.TEMPLATE:
            return None

        def grown(place: int) -> int:
            before = document.text[:place]
            own = plans[: before.count(self.family.placeholder_unit)]
            return len(self.family.tokenizer_text(self._expanded(before, own), _tile_sizes(own)))

        return tuple((grown(start), grown(stop)) for start, stop in document.generated)

    def _tile_tokens(self, plans: Sequence[TilePlan]) -> list[list[tuple[np.ndarray, int]]]:
        """For each image of a row, for each of its tiles: the tokens, and how many of them carry features."""
        together = sum(len(plan.tile_sizes) for plan in plans)
        tokens = []
        for plan in plans:
            try:
                spans = [self.family.span(size, together) for size in plan.tile_sizes]
            except ValueError as error:
                raise RowError(
                    "image_shape",
                    f"the processor takes no image of {plan.size}: {one_line(error)}; crop it or cut it in tiles",
                ) from error
            tokens.append([(span.token_ids, span.visual_tokens) for span in spans])
        return tokens

    # ---------------------------------------------------------------- tokens

    def _tokenize(self, pending: Sequence[_Pending]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids with one placeholder token per tile, int32 [n], and which of them the model generates, bool [n] (or
        [0]), of each text; one tokenizer call for each kind of text. Only the slower call tells the tokens' places."""
        found = [(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool))] * len(pending)
        for special, placed in itertools.product((True, False), repeat=2):
            chosen = [
                index for index, item in enumerate(pending)
                if item.document.add_special_tokens is special and (item.generated is not None) is placed
            ]  # fmt: skip
            encode = self._backend.encode_batch if placed else self._backend.encode_batch_fast
            texts = [self._tokenizer_input(pending[index]) for index in chosen]
            for index, encoding in zip(chosen, encode(texts, add_special_tokens=special)):
                found[index] = np.asarray(encoding.ids, dtype=np.int32), self._marked(pending[index], encoding)
        return found

    def _tokenizer_input(self, item: _Pending) -> str | tuple[str, str]:
        if self.sources[item.row.dataset] is LossSource.ANSWER:
            return self.family.prompt_and_answer(item.text)
        return self.family.tokenizer_text(item.text, _tile_sizes(item.plans))

    def _marked(self, item: _Pending, encoding: Encoding) -> np.ndarray:
        """Which tokens of a text train, where its own parts say so: bool [n], else bool [0]."""
        if self.sources[item.row.dataset] is LossSource.ANSWER:
            return np.asarray(encoding.type_ids) == 1
        if item.generated is None:
            return np.zeros(0, dtype=bool)
        return _overlapping(encoding.offsets, item.generated)

    def _sample(self, item: _Pending, ids: np.ndarray, generated: np.ndarray) -> Sample:
        places = np.flatnonzero(ids == self.family.placeholder_id)
        tiles = self._tile_tokens(item.plans)
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
        if len(generated):
            grown = np.ones(len(ids), dtype=np.int64)
            grown[places] = [len(token_ids) for spans in tiles for token_ids, _ in spans]
            generated = self._with_stops(generated, ids).repeat(grown)
        appended = self._endings.of(item.document, item.row.dataset)
        pieces.append(np.asarray(appended, dtype=np.int32))
        if len(generated):
            generated = np.append(generated, np.ones(len(appended), dtype=bool))
        sample = Sample(
            id=item.document.id,
            source=item.row.source,
            rule=self.sources[item.row.dataset].rule,
            bucket=_bucket(item.plans),
            visual_tokens=sum(visual for spans in tiles for _, visual in spans),
            input_ids=np.concatenate(pieces),
            images=item.document.images,
            sizes=item.sizes,
            blocks=np.asarray(blocks, dtype=np.int32).reshape(-1, 2),
            given=generated,
            visual_pairs=_visual_pairs(tiles),
            notes=(*item.row.notes, *item.notes),
        )
        return self._checked(sample)

    def _with_stops(self, generated: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Templates mark what the model says, and not the token of the next turn by which it stops."""
        kept = with_stop_tokens(torch.from_numpy(generated), torch.from_numpy(ids), self.ending_token_ids)
        return kept.numpy()

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

    def _checked(self, sample: Sample) -> Sample:
        if not sample.images and not self.family.takes_text_only:
            raise RowError(
                "needs_image", "the row has no image, and the model cannot learn from text alone; leave such rows out"
            )
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
        source = self.sources[row.dataset]
        ids = own_ids(value, dataset, self._vocabulary_size)
        given = own_mask(value, dataset, ids) if source is LossSource.ROW else np.zeros(0, dtype=bool)
        images = image_refs(value, row.source, dataset)
        sizes, notes = self._measured(images)
        plans = tuple(self._plan(size) for size in sizes)
        tiles = self._tile_tokens(plans)
        blocks, visual_tokens = image_blocks(ids, plans, tiles, self.family.image_token_id)
        return self._checked(
            Sample(
                id=reader.row_id(value, row.source), source=row.source, rule=source.rule, bucket=_bucket(plans),
                visual_tokens=visual_tokens, input_ids=ids, images=images, sizes=sizes, blocks=blocks, given=given,
                visual_pairs=_visual_pairs(tiles), notes=(*row.notes, *notes),
            )
        )  # fmt: skip

    # ---------------------------------------------------------------- verification

    def _verify(self, item: _Pending, sample: Sample) -> None:
        """Compare with the processor's own tokens, run on blank tiles of the planned sizes."""
        tiles = [Image.new("RGB", size, (255, 255, 255)) for plan in item.plans for size in plan.tile_sizes]
        special = item.document.add_special_tokens
        output = self.family.process(item.text, tiles, add_special_tokens=special)
        expected = np.asarray(output["input_ids"][0], dtype=np.int32)
        found = sample.input_ids[: len(sample.input_ids) - len(self._endings.of(item.document, item.row.dataset))]
        if not np.array_equal(found, expected):
            raise UserError(
                f"{sample.source}: row {sample.id!r} has {len(found)} tokens by mmray and {len(expected)} "
                f"by {type(self.family.processor).__name__}. The lengths of this model cannot be trusted; please "
                "report the processor's files and the image sizes"
            )


def expanded_units(text: str, plans: Sequence[TilePlan], unit: str) -> str:
    """A text with each image's unit repeated for its tiles, each after its label and a newline. unit: what the chat
    template writes for an image (`Family.placeholder_unit`); plans: of the text's images, in order."""
    head, *tails = text.split(unit)
    pieces = [head]
    for plan, tail in zip(plans, tails, strict=True):
        pieces += [f"{label}\n{unit}" if label else unit for label in plan.labels]
        pieces.append(tail)
    return "".join(pieces)


def _bucket(plans: Sequence[TilePlan]) -> str:
    """The shape bucket of a sample: its images' common shape, `mixed`, or `text`."""
    shapes = {plan.shape for plan in plans}
    return "text" if not shapes else shapes.pop() if len(shapes) == 1 else "mixed"


def _tile_sizes(plans: Sequence[TilePlan]) -> list[tuple[int, int]]:
    return [size for plan in plans for size in plan.tile_sizes]


def _visual_pairs(tiles: Sequence[list[tuple[np.ndarray, int]]]) -> int:
    return sum(visual * visual for spans in tiles for _, visual in spans)


def _overlapping(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens lie in some span, if only in part: bool [n]. offsets: [start, stop) of each in characters."""
    starts, stops = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    inside = np.zeros(len(starts), dtype=bool)
    for start, stop in spans:
        inside |= (starts < stop) & (stops > start)
    return inside
