"""Exchange of small Python objects between all ranks, over connections of its own.

The connections are gloo's, also where training runs over NCCL, and wait for hours: what ranks agree on here (which
checkpoint is whole, whether a conversion worked) may take one of them as long as reading a checkpoint, and the usual
ten minutes of a collective are too few.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
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
        self._steps = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

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

    def numbers(self, values: Sequence[int]) -> list[list[int]]:
        """The integers of all ranks, in the order of ranks; every rank passes the same number of them.

        For the steps of training: it waits no longer for a rank than torch's collectives do. The numbers stay on the
        host, so that exchanging them does not wait for a GPU.
        """
        mine = torch.tensor(values, dtype=torch.int64)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine, group=self._steps)
        return [rank_values.tolist() for rank_values in every]

    def sums(self, values: Sequence[int]) -> list[int]:
        """The sum of each integer over all ranks, exchanged as `numbers` are."""
        totals = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(totals, group=self._steps)
        return [int(total) for total in totals.numpy()]
