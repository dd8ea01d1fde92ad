"""What both graphs ask of Ray Data: blocks of one row that keep their order, and errors a person can read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.data import Dataset
from ray.exceptions import RayTaskError

from mmray.errors import UserError


def one_row_blocks(items: Sequence[dict[str, Any]]) -> Dataset:
    """A dataset with one block per item, in this order; operators on it keep the order."""
    dataset = ray.data.from_items(list(items), override_num_blocks=len(items))
    keep_order(dataset)
    return dataset


def keep_order(dataset: Dataset) -> None:
    """Deliver blocks in order whatever the actors' pace, and never split one. Holds for this dataset only."""
    context = dataset.context
    context.execution_options.preserve_order = True
    context.target_max_block_size = None
    context.enable_progress_bars = False
    context.verbose_stats_logs = False


@contextmanager
def raised_by_user() -> Iterator[None]:
    """Turn a Ray error whose cause is a UserError on some actor into that UserError."""
    try:
        yield
    except Exception as error:
        cause = user_error(error)
        if cause is None:
            raise
        raise UserError(str(cause)) from error


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError an exception comes from, through Ray's wrappers; None when there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, UserError):
            return error
        if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
            return error.cause
        for failure in getattr(error, "worker_failures", {}).values():  # Ray Train's, by rank
            if (found := user_error(failure)) is not None:
                return found
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None
