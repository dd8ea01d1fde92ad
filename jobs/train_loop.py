"""What every Ray Train worker runs: restore, take batches in schedule order, step, evaluate, checkpoint.

A worker knows its place from the checkpoint alone: the cursor in it says how many global batches the weights have
seen, and the data stream is built from there. The split is made inside this function (rank 0 makes it, the others
receive their part), because what Ray Train evaluates outside does not see the checkpoint being restored.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero

from mmray.balanced_schedule import BalancedSchedule
from mmray.batch import MicroBatch
from mmray.config import Job
from mmray.cursor import Cursor
from mmray.kept_warnings import WARNINGS_FILE, keep_warnings
from mmray.loader import BatchMaker, BatchPlan
from mmray.prepared import PreparedDataset
from mmray.schedule import Schedule
from mmray.training.checkpoint import save_state
from mmray.training.engine import StepMetrics, TrainingEngine
from mmray.training.history import Event, add_to_history
from mmray.training.json_lines import JsonLines
from mmray.training.metrics import MetricsLog
from mmray.training.model import load_config
from mmray.training.skipped import Seen, SkippedLog
from mmray.training.trained import TRAINED_FILE, TrainedStep
from pipelines.ingest import Ingest

CURSOR_FILE = "cursor.json"


@dataclass(frozen=True)
class RunPlan:
    """What the driver decided for a run; equal on all workers. train, eval: bins of the prepared datasets."""

    job: Job
    train: tuple[int, str]
    """(number of bins, fingerprint) of the training set."""
    eval: tuple[int, str] | None
    gpus: bool

    @property
    def schedule(self) -> Schedule | BalancedSchedule:
        bins, fingerprint = self.train
        training, balance = self.job.training, self.job.balance
        order = Schedule(
            num_bins=bins, global_batch_bins=training.global_batch_bins, seed=training.seed, fingerprint=fingerprint
        )
        return order if balance is None else BalancedSchedule(order, balance.for_attention(self.job.model.attention))

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, epochs turned into steps."""
        training = self.job.training
        if training.steps is not None:
            return training.steps
        return max(1, round((training.epochs or 1) * self.schedule.steps_per_epoch))

    def batches(self, split_name: str, schedule: Schedule | BalancedSchedule, world_size: int) -> BatchPlan:
        job = self.job
        return BatchPlan(
            prepared=job.prepared_path(split_name),
            processor=job.model.processor_source,
            model_type=load_config(job.model).model_type,
            trust_remote_code=job.model.trust_remote_code,
            loss=job.loss,
            schedule=schedule,
            world_size=world_size,
            micro_batch_bins=job.training.micro_batch_bins,
            on_bad_row=job.data.on_bad_row,
        )


def run_plan(job: Job, prepared: dict[str, PreparedDataset], gpus: bool) -> RunPlan:
    """The plan of a run over prepared datasets."""
    shapes = {name: (len(each), each.fingerprint) for name, each in prepared.items()}
    return RunPlan(job, shapes["train"], shapes.get("eval"), gpus)


def train_worker(config: dict[str, RunPlan]) -> None:
    """The train function of one rank."""
    Worker(config["plan"]).run()


