"""The samples that a step of a run trained on, or will train on, by rank: for hunting a loss spike.

It needs the job's prepared data and the files of the run's folder, but no cluster. For steps that are done, ranks and
bins are those of `trained.jsonl`: what the ranks really received. Later steps follow from the schedule of the data that
the newest checkpoint knows, and of the job's data beyond it.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mmray.batches.plan import BatchPlan
from mmray.errors import UserError
from mmray.prepared.joined import JoinedDatasets
from mmray.schedule.cursor import Cursor, DataSpan
from mmray.training.bins_log import TrainedLog, TrainedStep

PlanOf = Callable[[DataSpan, int], BatchPlan]
"""A function that gives the batches of a span of data for a number of ranks."""


@dataclass(frozen=True)
class TracedSample:
    """One sample of one step."""

    step: int
    """Number of the step, counted from 1, as in metrics.jsonl."""
    workers: int
    rank: int
    micro_batch: int
    """Index of the micro-batch within the rank's step."""
    bin: int
    """Number of the bin in its dataset."""
    id: str
    source: str
    """File and line (or row group and row) of the sample's row."""
    trained: bool
    """True if the step was done; False for a prediction."""
    dataset: str | None = None
    """Path of its prepared dataset in a mixture; None where there is only one."""

    def to_json(self) -> dict[str, Any]:
        """The sample as plain values of JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Tracer:
    """Traces the steps of one run.

    cursor: the run's place; workers: number of ranks in steps that are not done; last_step: number of the run's last
    step, counted from 1.
    """

    def __init__(self, run: Path, cursor: Cursor, plan_of: PlanOf, workers: int, last_step: int) -> None:
        self.last_step = last_step
        self._cursor, self._plan_of, self._workers = cursor, cache(plan_of), workers
        self._trained = TrainedLog(run)
        self._checked: set[str] = set()

    def samples(self, step: int) -> Iterator[TracedSample]:
        """The samples of one step, counted from 1, by rank and in the order they are trained on.

        Raises UserError for a step that is none of the run's, or when its data no longer exists or was prepared anew.
        """
        if not 1 <= step <= self.last_step:
            raise UserError(f"--trace {step}: steps are counted from 1, as in metrics.jsonl, to {self.last_step:,}")
        span = [span for span in self._cursor.spans if span.first_step < step][-1]
        done = self._trained.get(step)
        if done and done.data != span.fingerprint:
            raise UserError(
                f"step {step} was trained on data {done.data}, and the newest checkpoint tells of {span.fingerprint} "
                f"({span.prepared}); its checkpoint was deleted or replaced"
            )
        workers = done.workers if done else self._workers
        plan = self._plan_of(span, workers)
        data = plan.dataset
        self._check(span, data)
        for rank in range(workers):
            for micro, bins in enumerate(_micro_batches(plan, step, rank, done)):
                for number in bins:
                    content, (part, index) = data.bin(number), data.part_of(number)
                    dataset = data.parts[part].path if span.mixture else None
                    for id_, source in zip(content.sample_ids, content.sample_sources, strict=True):
                        yield TracedSample(step, workers, rank, micro, index, id_, source, done is not None, dataset)

    def _check(self, span: DataSpan, data: JoinedDatasets) -> None:
        """Raises UserError where a dataset of the span was prepared anew since."""
        if span.fingerprint in self._checked:
            return
        expected = [dataset.fingerprint for dataset in span.mixture.datasets] if span.mixture else [span.fingerprint]
        for part, fingerprint in zip(data.parts, expected, strict=True):
            if part.fingerprint != fingerprint:
                raise UserError(
                    f"{part.path} has fingerprint {part.fingerprint}, and the run trained on {fingerprint} from step "
                    f"{span.first_step + 1} on: it was prepared anew since"
                )
        self._checked.add(span.fingerprint)


def _micro_batches(plan: BatchPlan, step: int, rank: int, done: TrainedStep | None) -> list[list[int]]:
    """The bins of each of a rank's micro-batches.

    Those of a step that is done are listed one after another; empty bins, which its record leaves out, come last.
    """
    size = plan.micro_batch_bins
    if done:
        datasets = done.dataset_of[rank] if done.dataset_of else [0] * len(done.bins[rank])
        bins = [plan.dataset.first_bins[dataset] + number for dataset, number in zip(datasets, done.bins[rank])]
        return [bins[start : start + size] for start in range(0, len(bins), size)]
    scheduled = plan.order.rank_bins(step - 1 - plan.first_step, rank, plan.world_size, size)
    return [[number for number in bins if number is not None] for bins in scheduled]
