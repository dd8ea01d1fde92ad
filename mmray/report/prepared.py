"""What there is to see of a prepared dataset: counts, distributions, the balance of steps, rejected rows.

Everything rests on the loads in the footers of the bins files and on two columns. Of a dataset of many files, evenly
spaced ones are read, and the page says how many: the footers of 128 files take half a second from a local disk, and are
about 130,000 bins. Sums (rows, bins, tokens, fill, rejects) are those of the manifest, so of all bins.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mmray.config.job import Job
from mmray.prepared import PreparedDataset
from mmray.schedule.balance import BalanceSettings
from mmray.schedule.balanced import BalancedSchedule, BoundSchedule
from mmray.schedule.loads import Loads
from mmray.schedule.schedule import Schedule

MOST_FOOTERS, MOST_FILES = 128, 16
"""Files whose footers are read, and files whose columns are."""
MOST_STEPS, MOST_STEP_BINS = 256, 16_384
"""Steps whose balance is worked out, and the bins in them: the more bins a step has, the fewer steps."""
EXAMPLES = 3
"""Rejected rows shown for each reason."""
MOST_REJECTED_PARTS = 64
SHOWN_BINS = 4


@dataclass(frozen=True)
class Distributions:
    """Of the bins that were read. loads: of each; sample_lengths: tokens of each of their samples, int64 [n];
    images: of each bin, int64 [n]; bins, files: how many were read of how many."""

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
    """How bins become steps: of a job, or what a job has that says nothing."""

    global_batch_bins: int
    workers: int
    micro_batch_bins: int
    seed: int
    balance: BalanceSettings
    source: str
    """Where the settings are from, in words."""

    @classmethod
    def of(cls, job: Job | None) -> "StepSettings":
        if job is None:
            return cls(8, 8, 1, 0, BalanceSettings().for_attention("sdpa"), "defaults: no --job was given")
        training = job.training
        return cls(
            global_batch_bins=training.global_batch_bins,
            workers=job.resources.max_workers,
            micro_batch_bins=training.micro_batch_bins,
            seed=training.seed,
            balance=(job.balance or BalanceSettings()).for_attention(job.model.attention),
            source=f"job {job.name}" + ("" if job.balance else ", which has balance: null"),
        )


@dataclass(frozen=True)
class StepBalance:
    """Of steps from the first: the time of the slowest rank against equal ranks, float64 [steps], 1 is best."""

    plain: np.ndarray
    balanced: np.ndarray
    whole_steps: int
    """Steps of an epoch without its last, which may be short."""


def step_balance(prepared: PreparedDataset, settings: StepSettings) -> StepBalance:
    """The balance of the first steps, in plain shuffled order and balanced by cost. No steps where an epoch has no
    whole one."""
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
    """Of each step: time with ranks that wait for one another after every micro-batch, against equal ranks."""
    ranks = range(settings.workers)
    dealt = np.asarray([[_rank_bins(order, settings, step, rank) for rank in ranks] for step in range(steps)])
    cost = np.zeros(dealt.shape)  # [steps, ranks, micro-batches, bins]
    cost[dealt >= 0] = settings.balance.costs(prepared.loads(dealt[dealt >= 0]))
    micro = cost.sum(axis=3)
    return micro.max(axis=1).sum(axis=1) / micro.mean(axis=1).sum(axis=1)


def _rank_bins(order: Schedule | BoundSchedule, settings: StepSettings, step: int, rank: int) -> list[list[int]]:
    """The bins of each micro-batch of a rank; -1: none."""
    micros = order.rank_bins(step, rank, settings.workers, settings.micro_batch_bins)
    return [[-1 if number is None else number for number in micro] for micro in micros]


@dataclass(frozen=True)
class Rejects:
    """Rejected rows: how many of each reason, the commonest first, and some of each as `schema.REJECTED` has them."""

    counts: dict[str, int]
    examples: dict[str, list[dict[str, Any]]]


def rejects(prepared: PreparedDataset) -> Rejects:
    """The rejected rows of a dataset; examples are the first of each reason, so far as they come early in the file."""
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
    """Bins for a person to look at: of each of the commonest buckets the one of middling length."""
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


def spaced(items: list[int], most: int) -> list[int]:
    """At most so many, evenly spaced, in order."""
    if len(items) <= most:
        return items
    return [items[place] for place in np.linspace(0, len(items) - 1, most).round().astype(int).tolist()]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *(part.astype(np.int64) for part in parts)])
