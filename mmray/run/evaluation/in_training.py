"""The batches of an evaluation during training: those of the loss, and the rows that are read.

Both are part of the stream that brings training its batches (`pipelines/ingest.py`), between the steps after which an
evaluation is due: the actors that render pages for training render these too, so that evaluation takes no room of its
own in a cluster, and the training process decodes no picture. Which rows are read is a pure function of the prepared
eval set, the same in every evaluation.

A *round* of reading is one batch of rows for each rank. The rows of a round all have images, or all have none, and all
ranks have equally many: under ZeRO-3 ranks must call the same modules. Places without a row of their own repeat one,
which is then not counted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from mmray.base.settings import RowKind
from mmray.batches.micro_batch import MicroBatch, Place, Rendered, render
from mmray.batches.plan import BatchMaker, BatchPlan
from mmray.config.resources import TileCacheSettings
from mmray.prepared import PreparedDataset
from mmray.rows.taking import shares_of
from mmray.run.evaluation.rows import sample_bin, small_picture
from mmray.run.plan import RunPlan
from mmray.schedule.schedule import Schedule


@dataclass(frozen=True)
class ChosenRow:
    """A row of the prepared eval set: its bin, its number in the bin, its set, whether it has images, its tokens."""

    bin: int
    sample: int
    set: int
    has_images: bool
    tokens: int


@dataclass(frozen=True)
class TextPlan(BatchPlan):
    """The rows that an evaluation reads, as batches: each step is a round, each micro-batch one row.

    rows: [round][rank][row].
    """

    rows: tuple[tuple[tuple[ChosenRow, ...], ...], ...] = ()

    @property
    def micro_batches(self) -> int:
        return len(self.rows[0][0])

    def row(self, place: Place) -> ChosenRow:
        """The row of a micro-batch."""
        return self.rows[place.step][place.rank][place.micro]

    def bins(self, place: Place) -> list[int | None]:
        return [self.row(place).bin]


class TextMaker(BatchMaker):
    """Makes the micro-batches of a TextPlan: one row each."""

    def render(self, place: Place) -> Rendered:
        row = self.plan.row(place)  # type: ignore[attr-defined]
        one = sample_bin(self.prepared.bin(row.bin), row.sample)
        return render([one], place, self.family, self.policy, self.render_page, on_bad_row="reject")

    def picture(self, place: Place) -> bytes:
        """The row's first image as a small JPEG, for people."""
        row = self.plan.row(place)  # type: ignore[attr-defined]
        return small_picture(sample_bin(self.prepared.bin(row.bin), row.sample))


def batch_maker(plan: BatchPlan, tile_cache: TileCacheSettings | None, device: str = "cpu") -> BatchMaker:
    """The maker of a plan's micro-batches."""
    kind = TextMaker if isinstance(plan, TextPlan) else BatchMaker
    return kind(plan, device, tile_cache=tile_cache)


@dataclass(frozen=True)
class EvaluationPlans:
    """The evaluations of a run: after which steps, the batches of the loss, and the rows that are read."""

    every_steps: int | None
    last_step: int | None
    """The step after which there is an evaluation in any case; None: none."""
    losses: BatchPlan
    texts: TextPlan | None

    def is_due(self, step: int) -> bool:
        """True if an evaluation happens after this step."""
        return step == self.last_step or (self.every_steps is not None and step % self.every_steps == 0)

    @property
    def loss_steps(self) -> int:
        """Number of steps of the loss's batches."""
        return self.losses.schedule.steps_per_epoch

    @property
    def rounds(self) -> int:
        """Number of rounds of reading."""
        return len(self.texts.rows) if self.texts is not None else 0

    @property
    def parts(self) -> list[tuple[BatchPlan, int]]:
        """The plans of one evaluation, in order, each with its number of steps."""
        texts: list[tuple[BatchPlan, int]] = [] if self.texts is None else [(self.texts, self.rounds)]
        return [(self.losses, self.loss_steps), *texts]

    @classmethod
    def of(cls, plan: RunPlan, world_size: int, total_steps: int) -> "EvaluationPlans | None":
        """The evaluations of a run on `world_size` ranks; None where there are none."""
        settings, training = plan.job.evaluation, plan.job.training
        if plan.eval is None or (settings is None and training.eval_every_steps is None):
            return None
        bins, fingerprint = plan.eval
        per_step = world_size * training.micro_batch_bins
        schedule = Schedule(bins, global_batch_bins=per_step, seed=0, fingerprint=fingerprint, shuffle=False)
        losses = plan.batches("eval", schedule, world_size)
        if settings is None:
            return cls(training.eval_every_steps, None, losses, None)
        texts = None
        prepared = PreparedDataset(plan.job.prepared_path("eval"))
        if rows := chosen_rows(prepared, settings.generate.rows, settings.sets):
            dealt = dealt_rows(rows, world_size, settings.generate.batch_rows)
            values = {name: getattr(losses, name) for name in losses.__dataclass_fields__}
            texts = TextPlan(**values, rows=dealt)
        return cls(settings.every_steps or training.eval_every_steps, total_steps, losses, texts)


