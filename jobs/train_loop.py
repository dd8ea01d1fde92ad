"""What every Ray Train worker runs: restore, take batches in schedule order, step, evaluate, checkpoint.

A worker knows its place from the checkpoint alone: the cursor in it says how many global batches the weights have
seen, and the data stream is built from there. The split is made inside this function (rank 0 makes it, the others
receive their part), because what Ray Train evaluates outside does not see the checkpoint being restored.
"""

import logging
import pickle
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero

from jobs.checkpoint_writer import CheckpointWriter
from jobs.preemption import PreemptionNotices
from jobs.records import Records
from jobs.run_measures import RunMeasures
from jobs.run_plan import RunPlan
from mmray.batches.micro_batch import MicroBatch
from mmray.batches.plan import BatchMaker
from mmray.prepared import PreparedDataset
from mmray.run.checkpoints import Scratch, newest_whole, step_of
from mmray.run.folder import RunFolder
from mmray.run.history import Event, add_to_history
from mmray.run.skipped import Seen
from mmray.run.warnings import keep_warnings
from mmray.schedule.schedule import Schedule
from mmray.training.bins_log import TrainedStep
from mmray.training.engine import TrainingEngine
from mmray.training.ranks import Ranks
from pipelines.ingest import Ingest

log = logging.getLogger("mmray")


def train_worker(config: dict[str, bytes]) -> None:
    """The train function of one rank. config: the plan, pickled: Ray Train's controller unpickles what it is given, and
    would import all of mmray, transformers and torch for it, some seconds before it begins to start workers."""
    Worker(pickle.loads(config["plan"])).run()


@dataclass(frozen=True)
class Given:
    """What all ranks together are given in one step. ask: whether to ask for notices after it."""

    trained: TrainedStep
    seen: Seen
    ask: bool


