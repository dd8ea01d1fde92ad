"""The two ways a user's input can be wrong: one row of it, or the job as a whole.

They carry a message of one line that names the value and the remedy; callers at the edge print it without a
stack trace. Anything else that is raised is a bug of ours. Passwords and tokens in URIs do not come through.
"""

from mmray.base.redact import redacted


class UserError(Exception):
    """The job, its files or the machine do not fit; the message says what to change."""

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class PassingError(UserError):
    """Storage or a disk failed in a way that may pass: a training tries again before it tells it to a person."""


class RowError(Exception):
    """One row cannot be used. It is rejected whole (or stops the job, `on_bad_row: error`).

    reason: a stable word for statistics, listed in docs/rows.md, for example "image_missing".
    message: one line for a person: the value that was found and the remedy.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, redacted(message))
        self.reason = reason
        self.message = redacted(message)

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"
