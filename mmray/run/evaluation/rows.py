"""The rows that an evaluation looks at, each as a bin of its own: encoded and rendered as for training.

    chunk of rows ─ RowEncoder (tokens, sizes) ─ batches of like length ─ RowRenderer (pictures) ─ RowEvaluator (model)

Without Ray one process does all three; `pipelines/evaluate.py` runs them on actors.
"""

import hashlib
import io
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from mmray.base.settings import RowKind
from mmray.batches.micro_batch import Place, Rendered, render
from mmray.config.compatibility import job_family
from mmray.config.job import Job, absolute
from mmray.errors import RowError, UserError
from mmray.families import Family
from mmray.images import TilingPolicy, load_image
from mmray.loss.rules import LossRule
from mmray.prepared import Bin
from mmray.rows.encode import Encoder
from mmray.rows.files import Chunk, first_piece, source_files
from mmray.rows.plan import Plan, indexed_files, limited_rows, rows_of_sets
from mmray.rows.read import RowReader, chunk_rows, read_piece
from mmray.rows.sample import RejectedRow, Sample
from mmray.rows.settings import DatasetSettings
from mmray.rows.taking import taken_once
from mmray.run.scoring.results import BadRow
from mmray.storage import explained

CHUNK_ROWS = 128
"""Rows that are sorted by length together."""

PICTURE_SIDE = 640
"""Longest side, in pixels, of the picture of a page in a report."""

_TELLING_FIELDS: dict[RowKind, tuple[str, ...]] = {
    "chat": ("messages", "conversations"), "tokenized": ("input_ids",), "pretrain": ("text",),
}  # fmt: skip
"""Fields by which the kind of a row is known."""

_FIRST_LINES = 100
"""Lines of a file among which one is not blank, and tells its kind."""


@dataclass(frozen=True)
class RowSet:
    """A set of rows.

    name: its name in results; dataset: how its files are read; number: its number in the split.
    """

    name: str
    dataset: DatasetSettings
    number: int = 0


@dataclass(frozen=True)
class EvaluationData:
    """The rows of an evaluation: `train` or `eval` of a job, or one file."""

    name: str
    """`train`, `eval`, or the file as it was named."""
    sets: tuple[RowSet, ...]
    seed: int = 0
    """Seed by which rows of the sets are drawn (`data.seed`)."""
    left_out: tuple[int, ...] = ()
    """Numbers of the split's sets that `evaluation.sets` leaves out."""

    @classmethod
    def of(cls, job: Job, data: str, image_root: str | None = None) -> "EvaluationData":
        """The rows of a split, or of a file that is read like the job's set of the same kind.

        image_root: the folder that the images of a file are relative to; None for the file's own.

        Raises UserError for a split without rows.
        """
        if data in ("train", "eval"):
            if image_root is not None:
                raise UserError(f"--image-root is for --data FILE; data.{data} has its own in the job file")
            split = getattr(job.data, data)
            if not split:
                raise UserError("data.eval has no rows; give --data train, or a file of rows")
            chosen = job.evaluation.sets if job.evaluation and data == "eval" else None
            numbers = range(len(split)) if chosen is None else chosen
            sets = tuple(RowSet(str(number), split[number], number) for number in numbers)
            left_out = tuple(number for number in range(len(split)) if number not in numbers)
            return cls(data, sets, job.data.seed, left_out)
        dataset = _dataset_of(job, data)
        root = None if image_root is None else absolute(image_root)
        return cls(data, (RowSet(PurePosixPath(data).name, dataset.model_copy(update={"image_root": root})),))

    @property
    def datasets(self) -> tuple[DatasetSettings, ...]:
        """Settings of the sets, in order."""
        return tuple(row_set.dataset for row_set in self.sets)

    def chunks(self, limit: int | None) -> list[Chunk]:
        """The chunks of all rows, or of `limit` rows in all: each set's share, at least one row, and of a set the first
        rows of each file, each file's share.

        Blank lines are no rows. Rows that preparing leaves out (`max_rows`, `repeat` below 1) are left out; no row is
        taken twice. Raises UserError where there is no row, and for a limit below the number of sets.
        """
        indexed = indexed_files(source_files(self.datasets))
        takings = [
            taken_once(row_set.dataset, row_set.number, count, self.seed)
            for row_set, count in zip(self.sets, rows_of_sets(indexed, len(self.sets)), strict=True)
        ]
        if not any(taking.taken for taking in takings):
            files = ", ".join(file for dataset in self.datasets for file in dataset.files)
            raise UserError(f"there is no row to evaluate in {files:.500}")
        most = None if limit is None else limited_rows(indexed, takings, limit)
        plan = Plan(indexed, takings, window_rows=CHUNK_ROWS, chunk_rows=CHUNK_ROWS, most=most)
        return list(plan.chunks())


