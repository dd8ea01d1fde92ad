"""Computes the numbers of a prepared dataset's report: distributions, the balance of steps, rejected rows.

The numbers come from the loads in the footers of the bins files and from two columns. Of many files, evenly spaced ones
are read, and the page says how many: the footers of 128 files take half a second from a local disk, and hold about
130,000 bins. Sums (rows, bins, tokens, fill, rejected rows) come from the manifest, and so cover all bins.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mmray.base.words import counted
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.prepared import PreparedDataset
from mmray.prepared.row_measures import spaced
from mmray.schedule.balance import BalanceSettings
from mmray.schedule.balanced import BalancedSchedule, BoundSchedule
from mmray.schedule.loads import Loads
from mmray.schedule.schedule import Schedule
from mmray.training.model import text_attention

MOST_FOOTERS, MOST_FILES = 128, 16
"""Most files whose footers are read, and most files whose columns are read."""
MOST_STEPS, MOST_STEP_BINS = 256, 16_384
"""Most steps whose balance is computed, and most bins in them: the more bins a step has, the fewer steps."""
EXAMPLES = 3
"""Number of rejected rows shown for each reason."""
MOST_REJECTED_PARTS = 64
SHOWN_BINS = 4


@dataclass(frozen=True)
class Distributions:
    """The distributions of the bins that were read.

    loads: the loads of each bin, None without bins; sample_lengths: tokens of each sample, int64 [samples]; images:
    number of images of each bin, int64 [bins]; bins: (bins whose footer was read, all bins); column_bins: bins whose
    columns were read.
    """

    loads: Loads | None
    sample_lengths: np.ndarray
    images: np.ndarray
    bins: tuple[int, int]
    column_bins: int

    @classmethod
    def of(cls, prepared: PreparedDataset) -> "Distributions":
        files = prepared.files
        with_footer, with_columns = spaced(list(files), MOST_FOOTERS), spaced(list(files), MOST_FILES)
        bins = np.asarray([number for file in with_footer for number in files[file]], dtype=np.int64)
        tables = [prepared.read_file(file, ["sample_lengths", "images.list.element.width"]) for file in with_columns]
        lengths = [table["sample_lengths"].combine_chunks().flatten().to_numpy() for table in tables]
        images = [
            table["images"].combine_chunks().value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
            for table in tables
        ]
        return cls(
            loads=prepared.loads(bins) if len(bins) else None,
            sample_lengths=_joined(lengths),
            images=_joined(images),
            bins=(len(bins), len(prepared)),
            column_bins=sum(len(files[file]) for file in with_columns),
        )


@dataclass(frozen=True)
class StepSettings:
    """The settings by which bins become steps: a job's, or the defaults."""

    global_batch_bins: int
    workers: int
    micro_batch_bins: int
    seed: int
    balance: BalanceSettings
    source: str
    """The origin of the settings, in words."""

    @classmethod
    def of(cls, job: Job | None) -> "StepSettings":
        if job is None:
            return cls(8, 8, 1, 0, BalanceSettings().for_attention("packed"), "defaults: no --job was given")
        training = job.training
        return cls(
            global_batch_bins=training.global_batch_bins,
            workers=job.resources.max_workers,
            micro_batch_bins=training.micro_batch_bins,
            seed=training.seed,
            balance=(job.balance or BalanceSettings()).for_attention(_attention(job)),
            source=f"job {job.name}" + ("" if job.balance else ", which has balance: null"),
        )


def _attention(job: Job) -> str:
    """The attention of the job's text layers; as the job has it where its model is not within reach."""
    try:
        return text_attention(job.model)
    except UserError:
        return job.model.attention or "packed"


@dataclass(frozen=True)
class StepBalance:
    """The time of the slowest rank in each of the first steps relative to equal ranks, float64 [steps]; 1 is best.

    A rank's time is the sum of its micro-batches: ranks wait for one another at the end of a step.
    """

    plain: np.ndarray
    balanced: np.ndarray
    whole_steps: int
    """Number of steps of an epoch, without a short last one."""


