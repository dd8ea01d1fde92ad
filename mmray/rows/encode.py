"""Rows to samples: exact token ids from image headers, without decoding a pixel.

Text is tokenised once, in batches, with one placeholder token for each tile; then each placeholder is replaced by the
tokens that its tile becomes (`spliced_tiles` has an example). A placeholder is a special token, so tokenisers split
text at it before anything else, and the result equals tokenising the expanded text; `verify` compares it with the real
processor all the same.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Encoding

from mmray.base.words import one_line
from mmray.errors import RowError, UserError
from mmray.families import Family
from mmray.images import TilePlan, TilingPolicy, plan_tiles
from mmray.images.header import frames_of, measured
from mmray.images.measure_ahead import Measure, MeasureAhead
from mmray.images.paged import PageOfFile, each_page
from mmray.images.tiling import label_tokens
from mmray.loss.roles import role_keep_mask
from mmray.loss.rules import LossRule
from mmray.loss.settings import Loss
from mmray.loss.sources import LossSource, label_maker, loss_source, marks_generated, turn_markers
from mmray.packing.settings import PackingSettings
from mmray.rows.chat_labels import ChatLabels, ChatSpans
from mmray.rows.columns import watched_columns
from mmray.rows.document import Document, DocumentReader, check_chats
from mmray.rows.duplicates import id_of
from mmray.rows.endings import Endings
from mmray.rows.image_refs import ImageRef, image_refs, remote_images
from mmray.rows.read import RawRow
from mmray.rows.sample import RejectedRow, Sample, shown
from mmray.rows.settings import DatasetSettings, DataSettings
from mmray.rows.templates import ChatTemplate
from mmray.rows.token_places import TokenPlaces
from mmray.rows.tokenized import attended_tokens, image_blocks, row_token_ids, row_trained_mask
from mmray.rows.typed import TypedMarkers


@dataclass(frozen=True)
class _Pending:
    """A row that is read but not tokenised yet."""

    row: RawRow
    document: Document
    plans: tuple[TilePlan, ...]
    sizes: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]
    text: str
    tokenizer_text: str
    spans: ChatSpans | None
    """Spans of the messages in `tokenizer_text`, for a chat whose messages say what is trained on."""


class Encoder:
    """Encodes the rows of a job. It holds the tokenizer and is built once per actor."""

    def __init__(
        self, data: DataSettings, datasets: Sequence[DatasetSettings], family: Family, policy: TilingPolicy,
        packing: PackingSettings, *, loss: Loss = "sampled", measure: Measure = measured,
    ) -> None:  # fmt: skip
        self.data, self.datasets, self.family, self.policy, self.packing = data, datasets, family, policy, packing
        self._measure = MeasureAhead(
            measure, max_pixels=data.max_image_pixels, one_frame=data.image_frames != "first"
        )  # fmt: skip
        self._compares = True
        self.tells_messages = False
        """True if samples carry the message of each token (`Sample.messages`), for showing rows to a person."""
        _check_tile_labels(policy, family)
        for dataset in datasets:
            check_chats(dataset, family)
        self.losses: list[Loss] = [loss if dataset.loss is None else dataset.loss for dataset in datasets]
        self.sources = [loss_source(set_loss, dataset.kind, family) for set_loss, dataset in zip(self.losses, datasets)]
        self._chats = [
            ChatLabels(set_loss, family, is_job_wide=dataset.loss is None) if source in _BY_MESSAGES else None
            for set_loss, dataset, source in zip(self.losses, datasets, self.sources)
        ]
        self._markers = [
            _typed_markers(set_loss, source, family) if dataset.kind == "chat" else None
            for set_loss, dataset, source in zip(self.losses, datasets, self.sources)
        ]
        template = ChatTemplate(family)
        self._readers = [
            DocumentReader(
                dataset, family, markers, template, with_pages=functools.partial(self._with_pages, dataset=dataset)
            )
            for dataset, markers in zip(datasets, self._markers)
        ]
        self._endings = Endings(datasets, family)
        self.ending_token_ids = self._endings.token_ids
        self._plan = functools.lru_cache(maxsize=65_536)(lambda size: plan_tiles(size, policy))
        backend = family.tokenizer.backend_tokenizer
        backend.no_truncation()  # some tokenizer.json files cut at a length of their own
        backend.no_padding()
        self._backend = backend
        self._vocabulary_size = len(family.tokenizer)

    def encode(
        self, rows: Sequence[RawRow], verify: Sequence[int] = (), duplicates: Collection[int] = (), *,
        compare: bool = True,
    ) -> list[Sample | RejectedRow]:  # fmt: skip
        """Encodes rows; returns one sample or rejected row for each row, in order.

        verify: positions in `rows` to compare with the real processor.
        duplicates: positions of rows to reject because an earlier row has their id.
        compare: whether to reject rows in which the turns found by `loss.boundaries` differ from the messages.

        Raises UserError when a verified row differs, and for the first bad row under `on_bad_row: error`.
        """
        self._compares = compare
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
        return RejectedRow(
            row_id, row.source, error.reason, error.message, shown(row.value), row.dataset, self._columns(row)
        )

    def _columns(self, row: RawRow) -> tuple[str, ...]:
        return watched_columns(row.value, self.datasets[row.dataset])

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
            return self._tokenized_sample(row, row.value)
        document = self._readers[row.dataset].read(row.value, row.source)
        sizes, notes = self._measured(document.images)
        plans = tuple(self._plan(size) for size in sizes)
        text = self._expanded(document.text, plans)
        tokenizer_text = self.family.tokenizer_text(text, _tile_sizes(plans))
        markers = self._markers[row.dataset]
        if document.typed and markers is not None:
            blanked = self._expanded(document.blanked, plans)
            markers.check(tokenizer_text, self.family.tokenizer_text(blanked, _tile_sizes(plans)), document.typed)
        spans, labels = None, self._chats[row.dataset]
        if document.rendered is not None and labels is not None:
            spans = labels.spans(document.rendered).moved(self._mover(document.text, tokenizer_text, plans))
        return _Pending(row, document, plans, sizes, notes, text, tokenizer_text, spans)

    def _remote_images(self, row: RawRow) -> list[str]:
        if isinstance(row.value, RowError):
            return []
        dataset = self.datasets[row.dataset]
        uris = remote_images(row.value, row.source, dataset)
        if not uris:
            return []
        with contextlib.suppress(RowError):
            return [page for uri in uris for page in self._pages(uri, dataset)]
        return []

    def _pages(self, uri: str, dataset: DatasetSettings) -> list[str]:
        """Lists the pages that an image names, those of PDFs with their resolution; any other image stands for
        itself."""
        pages = []
        for text in each_page(uri):
            page = PageOfFile.written(text)
            if page and page.is_pdf:
                text = str(replace(page, dpi=page.dpi or dataset.pdf_dpi or self.policy.pdf_dpi))
            pages.append(text)
        return pages

    def _with_pages(self, images: Sequence[ImageRef], dataset: DatasetSettings) -> tuple[ImageRef, ...]:
        """Expands images to one image for each page that they name, and for each frame of a file with several where
        `data.image_frames` is `all`."""
        refs: list[ImageRef] = []
        for image in images:
            if image.data is not None:
                refs.append(image)
                continue
            for text in self._pages(image.uri, dataset):
                numbers = [1]
                if self.data.image_frames == "all" and PageOfFile.written(f"{text}#page=1"):
                    numbers = frames_of(text)
                refs += [ImageRef(f"{text}#page={n}") for n in numbers] if len(numbers) > 1 else [ImageRef(text)]
        return tuple(refs)

    def _measured(self, images: Sequence[ImageRef]) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
        """Measures images; returns their sizes and the notes on them."""
        measurements = [self._measure(image.uri if image.data is None else image.data) for image in images]
        return tuple(measurement.size for measurement in measurements), tuple(
            measurement.note for measurement in measurements if measurement.note
        )

    def _expanded(self, text: str, plans: Sequence[TilePlan]) -> str:
        return expanded_units(text, plans, self.family.placeholder_unit) if plans else text

    def _mover(self, text: str, tokenizer_text: str, plans: Sequence[TilePlan]) -> Callable[[int], int]:
        """Returns a function that maps a place in a document's text to the same place in the text that the tokenizer
        gets, in which images take more letters."""
        if text == tokenizer_text:
            return lambda place: place
        unit = self.family.placeholder_unit
        behind = text.rindex(unit) + len(unit) if unit in text else 0
        shift = len(tokenizer_text) - len(text)
        is_shifted = tokenizer_text.endswith(text[behind:])

        @functools.cache
        def moved(place: int) -> int:
            if is_shifted and place > behind:
                return place + shift
            before = text[:place]
            plans_before = plans[: before.count(unit)]
            return len(self.family.tokenizer_text(self._expanded(before, plans_before), _tile_sizes(plans_before)))

        return moved

    def _tile_tokens(self, plans: Sequence[TilePlan]) -> list[list[tuple[np.ndarray, int]]]:
        """Returns, for each image of a row and each of its tiles, the tokens and how many of them carry features."""
        num_tiles = sum(len(plan.tile_sizes) for plan in plans)
        tokens = []
        for plan in plans:
            try:
                spans = [self.family.span(size, num_tiles) for size in plan.tile_sizes]
            except ValueError as error:
                raise RowError(
                    "image_shape",
                    f"the processor takes no image of {plan.size}: {one_line(error)}; crop it or cut it in tiles",
                ) from error
            tokens.append([(span.token_ids, span.visual_tokens) for span in spans])
        return tokens

    # ---------------------------------------------------------------- tokens

    def _tokenize(self, pending: Sequence[_Pending]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokenises texts, with one tokenizer call for each kind of text.

        Returns for each text its token ids with one placeholder token per tile, int32 [n], and a mask of the tokens
        that answer a prompt, bool [n], or bool [0] for texts without a prompt.
        """
        tokenized = [(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool))] * len(pending)
        for special in (True, False):
            chosen = [index for index, item in enumerate(pending) if item.document.add_special_tokens is special]
            texts = [self._tokenizer_input(pending[index]) for index in chosen]
            for index, encoding in zip(chosen, self._backend.encode_batch_fast(texts, add_special_tokens=special)):
                tokenized[index] = np.asarray(encoding.ids, dtype=np.int32), self._answered(pending[index], encoding)
        return tokenized

    def _tokenizer_input(self, item: _Pending) -> str | tuple[str, str]:
        if self.sources[item.row.dataset] is LossSource.ANSWER:
            return self.family.prompt_and_answer(item.text)
        return item.tokenizer_text

    def _answered(self, item: _Pending, encoding: Encoding) -> np.ndarray:
        if self.sources[item.row.dataset] is not LossSource.ANSWER:
            return np.zeros(0, dtype=bool)
        return np.asarray(encoding.type_ids) == 1

    @functools.cached_property
    def _places(self) -> TokenPlaces:
        return TokenPlaces(self._backend)

    def _chat_tokens(self, item: _Pending, ids: np.ndarray) -> tuple[LossRule, np.ndarray, np.ndarray]:
        """Returns a chat's LossRule, its mask of trained tokens and each token's message, int32 [n] (-1: none)."""
        labels, spans = self._chats[item.row.dataset], item.spans
        assert labels is not None
        assert spans is not None
        placed = self._places.of(item.tokenizer_text, ids, add_special_tokens=item.document.add_special_tokens)
        rule, trained = labels.tokens(spans, ids, placed, compare=self._compares)
        if not self.tells_messages:
            return rule, trained, _NO_MESSAGES
        messages = np.full(len(ids), -1, dtype=np.int32)
        for message, _, span in spans.turns:
            messages[placed.within([span])] = message
        return rule, trained, messages

    def _sample(self, item: _Pending, ids: np.ndarray, given_mask: np.ndarray) -> Sample:
        (places,) = (ids == self.family.placeholder_id).nonzero()
        tiles = self._tile_tokens(item.plans)
        if len(places) != sum(map(len, tiles)):
            raise RowError(
                "placeholder_count", f"the text holds {len(places)} image tokens for {sum(map(len, tiles))} tiles"
            )
        rule, messages = self.sources[item.row.dataset].rule, _NO_MESSAGES
        if item.spans is not None:
            rule, given_mask, messages = self._chat_tokens(item, ids)
        spliced, counts = spliced_tiles(ids, places, [token_ids for spans in tiles for token_ids, _ in spans])
        appended = np.asarray(self._appended(item), dtype=np.int32)
        if len(given_mask):
            given_mask = np.append(given_mask.repeat(counts), np.ones(len(appended), dtype=bool))
        if len(messages):
            last = item.spans.turns[-1][0] if item.spans and item.spans.turns else -1
            messages = np.append(messages.repeat(counts), np.full(len(appended), last, dtype=np.int32))
        sample = Sample(
            id=item.document.id,
            source=item.row.source,
            rule=rule,
            bucket=_bucket(item.plans),
            visual_tokens=sum(visual for spans in tiles for _, visual in spans),
            input_ids=np.concatenate((spliced, appended)),
            images=item.document.images,
            sizes=item.sizes,
            blocks=self._image_blocks(item.plans, ids, places, counts),
            given_mask=given_mask,
            visual_pairs=_visual_pairs(tiles),
            notes=(*item.row.notes, *item.notes, *item.document.notes),
            dataset=item.row.dataset,
            messages=messages,
            roles=_roles(item.document),
            columns=self._columns(item.row),
        )
        return self._checked(sample)

    def _image_blocks(
        self, plans: Sequence[TilePlan], ids: np.ndarray, places: np.ndarray, counts: np.ndarray
    ) -> np.ndarray:
        """Returns the first token and the number of tokens of each image, int32 [images, 2].

        An image goes from its first label to the end of its last tile. ids: the tokens before splicing; places: the
        index of each tile's placeholder in ids; counts: as returned by `spliced_tiles`.
        """
        if not plans:
            return _NO_BLOCKS
        stops = counts.cumsum()
        blocks, tile = [], 0
        for plan in plans:
            first, last = places[tile], places[tile + len(plan.tile_sizes) - 1]
            start = int(stops[first] - counts[first]) - self._label_tokens(plan, ids[:first])
            blocks.append((start, int(stops[last]) - start))
            tile += len(plan.tile_sizes)
        return np.asarray(blocks, dtype=np.int32)

    def _appended(self, item: _Pending) -> list[int]:
        """Returns the token ids to append to those of a row's text."""
        is_open = item.spans is not None and item.spans.is_open
        return self._endings.of(item.document, item.row.dataset, is_open)

    def _label_tokens(self, plan: TilePlan, before: np.ndarray) -> int:
        """Counts the tokens of an image's first label, which are the last ones before its placeholder. A token that
        also holds the letter before the label counts."""
        label = plan.labels[0]
        if not label:
            return 0
        prefix = self.family.placeholder_unit.split(self.family.placeholder)[0]
        tokens = self._backend.encode(f"{plan.label_texts[0]}{prefix}", add_special_tokens=False).ids
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

    def _tokenized_sample(self, row: RawRow, value: dict[str, Any]) -> Sample:
        """Builds the sample of a `tokenized` row, whose ids hold every image token already and must hold the right
        number of them."""
        dataset, reader = self.datasets[row.dataset], self._readers[row.dataset]
        ids = row_token_ids(value, dataset, self._vocabulary_size)
        rule, given_mask = self._tokenized_labels(row, value, ids)
        images = self._with_pages(image_refs(value, row.source, dataset), dataset)
        sizes, notes = self._measured(images)
        plans = tuple(self._plan(size) for size in sizes)
        tiles = self._tile_tokens(plans)
        blocks, visual_tokens = image_blocks(ids, plans, tiles, self.family.image_token_id)
        return self._checked(
            Sample(
                id=reader.row_id(value, row.source), source=row.source, rule=rule, bucket=_bucket(plans),
                visual_tokens=visual_tokens, input_ids=ids, images=images, sizes=sizes, blocks=blocks,
                given_mask=given_mask, visual_pairs=_visual_pairs(tiles), notes=(*row.notes, *notes),
                dataset=row.dataset, columns=self._columns(row),
            )
        )  # fmt: skip

    def _tokenized_labels(self, row: RawRow, value: dict[str, Any], ids: np.ndarray) -> tuple[LossRule, np.ndarray]:
        """Returns the LossRule of a `tokenized` row, and the tokens to train on where the rule is GIVEN, bool [n]."""
        dataset, source = self.datasets[row.dataset], self.sources[row.dataset]
        attended = attended_tokens(value, dataset, len(ids))
        if source is LossSource.ROW:
            return LossRule.GIVEN, row_trained_mask(value, dataset, ids) & attended
        is_job_wide = dataset.loss is None or source is LossSource.EVERY_TOKEN
        if attended.all() and is_job_wide:
            return source.rule, np.zeros(0, dtype=bool)
        if source is LossSource.EVERY_TOKEN:
            return LossRule.GIVEN, attended
        maker = label_maker(self.losses[row.dataset], self.family)
        scanned = role_keep_mask(
            torch.from_numpy(ids), maker.boundaries,
            roles_to_train=maker.roles_to_train, train_on_eos=maker.train_on_eos,
        )  # fmt: skip
        return LossRule.GIVEN, scanned.numpy() & attended

    # ---------------------------------------------------------------- verification

    def _verify(self, item: _Pending, sample: Sample) -> None:
        """Compares a sample with the tokens of the real processor, run on blank tiles of the planned sizes."""
        tiles = [Image.new("RGB", size, (255, 255, 255)) for plan in item.plans for size in plan.tile_sizes]
        special = item.document.add_special_tokens
        output = self.family.process(item.text, tiles, add_special_tokens=special)
        expected = np.asarray(output["input_ids"][0], dtype=np.int32)
        encoded_ids = sample.input_ids[: len(sample.input_ids) - len(self._appended(item))]
        if not np.array_equal(encoded_ids, expected):
            raise UserError(
                f"{sample.source}: row {sample.id!r} has {len(encoded_ids)} tokens by mmray and {len(expected)} "
                f"by {type(self.family.processor).__name__}. The lengths of this model cannot be trusted; please "
                "report the processor's files and the image sizes"
            )


