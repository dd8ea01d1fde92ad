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
from mmray.run.folder import RunFolder
from mmray.run.loop import TrainingLoop
from mmray.run.plan import RunPlan
from mmray.run.state import RunState, open_run
from mmray.run.warnings import LIBRARIES, keep_warnings
from mmray.training.ranks import Ranks
from pipelines.ingest import Ingest


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
    callbacks = standard_callbacks(
        run, watching=[RunMeasures(plan.job.name, ranks.rank)], asking=[Preemption(), *own_callbacks]
    )
    TrainingLoop(run, callbacks, checkpoints).train(StreamedBatches(run))


class StreamedBatches:
    """The micro-batches of this rank, read through Ray Data."""

    def __init__(self, run: RunState) -> None:
        plan = run.plan
        self._rank = run.ranks.rank
        self._ingest = Ingest(
            BatchMaker(run.batches), plan.job.resources, plan.gpus, run.folder.warnings, plan.job.name
        )

    def __call__(self, start: int, stop: int) -> Iterator[list[MicroBatch]]:
        """Yields the micro-batches of the steps [start, stop), step by step. Collective."""
        for first, last in self._ingest.segments(start, stop):
            yield from self._ingest.receive(self._shard(first, last), self._rank, first, last)

    def _shard(self, start: int, stop: int) -> Any:
        """This rank's iterator over steps [start, stop); rank 0 builds the graph. Collective."""
        reference = None
        if self._rank == 0:
            reference = ray.put(self._ingest.split(start, stop))
        (reference,) = broadcast_from_rank_zero((reference,))
        return ray.get(reference)[self._rank]
