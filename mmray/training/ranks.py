"""Exchange of small Python objects between all ranks, over connections of its own.

The connections are gloo's, also where training runs over NCCL, and wait for hours: what ranks agree on here (which
checkpoint is whole, whether a conversion worked) may take one of them as long as reading a checkpoint, and the usual
ten minutes of a collective are too few.
"""

from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

PATIENCE = timedelta(hours=12)

Value = TypeVar("Value")


class Ranks:
    """All ranks of the default process group. Creating an instance and calling its methods is collective.

    Its connections live as long as the process: a rank that closed them could cut off another that is still reading.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def from_first(self, value: Value | None) -> Value:
        """The value of rank 0; the values of the other ranks are ignored."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        result: Value = box[0]
        return result

    def every(self, value: Value) -> list[Value]:
        """The values of all ranks, in the order of ranks. Waits for all of them."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values
