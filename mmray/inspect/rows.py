"""Shows rows of a job file before anything is prepared: each row turn by turn, or the reason of its rejection.

The encoder and the label maker are those of preparing, so text that is shown as trained would be trained on. Nothing is
written, no cluster is used, and only the rows that are shown are read.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
from rich.console import Console

from mmray.config.compatibility import job_family
from mmray.config.job import Job
from mmray.display.html import write_html
from mmray.errors import UserError
from mmray.families import Family
from mmray.images import TilingPolicy
from mmray.images.source import describe_source
from mmray.inspect.page import page_of
from mmray.inspect.terminal import is_plain, legend, print_sample
from mmray.inspect.view import BinView, Mark, Piece, SampleView, Turn, view_pieces
from mmray.loss.labels import LabelMaker
from mmray.loss.rules import IGNORE_INDEX
from mmray.loss.settings import allows_empty
from mmray.loss.sources import label_maker
from mmray.prepared.sample_columns import NOTHING_TRAINED
from mmray.rows.encode import Encoder
from mmray.rows.files import Piece as RowsPiece
from mmray.rows.files import first_piece, source_files
from mmray.rows.plan import Plan, indexed_files
from mmray.rows.preflight import sample_labels
from mmray.rows.read import RawRow, read_piece
from mmray.rows.sample import RejectedRow, Sample

_SEARCHED_ROWS = 512


@dataclass(frozen=True)
class ShownRow:
    """One row of a job: a sample with the pieces of its text, or a rejected row.

    name: the name of its set, such as `train.0`; messages: the number of the message of each piece, None outside
    messages; trained: number of trained tokens.
    """

    name: str
    result: Sample | RejectedRow
    pieces: tuple[Piece, ...] = ()
    messages: tuple[int | None, ...] = ()
    trained: int = 0

    def as_json(self) -> dict[str, Any]:
        """The row as `mmray inspect --json` writes it."""
        result = self.result
        if isinstance(result, RejectedRow):
            rejected = {"reason": result.reason, "message": result.message}
            return {"id": result.id, "set": self.name, "pieces": [], "images": [], "rejected": rejected}
        stretches = groupby(zip(self.pieces, self.messages), lambda pair: (pair[0].mark is Mark.TRAINED, pair[1]))
        pieces = []
        for (is_trained, message), pairs in stretches:
            text = "".join(piece.label for piece, _ in pairs)
            role = None if message is None else result.roles[message]
            pieces.append({"text": text, "trained": is_trained, "role": role, "message": message})
        images = [
            {"source": describe_source(image.uri if image.data is None else image.data), "width": width,
             "height": height, "tokens": int(tokens)}
            for image, (width, height), (_, tokens) in zip(result.images, result.sizes, result.blocks)
        ]  # fmt: skip
        return {"id": result.id, "set": self.name, "pieces": pieces, "images": images, "rejected": None}

    def as_view(self, start: int) -> SampleView:
        """The row in the form in which samples of a bin are shown. start: number of tokens of the rows before it."""
        result = self.result
        if isinstance(result, RejectedRow):
            text = f"rejected, {result.reason}: {result.message}"
            turns = (Turn(None, (Piece(0, (), text, Mark.CONTEXT),)),)
            return SampleView(result.id, result.source, "rejected", start, 0, 0, 0, (), turns)
        images: tuple[dict[str, Any], ...] = tuple(
            {"uri": image.uri or None, "data": image.data, "width": width, "height": height, "num_tokens": int(tokens)}
            for image, (width, height), (_, tokens) in zip(result.images, result.sizes, result.blocks)
        )
        return SampleView(
            result.id, result.source, result.rule.name.lower(), start, len(result.input_ids),
            sum(int(image["num_tokens"]) for image in images), self.trained, images, tuple(self._turns(result.roles)),
        )  # fmt: skip

    def _turns(self, roles: Sequence[str]) -> Iterator[Turn]:
        for message, pairs in groupby(zip(self.pieces, self.messages), lambda pair: pair[1]):
            yield Turn(None if message is None else roles[message], tuple(piece for piece, _ in pairs))


class JobRows:
    """Reads and encodes rows of a job file, to show them."""

    def __init__(self, job: Job) -> None:
        """Raises UserError for a model, a processor or settings that do not fit together."""
        self.job = job
        self.family: Family = job_family(job)
        self.policy: TilingPolicy = self.family.resolved_tiling(job.images)
        self._labels: LabelMaker = label_maker(job.loss, self.family)

    def first(self, count: int, name: str | None = None) -> Iterator[ShownRow]:
        """Yield the first `count` rows of a set, or of each training set.

        name: the name of the set, such as `train.1`.
        """
        for split, number in self._sets(name):
            dataset = getattr(self.job.data, split)[number]
            most = min(count, dataset.max_rows) if dataset.max_rows and dataset.take == "first" else count
            pieces = (first_piece(file, count) for file in self._files(split, number))
            rows = list(islice((row for piece in pieces for row in read_piece(piece)), most))
            yield from self._shown(split, number, rows)

    def notes(self, name: str | None = None) -> list[str]:
        """Describe the sets whose rows are not all taken once. name: as for `first`."""
        settings = [(split, number, getattr(self.job.data, split)[number]) for split, number in self._sets(name)]
        return [
            f"{split}.{number}: not every row is taken once ("
            + ", ".join(f"{setting}: {value}" for setting, value in dataset.how_many_record().items())
            + "); a row is shown here whether it is taken or not"
            for split, number, dataset in settings
            if dataset.how_many_record()
        ]

    def with_id(self, row_id: str, name: str | None = None) -> Iterator[ShownRow]:
        """Yield the rows with an id, from one set or from all. Raises UserError when there is none."""
        is_found = False
        sets = self._sets(name) if name else [*self._sets(None), *self._all("eval")]
        for split, number in sets:
            encoder = self._encoder(split)
            column = encoder.datasets[number].column("id")
            indexed = indexed_files(self._files(split, number))
            plan = Plan(indexed, window_rows=_SEARCHED_ROWS, chunk_rows=_SEARCHED_ROWS)
            pieces: Iterable[RowsPiece] = (piece for chunk in plan.chunks() for piece in chunk.pieces)
            for piece in pieces:
                rows = [row for row in read_piece(piece) if _id_of(row, column) == row_id]
                is_found |= bool(rows)
                yield from self._shown(split, number, rows)
        if not is_found:
            raise UserError(f"no row has the id {row_id!r}; rows without an id go by their place, file:line")

    def _sets(self, name: str | None) -> list[tuple[str, int]]:
        if name is None:
            return self._all("train")
        split, _, number = name.removeprefix("data.").partition(".")
        known = [*self._all("train"), *self._all("eval")]
        if not number.isdigit() or (split, int(number)) not in known:
            names = ", ".join(f"{split}.{number}" for split, number in known)
            raise UserError(f"--set {name}: the job's sets of rows are {names}")
        return [(split, int(number))]

    def _all(self, split: str) -> list[tuple[str, int]]:
        return [(split, number) for number in range(len(getattr(self.job.data, split)))]

    def _files(self, split: str, number: int) -> list[Any]:
        files = source_files(getattr(self.job.data, split))
        return [file for file in files if file.dataset == number]

    def _encoder(self, split: str) -> Encoder:
        job = self.job
        data = job.data.model_copy(update={"on_bad_row": "reject"})
        encoder = Encoder(data, getattr(data, split), self.family, self.policy, job.packing, loss=job.loss)
        encoder.tells_messages = True
        return encoder

    def _shown(self, split: str, number: int, rows: Sequence[RawRow]) -> Iterator[ShownRow]:
        name = f"{split}.{number}"
        for result in self._encoder(split).encode(rows) if rows else ():
            if isinstance(result, RejectedRow):
                yield ShownRow(name, result)
            else:
                yield self._pieces(name, result)

    def _pieces(self, name: str, sample: Sample) -> ShownRow:
        (labels,) = sample_labels([sample], self._labels)
        trained = labels != IGNORE_INDEX
        if not trained.any() and not allows_empty(self.job.loss):
            return ShownRow(
                name, RejectedRow(sample.id, sample.source, NOTHING_TRAINED.reason, NOTHING_TRAINED.message, "")
            )
        media = np.isin(sample.input_ids, self.family.media_token_ids)
        for start, count in sample.blocks.tolist():
            media[start : start + count] = True
        kinds = np.asarray([Mark.CONTEXT, Mark.MEDIA, Mark.TRAINED], dtype=object)[np.where(trained, 2, media)]
        messages = sample.messages if len(sample.messages) else np.full(len(sample.input_ids), -1)
        pieces = view_pieces(sample.input_ids.tolist(), kinds.tolist(), messages.tolist(), self.family)
        owners = tuple(None if messages[piece.start] < 0 else int(messages[piece.start]) for piece in pieces)
        return ShownRow(name, sample, tuple(pieces), owners, int(trained.sum()))


def print_rows(console: Console, rows: Iterable[ShownRow]) -> None:
    """Print rows in the terminal, turn by turn."""
    for row in rows:
        view = row.as_view(0)
        counts = (
            ""
            if isinstance(row.result, RejectedRow)
            else f" ({row.trained:,} of {view.num_tokens:,} tokens are trained on)"
        )
        print_sample(console, f"{row.name}: {view.id}{counts}", view, _roles([view]))
        console.print()
    console.print(legend(is_plain(console)))


def write_rows_page(path: str, jobs: JobRows, rows: Sequence[ShownRow]) -> int:
    """Write rows as a web page that holds their pictures too; returns the size of the page in bytes."""
    views, start = [], 0
    for row in rows:
        views.append(row.as_view(start))
        start += views[-1].num_tokens
    packing = jobs.job.packing
    loss = jobs.job.loss
    view = BinView(
        path=jobs.job.name, index=0, num_bins=1, bucket="rows", num_tokens=start,
        visual_tokens=sum(row.result.visual_tokens for row in rows if isinstance(row.result, Sample)),
        trained_tokens=sum(row.trained for row in rows),
        token_capacity=packing.token_capacity, visual_capacity=packing.visual_capacity,
        loss=loss if isinstance(loss, str) else json.dumps(loss.model_dump(mode="json", exclude_defaults=True)),
        roles=_roles(views), samples=tuple(views),
    )  # fmt: skip
    return write_html(path, page_of(view, jobs.family, jobs.policy))


def _roles(views: Iterable[SampleView]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(turn.role for view in views for turn in view.turns if turn.role is not None))


def _id_of(row: RawRow, column: str) -> str:
    row_id = row.value.get(column) if isinstance(row.value, dict) else None
    return row.source if row_id is None else str(row_id)
