"""What both graphs ask of Ray Data: blocks of one row that keep their order, and errors a person can read."""

from collections.abc import Sequence
from typing import Any

import ray
from ray.data import Dataset

ERROR = "error"
"""Column in which an actor hands on the message of a UserError. As an exception it would arrive inside wrappers of Ray
that lose what they wrap when they travel on."""


def one_row_blocks(items: Sequence[dict[str, Any]]) -> Dataset:
    """A dataset with one block per item, in this order.

    Operators on it deliver blocks in order whatever the actors' pace, and never split one.
    """
    dataset = ray.data.from_items(list(items), override_num_blocks=len(items))
    context = dataset.context
    context.execution_options.preserve_order = True
    context.target_max_block_size = None
    context.enable_progress_bars = False
    context.verbose_stats_logs = False
    return dataset
