"""Limits how many rows of a data set may be rejected: a few in any case, and a share (`data.max_rejected_share`).

More rejected rows mean a wrong column, image root or capacity, so that the packed rows would not be what was intended.
Windows count their rows by data set, so a data set is checked by sums, whatever the order of its windows.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmray.base.words import counted
from mmray.errors import UserError
from mmray.rows.sample import RejectedRow, Sample

LEAST_REJECTED = 20
"""Number of rows of a data set that may be rejected whatever their share."""

SHOWN_REASONS = 5


def too_many(rejected: float, rows: float, max_share: float) -> bool:
    """Tells whether more rows of a data set are rejected than a job allows."""
    return rejected > max(LEAST_REJECTED, max_share * rows)


@dataclass
class SetRows:
    """Counts of the rows of one data set.

    read: the number of rows that were read.
    rejected: the number of rejected rows by reason.
    examples: the place and message of one row for each reason.
    """

    read: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Sequence[Sample | RejectedRow]) -> "SetRows":
        """Counts the encoded rows of one data set."""
        counts = cls(len(results))
        for row in results:
            if isinstance(row, RejectedRow):
                counts.reject(row.reason, row.source, row.message)
        return counts

    def reject(self, reason: str, source: str, message: str) -> None:
        """Counts one rejected row."""
        self.rejected[reason] += 1
        self.examples.setdefault(reason, f"{source}: {message}")

    def add(self, counts: Mapping[str, Any]) -> None:
        """Adds the counts of other rows of the data set, as `to_json` returned them."""
        self.read += counts["read"]
        self.rejected.update(counts["rejected"])
        self.examples = {**counts["examples"], **self.examples}

    def to_json(self) -> dict[str, Any]:
        """Returns the counts as plain JSON, for the commit of a window."""
        return {"read": self.read, "rejected": dict(self.rejected), "examples": self.examples}

    @property
    def reasons(self) -> str:
        """The reasons of rejection in one line, each with an example."""
        shown = self.rejected.most_common(SHOWN_REASONS)
        text = "; ".join(f"{count:,} {reason}, such as {self.examples[reason]}" for reason, count in shown)
        hidden = len(self.rejected) - len(shown)
        return f"{text}; and {hidden} other reasons" if hidden else text

    def check(self, name: str, rows: int, max_share: float) -> None:
        """Raises UserError where more rows are rejected than a job allows. rows: the number of rows of the data
        set."""
        if too_many(rejected := self.rejected.total(), rows, max_share):
            raise UserError(
                f"{name}: {rejected:,} of {counted(rows, 'row')} are rejected, {rejected / rows:.1%}, where "
                f"data.max_rejected_share allows {max_share:.1%}: {self.reasons}. Mend the rows or the settings; or "
                "raise data.max_rejected_share, then the same command continues"
            )

    def check_some_good(self, name: str) -> None:
        """Raises UserError where rows were read and all of them are rejected."""
        if self.read and self.rejected.total() == self.read:
            raise UserError(
                f"{name}: none of its first rows can be used, {self.read:,} looked at: {self.reasons}. Mend the rows "
                "or the settings; with data.max_rejected_share: 1 all of them may be rejected"
            )
