"""The table in docs/families.md: the registry's families, and what the tests that just ran show of each.

Each test marked `proves(claim)` speaks for the member of the zoo that it ran on. At the end of a run in which all of
them ran, the table they give is compared with the one in the docs, and `pytest tests/mmray/families
--write-family-table` writes it there.
"""

import inspect
from collections import defaultdict
from pathlib import Path

from mmray.families import FAMILIES, Family
from mmray.families.generic import Generic
from tests.mmray.families.zoo import ZOO, Member

DOCS = Path(__file__).parents[3] / "docs/families.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
CLAIMS = ("exact lengths", "pixels", "packing", "masks")

Outcomes = dict[tuple[str, str], list[str]]
"""(member, claim) -> the outcomes of its tests."""


def family_class(member: Member) -> type[Family]:
    """The registered class that serves a member."""
    return next((family for family in FAMILIES if _serves(family, member)), Generic)


def _serves(family: type[Family], member: Member) -> bool:
    by_processor = member.processor is None or member.processor in family.processor_classes
    return by_processor and member.model_type in family.model_types


def render(outcomes: Outcomes) -> str:
    """The table, a row for each member in the order of the registry."""
    lines = [
        "| model type | processor | lengths | pixels | packs | chat masks | how |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    by_family = defaultdict(list)
    for member in ZOO.values():
        by_family[family_class(member)].append(member)
    for family in (*FAMILIES, Generic):
        lines += [_row(family, member, outcomes) for member in by_family[family]]
    return "\n".join(lines) + "\n"


def _row(family: type[Family], member: Member, outcomes: Outcomes) -> str:
    cells = {claim: _cell(member, claim, outcomes.get((member.name, claim), [])) for claim in CLAIMS}
    if member.refuses and cells["packing"] == "yes":
        cells["packing"] = "no: one sample a row"
    if member.turns is None:
        cells["masks"] = "no chat template"
    name = f"any other (tried: `{member.model_type}`)" if family is Generic else f"`{member.name}`"
    processor = ", ".join(f"`{name}`" for name in family.processor_classes) or "any with an image token"
    how = " ".join((inspect.getdoc(family) or "").split("\n\n")[0].split())
    return f"| {name} | {processor} | {' | '.join(cells[claim] for claim in CLAIMS)} | {how} |"


def _cell(member: Member, claim: str, found: list[str]) -> str:
    needs = member.needs + (member.model_needs if claim == "packing" else ())
    if needs:  # the same table whether or not they are installed
        return f"with {', '.join(needs)}"
    return "yes" if found and set(found) == {"passed"} else "**no**"


def in_docs() -> str:
    """The table as it stands in the docs."""
    return DOCS.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def write(table: str) -> None:
    """Put the table into the docs."""
    before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
    DOCS.write_text(before + BEGIN + table + END + rest.split(END)[1], encoding="utf-8")
