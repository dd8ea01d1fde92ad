"""What a check found, and how a person or a program reads it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

from rich import box
from rich.table import Table
from rich.text import Text

from mmray.errors import UserError


class Status(StrEnum):
    """How a check went."""

    PASS = "pass"
    FAIL = "fail"
    NOT_APPLICABLE = "not applicable"


_STYLES = {Status.PASS: "green", Status.FAIL: "bold red", Status.NOT_APPLICABLE: "dim"}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check. remedy: what to do, of a failed one."""

    check: str
    status: Status
    detail: str
    remedy: str = ""


def passed(check: str, detail: str) -> Finding:
    """A check that found nothing wrong; detail: what it looked at, with numbers."""
    return Finding(check, Status.PASS, detail)


def failed(check: str, detail: str, remedy: str = "") -> Finding:
    """A check that found a mistake."""
    return Finding(check, Status.FAIL, detail, remedy)


def not_applicable(check: str, why: str) -> Finding:
    """A check with nothing to look at, or that needs what another one failed to give."""
    return Finding(check, Status.NOT_APPLICABLE, why)


def failed_by(check: str, error: Exception) -> Finding:
    """A check that an error ended: the user's mistake as it is worded, any other with its type."""
    if isinstance(error, UserError):
        return failed(check, str(error))
    return failed(check, f"{type(error).__name__}: {error}", "please report it, with the job file")


def guarded(check: str, run: Callable[[], Finding]) -> Finding:
    """What a check finds. Its errors are findings too: one of them must not cost the others."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001 (models, processors and pictures of any kind are tried)
        return failed_by(check, error)


def has_failed(findings: Sequence[Finding]) -> bool:
    """Whether any check failed."""
    return any(finding.status is Status.FAIL for finding in findings)


def as_table(findings: Sequence[Finding]) -> Table:
    """All findings for a terminal."""
    table = Table(show_edge=False, pad_edge=False, box=box.SIMPLE_HEAD)
    table.add_column("check")
    table.add_column("")
    table.add_column("found", overflow="fold")
    for finding in findings:
        text = Text(finding.detail)
        if finding.remedy:
            text.append(f"\n→ {finding.remedy}", "bold")
        word = "n/a" if finding.status is Status.NOT_APPLICABLE else finding.status
        table.add_row(Text(finding.check), Text(word, _STYLES[finding.status]), text)
    return table


def as_json(findings: Sequence[Finding]) -> str:
    """All findings for a program."""
    return json.dumps({"ok": not has_failed(findings), "findings": [asdict(finding) for finding in findings]}, indent=1)
