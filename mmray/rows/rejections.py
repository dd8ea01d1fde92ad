"""How many rows of a set may be rejected: a few odd ones always, and a share (`data.max_rejected_share`).

More are no odd rows but a wrong column, image root or capacity, and what is packed is not what its owner meant. Windows
count their rows by set, so a set is judged by sums, whatever the order in which its windows were made.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmray.errors import UserError
from mmray.rows.sample import RejectedRow, Sample

LEAST_REJECTED = 20
"""Rows of a set that may be rejected whatever their share."""

SHOWN_REASONS = 5


def too_many(rejected: float, rows: float, max_share: float) -> bool:
    """Whether so many rejected of all rows of a set are more than a job allows."""
    return rejected > max(LEAST_REJECTED, max_share * rows)


@dataclass
class SetRows:
    """The rows of one set. read: those that were looked at; rejected: by reason; examples: of each reason the place and
    the message of a row."""

    read: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Sequence[Sample | RejectedRow]) -> "SetRows":
        """Encoded rows of one set."""
        counts = cls(len(results))
        for row in results:
            if isinstance(row, RejectedRow):
                counts.reject(row.reason, row.source, row.message)
        return counts

    def reject(self, reason: str, source: str, message: str) -> None:
        """Count one rejected row."""
        self.rejected[reason] += 1
        self.examples.setdefault(reason, f"{source}: {message}")

    def add(self, counts: Mapping[str, Any]) -> None:
        """Add what `to_json` gave of other rows of the set."""
        self.read += counts["read"]
        self.rejected.update(counts["rejected"])
        self.examples = {**counts["examples"], **self.examples}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, for the commit of a window."""
        return {"read": self.read, "rejected": dict(self.rejected), "examples": self.examples}

    @property
    def reasons(self) -> str:
        """The reasons in one line, each with an example."""
        shown = self.rejected.most_common(SHOWN_REASONS)
        text = "; ".join(f"{count:,} {reason}, such as {self.examples[reason]}" for reason, count in shown)
        hidden = len(self.rejected) - len(shown)
        return f"{text}; and {hidden} other reasons" if hidden else text

    def check(self, name: str, rows: int, max_share: float) -> None:
        """Raise UserError where more rows of a set are rejected than a job allows. rows: all that the set has."""
        if too_many(rejected := self.rejected.total(), rows, max_share):
            raise UserError(
                f"{name}: {rejected:,} of {rows:,} rows are rejected, {rejected / rows:.1%}, where "
                f"data.max_rejected_share allows {max_share:.1%}: {self.reasons}. Mend the rows or the settings; or "
                "raise data.max_rejected_share, then the same command continues"
            )

    def check_some_good(self, name: str) -> None:
        """Raise UserError where rows were looked at and none is good."""
        if self.read and self.rejected.total() == self.read:
            raise UserError(
                f"{name}: none of its first rows can be used, {self.read:,} looked at: {self.reasons}. Mend the rows "
                "or the settings; with data.max_rejected_share: 1 all of them may be rejected"
            )
