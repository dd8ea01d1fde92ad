"""Ends a run at a user's mistake: it is not retried, whatever `training.max_failures` says.

Ray Train's controller imports this module, so it imports little.
"""

from typing import Any

from ray.train import UserCallback

from mmray.errors import PassingError, UserError


class EndAtMistakes(UserCallback):
    """Ends a run where a worker raised a UserError, unless that may pass.

    Ray Train's controller raises the error from `fit` as the cause of a ControllerError, and does not restart the
    workers.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if mistake := mistake_in(worker_exceptions):
            raise mistake


def mistake_in(worker_exceptions: dict[int, Exception]) -> UserError | None:
    """The mistake of the first rank that raised one; None where there is none, or it may pass."""
    for _, error in sorted(worker_exceptions.items()):
        if isinstance(error, UserError) and not isinstance(error, PassingError):
            return error
    return None