class Worker:
    """One rank of a run."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan, self.training = plan, plan.job.training
        self.run_folder = RunFolder(plan.job.output.run)
        self.warnings = self.run_folder.warnings
        keep_warnings(self.warnings)
        self.ranks = Ranks()
        self.rank, self.world_size = self.ranks.rank, self.ranks.size
        self.prepared = PreparedDataset(plan.job.prepared_path("train"))
        self.checkpoints = CheckpointWriter(self.run_folder, self.rank, self.training.keep_checkpoints)
        self.notices = PreemptionNotices()
        self.measured = RunMeasures(plan.job.name, self.rank)

    def run(self) -> None:
        """Train from the newest whole checkpoint, or from the start, to the end."""
        if self.plan.gpus:
            torch.cuda.set_device(ray.train.torch.get_device())
        if self.rank > 0:
            self._run()
            return
        self.run_folder.fetch()
        with self.run_folder.publishing():
            self._run()

    def _run(self) -> None:
        checkpoint = newest_whole(self.run_folder, self.ranks, self._note_damage, self._scratch)
        self.cursor = self.plan.place(checkpoint, self.prepared)
        self.total_steps = self.plan.total_steps(self.cursor)
        plan, first_step = self.plan, self.cursor.first_step
        self.batches = plan.batches("train", plan.schedule_at(self.cursor), self.world_size, first_step)
        self.ingest = Ingest(BatchMaker(self.batches), plan.job.resources, plan.gpus, self.warnings, plan.job.name)
        self.engine = TrainingEngine(
            plan.job.model,
            self.training,
            total_steps=self.total_steps,
            grad_accumulation=self.batches.micro_batches,
            resume_from=checkpoint,
            scratch=self.run_folder.shared_path or self.checkpoints.scratch,
            node=self._scratch.node if self._scratch else "",
            ranks=self.ranks,
        )
        self._forget(checkpoint)
        self._note_begin(checkpoint)
        with closing(self._records()) if self.rank == 0 else nullcontext() as records:
            self._train(records)
        self.checkpoints.finish(self.engine)
        self._note("finish")

    def _records(self) -> Records:
        return Records(self.plan.job, self.run_folder.path, self.plan.commit, self.cursor.step)

    def _note(self, event: Event, step: int | None = None, **values: Any) -> None:
        """Rank 0 puts an event into the run's history. step: the steps done; the cursor's where not given."""
        if self.rank == 0:
            step = self.cursor.step if step is None else step
            add_to_history(self.run_folder.path, event, step, self.world_size, **values)

    @cached_property
    def _scratch(self) -> Scratch | None:
        """Where checkpoints of an object store are copied to."""
        if self.run_folder.shared_path is not None:
            return None
        return Scratch(self.checkpoints.scratch / "restored", ray.get_runtime_context().get_node_id())

    def _forget(self, checkpoint: Path | None) -> None:
        """Delete the copy that has been restored from. A collective call."""
        self.ranks.every(None)
        if checkpoint is not None and self._scratch is not None:
            shutil.rmtree(checkpoint, ignore_errors=True)

    def _note_damage(self, name: str, problem: str) -> None:
        self._note("damaged_checkpoint", step_of(name), checkpoint=name, problem=problem)

    def _note_begin(self, checkpoint: Path | None) -> None:
        if checkpoint is None:
            self._note("start")
            return
        self._note("resume", checkpoint=checkpoint.name)
        self.measured.restarted()
        if self.cursor.step == self.cursor.first_step > 0:
            data = self.prepared
            self._note("continue_on", prepared=data.path, fingerprint=data.fingerprint, bins=len(data))

    def _train(self, records: Records | None) -> None:
        for waited, batches in self._steps(self.total_steps):
            self.measured.waited(waited)
            started = time.monotonic()
            given = self._exchange(batches)
            if records:
                records.skipped.add(given.trained.step, "train", given.seen)
            outcome = self.engine.step(batches)
            seconds = time.monotonic() - started
            self.cursor = self.cursor.advance()
            if records:
                records.write(given.trained, outcome, given.seen, epoch=self._epoch(), seconds=seconds, waited=waited)
                self.measured.step(given.trained, outcome, given.seen, epoch=self._epoch(), seconds=seconds)
            if _due(self.cursor.step, self.training.eval_every_steps):
                self._evaluate(records)
            notice = self.notices.ask() if given.ask else None
            if notice:
                log.warning("nodes %s will be taken away; writing a checkpoint", ", ".join(notice["nodes"]))
                self._note("preemption", **notice)
            if notice or self.cursor.step == self.total_steps:
                self._save(wait=True)
            elif _due(self.cursor.step, self.training.checkpoint_every_steps):
                self._save(wait=False)

    def _exchange(self, batches: list[MicroBatch]) -> "Given":
        """What all ranks are given in the next step, by the batches themselves. A collective call."""
        own = Seen.of(batches)
        bins = [number for batch in batches for number in batch.bins]
        padding = [-1] * (self.batches.micro_batches * self.training.micro_batch_bins - len(bins))
        every = self.engine.gather([int(self.notices.is_due()), own.samples, len(own.skipped), *bins, *padding])
        skipped = self.engine.gather_objects(own.skipped) if any(count for _, _, count, *_ in every) else []
        trained = TrainedStep(
            step=self.cursor.step + 1,
            data=self.cursor.fingerprint,
            workers=self.world_size,
            bins=[[number for number in numbers if number >= 0] for _, _, _, *numbers in every],
        )
        return Given(trained, Seen(sum(samples for _, samples, *_ in every), skipped), ask=bool(every[0][0]))

    def _evaluate(self, records: Records | None) -> None:
        """Evaluate where the job has a set for it. A collective call."""
        if (maker := self._evaluation) is None:
            return
        own = Seen()
        steps = maker.plan.schedule.steps_per_epoch
        loss, tokens = self.engine.evaluate(own.through(maker.steps(self.rank, 0, steps)))
        counts = self.ranks.every(own.samples)
        seen = Seen(sum(counts), self.engine.gather_objects(own.skipped))
        if records:
            records.skipped.add(self.cursor.step, "eval", seen)
            self.measured.evaluated(loss)
            records.metrics.write(
                self.cursor.step, epoch=self._epoch(), eval_loss=loss, eval_trained_tokens=tokens,
                eval_samples=seen.samples, eval_skipped_samples=len(seen.skipped),
            )  # fmt: skip

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

    def _save(self, wait: bool) -> None:
        """Write a checkpoint. wait: until it is in the run's folder."""
        started = time.monotonic()
        if self.rank == 0:
            self.run_folder.publish()
        name = self.checkpoints.save(self.engine, self.cursor, self.prepared, wait=wait)
        seconds = time.monotonic() - started
        self._note("checkpoint", name=name, seconds=round(seconds, 3))
        self.measured.saved(seconds)

    def _epoch(self) -> float:
        """Epochs of the data it trains on."""
        return round((self.cursor.step - self.cursor.first_step) / self.plan.schedule.steps_per_epoch, 6)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