def _dataset_of(job: Job, file: str) -> DatasetSettings:
    """How the rows of a file are read: like the job's first set of the same kind, by the columns of the first row."""
    (source, *_) = source_files([DatasetSettings(files=(file,), kind="pretrain")])
    whole_rows = replace(source, reading=replace(source.reading, columns=()))
    row = next(read_piece(first_piece(whole_rows, _FIRST_LINES)), None)
    names = set(row.value) if row is not None and isinstance(row.value, dict) else set()
    sets = (*job.data.eval, *job.data.train)
    for kind, fields in _TELLING_FIELDS.items():
        of_kind = [dataset for dataset in sets if dataset.kind == kind]
        like = next((dataset for dataset in of_kind if names & set(map(dataset.column, fields))), None)
        if like is not None or names & set(fields) or kind == "pretrain":
            like = like or next(iter(of_kind), DatasetSettings(files=(file,), kind=kind))
            all_rows = {"repeat": None, "max_rows": None, "take": "sampled", "weight": None}
            return like.model_copy(update={"files": (file,), "format": "auto", "members": (), **all_rows})
    raise AssertionError("the last kind takes every row")


@dataclass(frozen=True)
class EvaluationRow:
    """A row as a bin of its own."""

    number: int
    """Position among all rows."""
    set: str
    kind: RowKind
    bin: Bin

    @property
    def id(self) -> str:
        """Id of the row."""
        return self.bin.sample_ids[0]

    @property
    def source(self) -> str:
        """Place of the row, `file:line`."""
        return self.bin.sample_sources[0]


@dataclass(frozen=True)
class RowBatch:
    """Rows of like length that are read together, or the bad rows of a chunk."""

    name: str
    """A name that no batch of other rows has, also where an evaluation continues."""
    rows: tuple[EvaluationRow, ...]
    bad: tuple[BadRow, ...] = ()


@dataclass(frozen=True)
class RenderedBatch:
    """A batch with its pictures decoded: for each row its arrays, or what is wrong with it, and a small picture."""

    batch: RowBatch
    rendered: tuple[Rendered, ...]
    pictures: tuple[bytes, ...]
    """A JPEG of each row's first image; empty without one."""


class RowEncoder:
    """Encodes chunks of rows into batches of like length. It holds the tokenizer: one in each process is enough."""

    def __init__(self, job: Job, data: EvaluationData, *, batch_rows: int) -> None:
        self.job, self._data, self._batch_rows = job, data, batch_rows
        self._reader = RowReader()

    @cached_property
    def family(self) -> Family:
        """The family of the job's model and processor."""
        return job_family(self.job)

    @cached_property
    def policy(self) -> TilingPolicy:
        """The tiling policy, as resolved for the family."""
        return self.family.resolved_tiling(self.job.images)

    @cached_property
    def _encoder(self) -> Encoder:
        datasets = [dataset.model_copy(update={"loss": None}) for dataset in self._data.datasets]
        return Encoder(self.job.data.lenient, datasets, self.family, self.policy, self.job.packing, loss="sampled")

    def batches(self, chunk: Chunk, done: Container[int] = ()) -> Iterator[RowBatch]:
        """Yields the batches of a chunk, the longest rows first.

        done: numbers of rows that are left out. Raises UserError for a file that cannot be read.
        """
        with explained(f"{chunk.pieces[0].uri} or its images"):
            numbered = list(enumerate(chunk_rows(chunk, self._reader), start=chunk.first_row))
            numbered = [(number, row) for number, row in numbered if number not in done]
            results = self._encoder.encode([row for _, row in numbered]) if numbered else []
        bad, rows = [], []
        for (number, row), result in zip(numbered, results, strict=True):
            row_set = self._data.sets[row.dataset]
            if isinstance(result, RejectedRow):
                bad.append(BadRow(result.id, result.source, row_set.name, result.reason, result.message))
            else:
                rows.append(EvaluationRow(number, row_set.name, row_set.dataset.kind, bin_of(result, number)))
        rows.sort(key=lambda row: len(row.bin.input_ids), reverse=True)
        if bad:
            yield RowBatch(f"{chunk.first_row:09d}-bad", (), tuple(bad))
        for start in range(0, len(rows), self._batch_rows):
            group = rows[start : start + self._batch_rows]
            yield RowBatch(_name_of(group), tuple(group))