def spliced_tiles(
    ids: np.ndarray, places: np.ndarray, tile_tokens: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Replaces each tile's placeholder token by the tokens that the tile becomes.

    ids: tokens with one placeholder a tile, int32 [n].
    places: the index of each placeholder in ids, int64 [tiles].
    tile_tokens: the tokens of each tile, int32.

    Returns the spliced tokens, int32 [m], and how many of them each token of ids becomes, int64 [n].

    Five tokens, of which two are the placeholder 9; the first tile becomes 7, 7, 8 and the second 7, 8:

    >>> ids, places = np.array([1, 9, 2, 9, 3]), np.array([1, 3])
    >>> spliced, counts = spliced_tiles(ids, places, [np.array([7, 7, 8]), np.array([7, 8])])
    >>> counts.tolist()
    [1, 3, 1, 2, 1]
    >>> spliced.tolist()
    [1, 7, 7, 8, 2, 7, 8, 3]
    """
    counts = np.ones(len(ids), dtype=np.int64)
    if not len(places):
        return ids, counts
    counts[places] = [len(token_ids) for token_ids in tile_tokens]
    is_placeholder = np.zeros(len(ids), dtype=bool)
    is_placeholder[places] = True
    spliced = ids.repeat(counts)
    spliced[is_placeholder.repeat(counts)] = np.concatenate([ids[:0], *tile_tokens])
    return spliced, counts


def _check_tile_labels(policy: TilingPolicy, family: Family) -> None:
    """Raises UserError for labels as tokens where a model has none for the cells of the policy's grids."""
    for token in label_tokens(policy):
        try:
            family.token_id(token)
        except ValueError as error:
            remedy = "labels: true writes them as text, or use smaller grids"
            raise UserError(f"images.labels: tokens: {error}; {remedy}") from error


def expanded_units(text: str, plans: Sequence[TilePlan], unit: str) -> str:
    """Repeats each image's unit in a text for every tile of the image, each after its label.

    plans: those of the text's images, in order.
    unit: what the chat template writes for an image (`Family.placeholder_unit`).
    """
    head, *tails = text.split(unit)
    pieces = [head]
    for plan, tail in zip(plans, tails, strict=True):
        pieces += [f"{label}{unit}" for label in plan.label_texts]
        pieces.append(tail)
    return "".join(pieces)


def _bucket(plans: Sequence[TilePlan]) -> str:
    """Returns the shape bucket of a sample: its images' common shape, `mixed`, or `text`."""
    shapes = {plan.shape for plan in plans}
    return "text" if not shapes else shapes.pop() if len(shapes) == 1 else "mixed"


def _tile_sizes(plans: Sequence[TilePlan]) -> list[tuple[int, int]]:
    return [size for plan in plans for size in plan.tile_sizes]


def _visual_pairs(tiles: Sequence[list[tuple[np.ndarray, int]]]) -> int:
    return sum(visual * visual for spans in tiles for _, visual in spans)


def _roles(document: Document) -> tuple[str, ...]:
    """Returns the roles of a chat's messages; none for other rows."""
    return () if document.rendered is None else tuple(message.role for message in document.rendered.chat.messages)


def _typed_markers(loss: Loss, source: LossSource, family: Family) -> TypedMarkers | None:
    """Returns the plain texts around turns that a chat must not hold; None where nothing looks for them."""
    if source is LossSource.MESSAGES and marks_generated(family.processor):
        return None
    if source not in _BY_MESSAGES:
        return None
    boundaries = label_maker(loss, family).boundaries
    return TypedMarkers(family, turn_markers(loss, family), boundaries) if boundaries else None


_BY_MESSAGES = (LossSource.MESSAGES, LossSource.ROLES)
_NO_MESSAGES = np.zeros(0, dtype=np.int32)
_NO_BLOCKS = np.zeros((0, 2), dtype=np.int32)
