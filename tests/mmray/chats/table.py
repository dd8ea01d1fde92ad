"""The table in docs/chats.md: which conversation each published template can write, as the tests show it.

`pytest tests/mmray/chats --write-chat-table` writes it there.
"""

from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs/chats.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"

Outcomes = dict[str, dict[str, str]]
"""Template -> row -> `right`, or why it is refused."""


def render(outcomes: Outcomes) -> str:
    """A row for each conversation, a column for each template; then why rows are refused."""
    rows = list(next(iter(outcomes.values())))
    names = list(outcomes)
    reasons = sorted({outcome for found in outcomes.values() for outcome in found.values() if outcome != "right"})
    numbers = {reason: number for number, reason in enumerate(reasons, start=1)}
    lines = [f"| row | {' | '.join(f'`{name}`' for name in names)} |", f"| --- |{' --- |' * len(names)}"]
    for row in rows:
        cells = [outcomes[name][row] for name in names]
        shown = ["right" if cell == "right" else f"refused ({numbers[cell]})" for cell in cells]
        lines.append(f"| `{row}` | {' | '.join(shown)} |")
    lines += ["", *(f"{number}. {reason.removeprefix('refused: ')}" for reason, number in numbers.items())]
    return "\n".join(lines) + "\n"


def in_docs() -> str:
    """The table as it stands in the docs."""
    return DOCS.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def write(table: str) -> None:
    """Put the table into the docs."""
    before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
    DOCS.write_text(before + BEGIN + table + END + rest.split(END)[1], encoding="utf-8")