def kinds_of(prepared: PreparedDataset) -> list[RowKind]:
    """The kind of the rows of each set of a prepared dataset."""
    return [dataset["kind"] for dataset in prepared.manifest["record"]["datasets"]]


def chosen_rows(prepared: PreparedDataset, count: int, sets: Sequence[int] | None) -> list[ChosenRow]:
    """The rows that evaluations read: of each set its share, at least one, evenly spaced in the dataset. sets: None for
    all.

    Pages without an image are left out, because nothing stands before their text.
    """
    kinds = kinds_of(prepared)
    by_set: dict[int, list[ChosenRow]] = {number: [] for number in range(len(kinds))}
    columns = ["sample_lengths", "sample_sets", "images.list.element.sample"]
    tells_sets = prepared.manifest["format_version"] > 2
    for file, bins in prepared.files.items():
        table = prepared.read_file(file, columns if tells_sets else [columns[0], columns[2]])
        for number, record in zip(bins, table.to_pylist()):
            with_images = {image["sample"] for image in record["images"] or ()}
            for sample, tokens in enumerate(record["sample_lengths"]):
                set_number = record["sample_sets"][sample] if tells_sets else 0
                if sample in with_images or kinds[set_number] != "pretrain":
                    by_set[set_number].append(ChosenRow(number, sample, set_number, sample in with_images, tokens))
    wanted = {number: rows for number, rows in by_set.items() if rows and (sets is None or number in sets)}
    shares = shares_of(count, [len(rows) for rows in wanted.values()], least=1) if count else []
    return [
        rows[int(place)]
        for rows, share in zip(wanted.values(), shares)
        for place in np.linspace(0, len(rows) - 1, share).round()
    ]


def dealt_rows(
    rows: Sequence[ChosenRow], world_size: int, batch_rows: int
) -> tuple[tuple[tuple[ChosenRow, ...], ...], ...]:
    """Rows in rounds, [round][rank][row], of like length, each round with images or without; the last rows of a kind
    are repeated until its round is full."""
    most = min(batch_rows, -(-len(rows) // world_size))
    rounds = []
    for has_images in (True, False):
        of_kind = sorted((row for row in rows if row.has_images is has_images), key=lambda row: -row.tokens)
        for start in range(0, len(of_kind), most * world_size):
            group = of_kind[start : start + most * world_size]
            group += [group[-1]] * (most * world_size - len(group))
            rounds.append(tuple(tuple(group[rank * most : (rank + 1) * most]) for rank in range(world_size)))
    return tuple(rounds)


class EvaluationSource(Protocol):
    """Brings this rank the batches of an evaluation that is due, in order: all of the loss, then all rounds."""

    def losses(self) -> Iterator[list[MicroBatch]]:
        """Yields the micro-batches of the loss, step by step."""
        ...

    def texts(self) -> Iterator[list[tuple[MicroBatch, bytes]]]:
        """Yields the rows of each round, each with a picture for people."""
        ...


class BatchesHere:
    """The batches of an evaluation, rendered in this process: for runs without Ray."""

    def __init__(self, plans: EvaluationPlans, rank: int, tile_cache: TileCacheSettings | None) -> None:
        self._plans, self._rank, self._tile_cache = plans, rank, tile_cache

    @cached_property
    def _makers(self) -> list[Any]:
        return [batch_maker(plan, self._tile_cache) for plan, _ in self._plans.parts]

    def losses(self) -> Iterator[list[MicroBatch]]:
        """Yields the micro-batches of the loss, step by step."""
        return self._makers[0].steps(self._rank, 0, self._plans.loss_steps)

    def texts(self) -> Iterator[list[tuple[MicroBatch, bytes]]]:
        """Yields the rows of each round, each with a picture for people."""
        maker = self._makers[1]
        for number in range(self._plans.rounds):
            places = [Place(number, self._rank, micro) for micro in range(maker.plan.micro_batches)]
            yield [(maker.micro_batch(place), maker.picture(place)) for place in places]
