"""The train function of every Ray Train worker: the loop of the library (`mmray/run/loop.py`) with Ray's parts handed
in.

A worker knows its place from the checkpoint alone: the cursor in it says how many global batches the weights were
trained on, and the data stream is built from there. The split is made inside this function (rank 0 makes it, the others
receive their part), because code that Ray Train evaluates outside does not see the checkpoint being restored.
"""

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero

from jobs.checkpoint_writer import CheckpointWriter
from jobs.preemption import Preemption
from jobs.run_measures import RunMeasures
from mmray.batches.micro_batch import MicroBatch
from mmray.batches.plan import BatchMaker
from mmray.run.callback import Callback
from mmray.run.callbacks import standard_callbacks
from mmray.run.evaluation.callback import Evaluate
from mmray.run.evaluation.in_training import EvaluationPlans
from mmray.run.folder import RunFolder
from mmray.run.loop import TrainingLoop
from mmray.run.plan import RunPlan
from mmray.run.state import RunState, open_run
from mmray.run.warnings import LIBRARIES, keep_warnings
from mmray.training.ranks import Ranks
from pipelines.ingest import Ingest, Received, Shares


def worker_config(plan: RunPlan, callbacks: Sequence[Callback]) -> dict[str, bytes]:
    """The argument of `train_worker`. callbacks: those of this run alone, in addition to the standard ones.

    It is pickled: Ray Train's controller unpickles its arguments, and would import all of mmray, transformers and torch
    for it, some seconds before it begins to start workers.
    """
    return {"pickled": pickle.dumps((plan, callbacks))}


def train_worker(config: dict[str, bytes]) -> None:
    """The train function of one rank. config: made by `worker_config`."""
    plan, callbacks = pickle.loads(config["pickled"])
    if plan.gpus:
        torch.cuda.set_device(ray.train.torch.get_device())
    folder = RunFolder(plan.job.output.run)
    keep_warnings(folder.warnings, LIBRARIES)
    ranks = Ranks()
    if ranks.rank > 0:
        _train(plan, folder, ranks, callbacks)
        return
    folder.fetch()
    with folder.publishing():
        _train(plan, folder, ranks, callbacks)


def _train(plan: RunPlan, folder: RunFolder, ranks: Ranks, own_callbacks: Sequence[Callback]) -> None:
    """Trains from the newest whole checkpoint, or from the start, to the end."""
    checkpoints = CheckpointWriter(folder, ranks, plan.job.training.keep_checkpoints)
    node = ray.get_runtime_context().get_node_id()
    run = open_run(plan, folder, ranks, scratch=checkpoints.scratch, node=node)
    evaluation = EvaluationPlans.of(plan, ranks.size, run.total_steps)
    batches = StreamedBatches(run, evaluation)
    callbacks = standard_callbacks(
        run, evaluating=[Evaluate(run, evaluation, batches)], watching=[RunMeasures(plan.job.name, ranks.rank)],
        asking=[Preemption(), *own_callbacks],
    )  # fmt: skip
    TrainingLoop(run, callbacks, checkpoints).train(batches)


class StreamedBatches:
    """The micro-batches of this rank, read through Ray Data: those of training, and of evaluations between its
    steps."""

    def __init__(self, run: RunState, evaluation: EvaluationPlans | None) -> None:
        plan = run.plan
        self._rank = run.ranks.rank
        self._ingest = Ingest(
            BatchMaker(run.batches), plan.job.resources, plan.gpus, run.folder.warnings, plan.job.name, evaluation
        )
        self._received: Received | None = None
        self._parts: Iterator[Shares] = iter(())

    def __call__(self, start: int, stop: int) -> Iterator[list[MicroBatch]]:
        """Yields the micro-batches of the steps [start, stop), step by step. Collective.

        The batches of an evaluation that is due must be taken (`losses`, `texts`) before the next step is asked for.
        """
        for first, last in self._ingest.segments(start, stop):
            self._received = Received(self._ingest, self._shard(first, last), self._rank, first, last)
            self._parts = iter(self._received.parts)
            for part in self._parts:
                for batches in self._received.steps(part):
                    yield [batch for batch, _ in batches]

    def losses(self) -> Iterator[list[MicroBatch]]:
        """Yields the micro-batches of an evaluation's loss, step by step."""
        for batches in self.texts():
            yield [batch for batch, _ in batches]

    def texts(self) -> Iterator[list[tuple[MicroBatch, bytes]]]:
        """Yields the rows of each round that an evaluation reads, each with a picture for people."""
        assert self._received is not None
        yield from self._received.steps(next(self._parts))

    def _shard(self, start: int, stop: int) -> Any:
        """This rank's iterator over steps [start, stop); rank 0 builds the graph. Collective."""
        reference = None
        if self._rank == 0:
            reference = ray.put(self._ingest.split(start, stop))
        (reference,) = broadcast_from_rank_zero((reference,))
        return ray.get(reference)[self._rank]
