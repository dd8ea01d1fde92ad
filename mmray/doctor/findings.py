"""Represents the outcomes of checks, and renders them for a person or a program."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

from rich import box
from rich.table import Table
from rich.text import Text

from mmray.errors import UserError


class Status(StrEnum):
    """The outcome of a check, in a word."""

    PASS = "pass"
    FAIL = "fail"
    NOT_APPLICABLE = "not applicable"


_STYLES = {Status.PASS: "green", Status.FAIL: "bold red", Status.NOT_APPLICABLE: "dim"}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check. detail: what was checked, with numbers; remedy: what to do after a failure."""

    check: str
    status: Status
    detail: str
    remedy: str = ""


def passed(check: str, detail: str) -> Finding:
    """Make the finding of a check that passed."""
    return Finding(check, Status.PASS, detail)


def failed(check: str, detail: str, remedy: str = "") -> Finding:
    """Make the finding of a check that failed."""
    return Finding(check, Status.FAIL, detail, remedy)


def not_applicable(check: str, why: str) -> Finding:
    """Make the finding of a check without anything to check, or that needs the result of a failed one."""
    return Finding(check, Status.NOT_APPLICABLE, why)


def failed_by(check: str, error: Exception) -> Finding:
    """Make the finding of a check that raised: a UserError by its message, another error with its type too."""
    if isinstance(error, UserError):
        return failed(check, str(error))
    return failed(check, f"{type(error).__name__}: {error}", "please report it, with the job file")


def guarded(check: str, run: Callable[[], Finding]) -> Finding:
    """Run a check. An error becomes a finding, so that the other checks still run."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001 (models, processors and pictures of any kind are tried)
        return failed_by(check, error)


def has_failed(findings: Sequence[Finding]) -> bool:
    """True when any check failed."""
    return any(finding.status is Status.FAIL for finding in findings)


def as_table(findings: Sequence[Finding]) -> Table:
    """All findings as a table for a terminal."""
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
    """All findings as JSON for a program."""
    return json.dumps({"ok": not has_failed(findings), "findings": [asdict(finding) for finding in findings]}, indent=1)