def _name_of(rows: Sequence[EvaluationRow]) -> str:
    numbers = np.asarray([row.number for row in rows], dtype="<i8")
    return f"{numbers[0]:09d}-{hashlib.blake2b(numbers.tobytes(), digest_size=4).hexdigest()}"


def bin_of(sample: Sample, number: int) -> Bin:
    """The bin that holds one sample alone. Its number of trained tokens is not known: -1."""
    given_mask = sample.given_mask if sample.rule == LossRule.GIVEN else np.zeros(0, dtype=bool)
    images = [
        {"uri": image.uri or None, "data": image.data, "width": width, "height": height, "sample": 0,
         "first_token": int(first), "num_tokens": int(count)}
        for image, (width, height), (first, count) in zip(sample.images, sample.sizes, sample.blocks)
    ]  # fmt: skip
    return Bin(
        index=number, bucket=sample.bucket, visual_tokens=sample.visual_tokens, trained_tokens=-1,
        input_ids=sample.input_ids, sample_lengths=np.asarray([len(sample.input_ids)], dtype=np.int32),
        sample_ids=[sample.id], sample_sources=[sample.source], sample_rules=np.asarray([sample.rule], dtype=np.int8),
        sample_sets=np.asarray([sample.dataset], dtype=np.int32), given_mask=given_mask, images=images,
    )  # fmt: skip


def sample_bin(packed: Bin, number: int) -> Bin:
    """The bin that holds sample `number` of another bin alone. Its number of trained tokens is not known: -1."""
    stop = int(packed.sample_lengths[: number + 1].sum())
    start = stop - int(packed.sample_lengths[number])
    images = [
        image | {"sample": 0, "first_token": image["first_token"] - start}
        for image in packed.images if image["sample"] == number
    ]  # fmt: skip
    one = slice(number, number + 1)
    return replace(
        packed, trained_tokens=-1, visual_tokens=sum(image["num_tokens"] for image in images),
        input_ids=packed.input_ids[start:stop], sample_lengths=packed.sample_lengths[one],
        sample_ids=packed.sample_ids[one], sample_sources=packed.sample_sources[one],
        sample_rules=packed.sample_rules[one], sample_sets=packed.sample_sets[one],
        given_mask=packed.given_mask[start:stop] if len(packed.given_mask) else packed.given_mask, images=images,
    )  # fmt: skip


class RowRenderer:
    """Decodes the pictures of batches."""

    def __init__(self, family: Family, policy: TilingPolicy) -> None:
        self.family, self.policy = family, policy

    def __call__(self, batch: RowBatch) -> RenderedBatch:
        """Renders the rows of a batch; one with a picture that cannot be used is marked as skipped.

        Raises UserError where the storage of the pictures cannot be reached.
        """
        rendered = tuple(
            render([row.bin], Place(0, 0, number), self.family, self.policy, on_bad_row="reject")
            for number, row in enumerate(batch.rows)
        )
        pictures = tuple(
            b"" if arrays.skipped.any() else small_picture(row.bin) for row, arrays in zip(batch.rows, rendered)
        )
        return RenderedBatch(batch, rendered, pictures)


def small_picture(packed: Bin) -> bytes:
    """The first image of a bin as a small JPEG, for people; empty where it has none that can be read."""
    if not packed.images:
        return b""
    image = packed.images[0]
    try:
        picture: Image.Image = load_image(image["data"] if image["data"] is not None else image["uri"])
    except (RowError, UserError):
        return b""
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=80)
    return buffer.getvalue()


def as_rows(data: EvaluationData) -> list[dict[str, Any]]:
    """The sets of an evaluation as metrics.json describes them."""
    return [
        {"name": row_set.name, "kind": row_set.dataset.kind, "files": list(row_set.dataset.files)}
        for row_set in data.sets
    ]
