"""Settings of Ray Data that both graphs share: blocks of one row that keep their order, and errors a person can
read."""

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError

from pipelines.nodes import alive_nodes, amount, labelled

ERROR = "error"
"""Column in which an actor passes on the message of a UserError. An exception would arrive inside wrappers of Ray that
lose their cause when they are pickled."""


def one_row_blocks(items: Sequence[dict[str, Any]], labels: Mapping[str, str]) -> Dataset:
    """A dataset with one block per item, in this order. labels: of the nodes that its operators run on; {}: any.

    Its operators deliver blocks in order whatever the actors' pace, and never split one.
    """
    return _in_order(ray.data.from_items(list(items), override_num_blocks=len(items)), labels, block_bytes=None)


def numbers(count: int, labels: Mapping[str, str]) -> Dataset:
    """A dataset with one block, of one row, for each `number` from 0 to count - 1, generated while it is read.

    labels: of the nodes that its operators run on; {}: any. All its operators must return blocks of one row.

    `one_row_blocks` puts all blocks into the object store before the first is delivered, 1 ms each. Here one task that
    uses no CPU lists them.
    """
    dataset = ray.data.read_datasource(_Numbers(count), override_num_blocks=1, num_cpus=0)
    return _in_order(dataset, labels, block_bytes=1)


def cluster_amount(resource: str, labels: Mapping[str, str]) -> float:
    """Number of CPUs (or GPUs), busy ones too, of the cluster's nodes that have these labels now; {}: of all nodes."""
    return amount(labelled(alive_nodes(), labels), resource)


class PickledActor:
    """Unpickles and builds an actor's callable inside the actor.

    The process that schedules a split unpickles the whole graph. As bytes, an actor's class does not make it import
    torch and transformers, 5 s before the actors themselves can begin to.
    """

    def __init__(self, pickled: bytes) -> None:
        self._call: Callable[[pa.Table], pa.Table] = pickle.loads(pickled)()

    def __call__(self, block: pa.Table) -> pa.Table:
        return self._call(block)


def out_of_room(error: BaseException) -> str:
    """The resource that Ray lacked, by an error or its cause, in a few words; "" where it lacked none."""
    lacks: dict[type[BaseException], str] = {
        OutOfMemoryError: "a machine of the cluster is out of memory",
        ObjectStoreFullError: "Ray's object store is full",
        OutOfDiskError: "the disk to which Ray spills its object store is full",
    }
    cause: BaseException | None = error
    while cause is not None:
        for kind, lack in lacks.items():
            if isinstance(cause, kind):
                return lack
        cause = getattr(cause, "cause", None) or cause.__cause__
    return ""


class RenderActor(PickledActor):
    """The actor that decodes images, under this name in Ray's dashboard and process lists."""


class MaskActor(PickledActor):
    """The actor that computes labels, under this name in Ray's dashboard and process lists."""

    def call(self, block: pa.Table) -> pa.Table:
        """Calls it: methods of Ray's actors need names without underscores."""
        return self(block)


def _in_order(dataset: Dataset, labels: Mapping[str, str], block_bytes: int | None) -> Dataset:
    """Sets a dataset to keep the order of its blocks.

    block_bytes: a block ends when it has as many, so with 1 after each row; None: with the task that makes it.
    """
    context = dataset.context
    context.execution_options.preserve_order = True
    context.execution_options.label_selector = dict(labels) or None
    context.target_max_block_size = block_bytes
    context.enable_progress_bars = False
    context.verbose_stats_logs = False
    return dataset


class _Numbers(Datasource):
    """A data source with one read task whose blocks are numbers."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    @property
    def supports_distributed_reads(self) -> bool:
        """False, so that it runs on the node of the graph's driver. On another, its loss would begin the list again."""
        return False

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        count = self._count

        def blocks() -> Iterator[pa.Table]:
            for number in range(count):
                yield pa.table({"number": [number]})

        size = BlockMetadata(num_rows=count, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(blocks, size, per_task_row_limit=per_task_row_limit)]
