"""Defines the errors of a user's input: one row is wrong, or the job as a whole.

Each has a message of one line that names the value and the remedy; callers at the edge print it without a stack trace.
Any other exception is a bug of ours. Passwords and tokens in URIs are removed from messages.
"""

from mmray.base.redact import redacted


class UserError(Exception):
    """The job, its files or the machine do not fit together; the message says what to change."""

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class PassingError(UserError):
    """Storage or a disk failed in a way that may be temporary: training retries before it reports the error."""


class RowError(Exception):
    """One row cannot be used. It is rejected whole (or stops the job, `on_bad_row: error`).

    reason: a stable word for statistics, listed in docs/rows.md, for example "image_missing".
    message: one line for a person, with the wrong value and the remedy.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, redacted(message))
        self.reason = reason
        self.message = redacted(message)

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"
