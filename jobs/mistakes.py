"""A mistake is not tried again: what a person must mend ends a run at once, whatever `training.max_failures` says.

Imported by Ray Train's controller, so it imports little.
"""

from typing import Any

from ray.train import UserCallback

from mmray.errors import PassingError, UserError


class EndAtMistakes(UserCallback):
    """Ends a run where a worker raised a UserError, unless that may pass.

    What this raises, Ray Train's controller raises from `fit` as the cause of a ControllerError, and does not start
    the workers again.
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
