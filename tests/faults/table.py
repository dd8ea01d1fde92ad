"""The table of faults: what was done, what was lost, doubled and done again, as docs/reliability.md shows it."""

from dataclasses import astuple, dataclass, fields
from pathlib import Path

from tests.faults.machines import ROOT

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


@dataclass(frozen=True)
class Row:
    """One fault. lost, doubled: bins of a training run, rows or windows of a prepare."""

    fault: str
    done: str
    lost: int
    doubled: int
    redone: str
    outcome: str
    """What happened; begins with "FAILED" where a promise was broken."""

    @property
    def holds(self) -> bool:
        """Whether it was survived as promised."""
        return self.lost == self.doubled == 0 and "FAILED" not in self.outcome


HEADINGS = ("fault", "what was done", "lost", "doubled", "done again", "outcome")


def markdown(rows: list[Row]) -> str:
    """The rows as a table."""
    assert len(HEADINGS) == len(fields(Row))
    lines = [HEADINGS, tuple("---:" if name in ("lost", "doubled") else "---" for name in HEADINGS)]
    lines += [tuple(str(value).replace("|", "\\|") for value in astuple(row)) for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(rows: list[Row], page: Path = PAGE) -> None:
    """Put rows into the page between its markers: in the place of those of the same name, new ones after them."""
    text = page.read_text()
    head, rest = text.split(BEGIN)
    old, tail = rest.split(END)
    kept = {row.fault: row for row in read(old)} | {row.fault: row for row in rows}
    page.write_text(f"{head}{BEGIN}\n{markdown(list(kept.values()))}{END}{tail}")


def read(table: str) -> list[Row]:
    """The inverse of `markdown`."""
    rows = []
    for line in table.strip().splitlines()[2:]:
        cells = [cell.strip().replace("\\|", "|") for cell in line.strip()[1:-1].split(" | ")]
        fault, done, lost, doubled, redone, outcome = cells
        rows.append(Row(fault, done, int(lost), int(doubled), redone, outcome))
    return rows