def step_balance(prepared: PreparedDataset, settings: StepSettings) -> StepBalance:
    """Compute the balance of the first steps, in plain shuffled order and balanced by cost.

    There are no steps when an epoch has no whole one.
    """
    whole = len(prepared) // settings.global_batch_bins
    steps = min(whole, MOST_STEPS, max(MOST_STEP_BINS // settings.global_batch_bins, 1))
    if not steps:
        return StepBalance(np.zeros(0), np.zeros(0), 0)
    plain = Schedule(len(prepared), settings.global_batch_bins, settings.seed, prepared.fingerprint)
    balanced = BalancedSchedule(plain, settings.balance).bound_to(prepared.loads)
    slowest = [_slowest(order, prepared, settings, steps) for order in (plain, balanced)]
    return StepBalance(plain=slowest[0], balanced=slowest[1], whole_steps=whole)


def _slowest(
    order: Schedule | BoundSchedule, prepared: PreparedDataset, settings: StepSettings, steps: int
) -> np.ndarray:
    """The time of each step, in which ranks wait for one another at its end, relative to equal ranks."""
    ranks = range(settings.workers)
    dealt = np.asarray([[_rank_bins(order, settings, step, rank) for rank in ranks] for step in range(steps)])
    cost = np.zeros(dealt.shape)  # [steps, ranks, micro-batches, bins]
    cost[dealt >= 0] = settings.balance.costs(prepared.loads(dealt[dealt >= 0]))
    ranks_cost = cost.sum(axis=(2, 3))
    return ranks_cost.max(axis=1) / ranks_cost.mean(axis=1)


def _rank_bins(order: Schedule | BoundSchedule, settings: StepSettings, step: int, rank: int) -> list[list[int]]:
    """The bin numbers of each micro-batch of a rank; -1 for an empty bin."""
    micros = order.rank_bins(step, rank, settings.workers, settings.micro_batch_bins)
    return [[-1 if number is None else number for number in micro] for micro in micros]


@dataclass(frozen=True)
class SetLine:
    """Counts the rows, tokens and bins of one set.

    rows: number of rows in its files; left_out: of them, those that were not taken; repeated: rows in bins beyond the
    first time of each; share: its part of all tokens; bins: number of bins with a sample of the set.
    """

    number: int
    kind: str
    rows: int
    packed: int
    rejected: int
    left_out: int
    repeated: int
    tokens: int
    visual_tokens: int
    trained_tokens: int
    bins: int
    share: float

    @property
    def in_words(self) -> str:
        """The line in words, without what is zero."""
        counts = [
            (self.packed, "packed"), (self.rejected, "rejected"), (self.left_out, "left out"),
            (self.repeated, "repeated"),
        ]  # fmt: skip
        rows = ", ".join(f"{count:,} {name}" for count, name in counts if count)
        tokens = f"{self.tokens:,} tokens ({self.share:.1%})"
        return f"{counted(self.rows, 'row')} ({rows}), {tokens}, {counted(self.bins, 'bin')}"


def set_lines(prepared: PreparedDataset) -> list[SetLine]:
    """List the sets of a dataset by number; none for a dataset of an earlier version, which did not count by sets."""
    sets, all_tokens = prepared.statistics.get("sets", {}), max(prepared.statistics["tokens"], 1)
    return [
        SetLine(
            number=int(number), kind=prepared.manifest["record"]["datasets"][int(number)]["kind"],
            rows=counts["rows_read"], packed=counts["rows_packed"], rejected=counts["rows_rejected"],
            left_out=counts["rows_left_out"], repeated=counts["rows_repeated"], tokens=counts["tokens"],
            visual_tokens=counts["visual_tokens"], trained_tokens=counts["trained_tokens"], bins=counts["bins"],
            share=counts["tokens"] / all_tokens,
        )
        for number, counts in sets.items()
    ]  # fmt: skip


@dataclass(frozen=True)
class Rejects:
    """The rejected rows of a dataset.

    counts: number of rows of each reason, the most frequent first; examples: some rows of each reason, as in
    `schema.REJECTED`.
    """

    counts: dict[str, int]
    examples: dict[str, list[dict[str, Any]]]


def rejects(prepared: PreparedDataset) -> Rejects:
    """Read the rejected rows of a dataset; examples are the first of each reason in the beginning of the file."""
    by_count: Mapping[str, int] = prepared.statistics["rejected_by_reason"]
    counts = dict(sorted(by_count.items(), key=lambda item: (-item[1], item[0])))
    examples: dict[str, list[dict[str, Any]]] = {reason: [] for reason in counts}
    if counts:
        for number, part in enumerate(prepared.rejected_parts()):
            if number >= MOST_REJECTED_PARTS or all(
                len(rows) >= min(EXAMPLES, counts[reason]) for reason, rows in examples.items()
            ):
                break
            _add_examples(examples, part)
    return Rejects(counts, examples)


def _add_examples(examples: dict[str, list[dict[str, Any]]], part: pa.Table) -> None:
    reasons = np.asarray(part["reason"].to_pylist(), dtype=object)
    for reason, rows in examples.items():
        places = np.flatnonzero(reasons == reason)[: EXAMPLES - len(rows)]
        rows += part.take(places).to_pylist()


def bins_to_show(distributions: Distributions, prepared: PreparedDataset, most: int = SHOWN_BINS) -> list[int]:
    """Numbers of bins for a person to look at: the bin of median length in each of the most frequent buckets."""
    loads = distributions.loads
    if loads is None:
        return []
    files = prepared.files
    numbers = np.asarray([number for file in spaced(list(files), MOST_FOOTERS) for number in files[file]])
    names, counts = np.unique(loads.bucket, return_counts=True)
    chosen = []
    for name in names[np.argsort(-counts, kind="stable")][:most]:
        bucket_bins = np.flatnonzero(loads.bucket == name)
        by_length = bucket_bins[np.argsort(loads.tokens[bucket_bins], kind="stable")]
        chosen.append(int(numbers[by_length[len(by_length) // 2]]))
    return chosen


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *(part.astype(np.int64) for part in parts)])