class Worker:
    """One rank of a run."""

    def __init__(self, plan: RunPlan) -> None:
        context = ray.train.get_context()
        self.plan, self.training = plan, plan.job.training
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.batches = plan.batches("train", plan.schedule, self.world_size)
        self.run_folder = Path(plan.job.output.run)
        warnings = str(self.run_folder / WARNINGS_FILE)
        keep_warnings(warnings)
        self.ingest = Ingest(BatchMaker(self.batches), plan.job.resources, plan.gpus, warnings)

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, to the end."""
        if self.plan.gpus:
            torch.cuda.set_device(ray.train.torch.get_device())
        checkpoint = ray.train.get_checkpoint()
        with checkpoint.as_directory() if checkpoint else nullcontext() as folder:
            self.cursor = self._restored_cursor(folder)
            self.engine = TrainingEngine(
                self.plan.job.model,
                self.training,
                total_steps=self.plan.total_steps,
                grad_accumulation=self.batches.micro_batches,
                resume_from=Path(folder) if folder else None,
                shared_folder=self.run_folder,
            )
        if folder is None:
            self._note("start")
        else:
            self._note("resume", checkpoint=Path(folder).name)
        share = self.plan.job.data.max_skipped_share
        with closing(Records(self.run_folder, self.cursor.step, share)) if self.rank == 0 else nullcontext() as records:
            self._train(records)
        self._note("finish")

    def _restored_cursor(self, folder: str | None) -> Cursor:
        if folder is None:
            return Cursor.at(self.plan.schedule)
        cursor = Cursor.read(Path(folder) / CURSOR_FILE)
        cursor.check(self.plan.schedule)
        return cursor

    def _note(self, event: Event, **values: Any) -> None:
        """Rank 0 puts an event into the run's history."""
        if self.rank == 0:
            add_to_history(self.run_folder, event, self.cursor.step, self.world_size, **values)

    def _train(self, records: "Records | None") -> None:
        for waited, batches in self._steps(self.plan.total_steps):
            started = time.monotonic()
            seen = self._all_seen(Seen.of(batches))
            if records:
                records.skipped.add(self.cursor.step + 1, "train", seen)
            outcome = self.engine.step(batches)
            seconds = time.monotonic() - started
            trained = self._trained(batches)
            self.cursor = self.cursor.advance()
            step = self.cursor.step
            if records:
                records.write(trained, outcome, seen, epoch=self._epoch(), seconds=seconds, waited=waited)
            if _due(step, self.training.eval_every_steps) and (maker := self._evaluation):
                steps = maker.plan.schedule.steps_per_epoch
                own = Seen()
                loss, tokens = self.engine.evaluate(own.through(maker.steps(self.rank, 0, steps)))
                seen = self._all_seen(own)
                if records:
                    records.skipped.add(step, "eval", seen)
                    records.metrics.write(
                        step, epoch=self._epoch(), eval_loss=loss, eval_trained_tokens=tokens,
                        eval_samples=seen.samples, eval_skipped_samples=len(seen.skipped),
                    )  # fmt: skip
            if _due(step, self.training.checkpoint_every_steps) or step == self.plan.total_steps:
                self._save(outcome)

    def _all_seen(self, own: Seen) -> Seen:
        """What all ranks were given. A collective call."""
        counts = self.engine.gather([own.samples, len(own.skipped)])
        skipped = self.engine.gather_objects(own.skipped) if any(count for _, count in counts) else []
        return Seen(sum(samples for samples, _ in counts), skipped)

    def _trained(self, batches: list[MicroBatch]) -> TrainedStep:
        """What all ranks trained on in the step that is done, by what they were given. A collective call."""
        bins = [number for batch in batches for number in batch.bins]
        padding = [-1] * (self.batches.micro_batches * self.training.micro_batch_bins - len(bins))
        every = self.engine.gather(bins + padding)
        return TrainedStep(
            step=self.cursor.step + 1,
            data=self.cursor.fingerprint,
            workers=self.world_size,
            bins=[[number for number in rank if number >= 0] for rank in every],
        )

    def _steps(self, stop: int) -> Iterator[tuple[float, list[MicroBatch]]]:
        """The seconds waited for each step's micro-batches, and these."""
        for first, last in self.ingest.segments(self.cursor.step, stop):
            started = time.monotonic()
            for batches in self.ingest.receive(self._shard(first, last), self.rank, first, last):
                yield time.monotonic() - started, batches
                started = time.monotonic()

    def _shard(self, start: int, stop: int) -> Any:
        """This rank's iterator over steps [start, stop); rank 0 builds the graph. A collective call."""
        reference = None
        if self.rank == 0:
            reference = ray.put(self.ingest.split(start, stop))
        (reference,) = broadcast_from_rank_zero((reference,))
        return ray.get(reference)[self.rank]

    @cached_property
    def _evaluation(self) -> BatchMaker | None:
        """Makes the batches of the eval set, whose few bins are rendered in this process."""
        if self.plan.eval is None:
            return None
        bins, fingerprint = self.plan.eval
        per_step = self.world_size * self.training.micro_batch_bins
        schedule = Schedule(bins, global_batch_bins=per_step, seed=0, fingerprint=fingerprint, shuffle=False)
        batches = self.plan.batches("eval", schedule, self.world_size)
        return BatchMaker(batches, tile_cache=self.plan.job.resources.tile_cache)

    def _save(self, outcome: StepMetrics) -> None:
        started = time.monotonic()
        name = f"checkpoint_{self.cursor.step:08d}_{uuid4().hex[:8]}"
        with tempfile.TemporaryDirectory(prefix="mmray-checkpoint-") as folder:
            save_state(self.engine, Path(folder))
            if self.rank == 0:
                self.cursor.write(Path(folder) / CURSOR_FILE)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            values = {"step": self.cursor.step, "loss": outcome.loss}
            ray.train.report(values, checkpoint=checkpoint, checkpoint_dir_name=name)
        self._note("checkpoint", name=name, seconds=round(time.monotonic() - started, 3))

    def _epoch(self) -> float:
        return round(self.cursor.step / self.plan.schedule.steps_per_epoch, 6)


class Records:
    """What rank 0 writes of each step: its numbers, and the bins it trained on."""

    def __init__(self, run: Path, step: int, max_skipped_share: float) -> None:
        """step: the last that is done; numbers of later ones are forgotten."""
        self.metrics = MetricsLog(run)
        self.metrics.truncate_after(step)
        self.skipped = SkippedLog(run, step, max_skipped_share)
        self._trained = JsonLines(run / TRAINED_FILE)

    def write(
        self, trained: TrainedStep, outcome: StepMetrics, seen: Seen, *, epoch: float, seconds: float, waited: float
    ) -> None:
        """One step that is done."""
        self._trained.append(asdict(trained))
        self.metrics.write(
            trained.step,
            epoch=epoch,
            loss=outcome.loss,
            tokens=outcome.tokens,
            trained_tokens=outcome.trained_tokens,
            bins=len(trained.all_bins),
            workers=trained.workers,
            samples=seen.samples,
            skipped_samples=len(seen.skipped),
            lr=outcome.learning_rate,
            grad_norm=outcome.grad_norm,
            step_seconds=seconds,
            data_wait_seconds=waited,
        )

    def close(self) -> None:
        """Close the files."""
        self._trained.close()
        self.metrics.close()


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
