"""The train function of every Ray Train worker: the loop of the library (`mmray/run/loop.py`) with Ray's parts handed
in.

A worker knows its place from the checkpoint alone: the cursor in it says how many global batches the weights were
trained on, and the data stream is built from there. The split is made inside this function (rank 0 makes it, the others
receive their part), because code that Ray Train evaluates outside does not see the checkpoint being restored.
"""

import copy
import itertools
import pickle
from collections.abc import Iterator, Sequence

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero

from jobs.checkpoint_writer import CheckpointWriter
from jobs.preemption import Preemption
from jobs.run_measures import RunMeasures
from mmray.batches.ahead import InputsAhead, StepsAhead
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
from pipelines.ingest import Feed, Ingest, Received, Shares


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
        self._rank, self._run = run.ranks.rank, run
        self._ingest = Ingest(
            BatchMaker(run.batches), plan.job.resources, plan.gpus, run.folder.warnings, plan.job.name, evaluation
        )
        self._steps: StepsAhead[list[tuple[MicroBatch, bytes]]] | None = None
        self._parts: Iterator[Shares] = iter(())

    def __call__(self, start: int, stop: int) -> Iterator[list[MicroBatch]]:
        """Yields the micro-batches of the steps [start, stop), step by step. Collective.

        The batches of an evaluation that is due must be taken (`losses`, `texts`) before the next step is asked for.
        """
        engine = self._run.engine
        # Of its own: while an evaluation writes texts, the model's attention is another, and inputs are made ahead.
        inputs = InputsAhead(engine.device, engine.dtype, copy.deepcopy(engine.model.config))
        try:
            for first, last in self._ingest.segments(start, stop):
                received = Received(self._ingest, self._feed(first, last), self._rank, first, last)
                self._steps = StepsAhead(self._read(received, inputs))
                self._parts = iter(received.parts)
                for part in self._parts:
                    for pairs in self._of(part):
                        batches = [batch for batch, _ in pairs]
                        yield batches
                        inputs.give_up(batches)
                self._steps.close()
        finally:
            inputs.close()
            if self._steps is not None:
                self._steps.close()

    def _read(self, received: Received, inputs: InputsAhead) -> Iterator[list[tuple[MicroBatch, bytes]]]:
        """Yields the steps of all parts; the inputs of those of training are made ahead of their use."""
        for part in received.parts:
            for pairs in received.steps(part):
                for batch, _ in pairs if part.plan is self._ingest.plan else ():
                    inputs.add(batch)
                yield pairs

    def _of(self, part: Shares) -> Iterator[list[tuple[MicroBatch, bytes]]]:
        """Yields the steps of the next part."""
        assert self._steps is not None
        return itertools.islice(self._steps, part.stop - part.start)

    def losses(self) -> Iterator[list[MicroBatch]]:
        """Yields the micro-batches of an evaluation's loss, step by step."""
        for pairs in self.texts():
            yield [batch for batch, _ in pairs]

    def texts(self) -> Iterator[list[tuple[MicroBatch, bytes]]]:
        """Yields the rows of each round that an evaluation reads, each with a picture for people."""
        yield from self._of(next(self._parts))

    def _feed(self, start: int, stop: int) -> Feed:
        """The feed of this rank for steps [start, stop); rank 0 builds the graph. Collective."""
        reference = None
        if self._rank == 0:
            reference = ray.put(self._ingest.split(start, stop))
        (reference,) = broadcast_from_rank_zero((reference,))
        feeds: list[Feed] = ray.get(reference)
        return feeds[self._rank]
