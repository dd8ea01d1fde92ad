"""The description of a run for trackers: names, settings without secrets, the commit."""

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmray.base.settings import Settings

HIDDEN = "(hidden)"

_SECRET = re.compile(r"(^|_)(secret|password|passwd|token|api_?key|access_?key|credential|authorization)s?(_|$)", re.I)
"""Names of settings whose text is never shown.

`eos_token` and other tokens of a model are texts too, but no setting that names one is worth the risk.
"""

_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"\?[^\s?]*=\S*")


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers know it.

    name: that of the job; folder: that of the run; settings: the job's, without secrets; commit: that of the code, if
    known.
    """

    name: str
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None


def public_settings(settings: Settings) -> dict[str, Any]:
    """Settings as plain values that may be shown to others.

    Text under a name such as `password` is hidden, and so are the user and the query in an address, which hold keys:
    `https://(hidden)@host/pages.jsonl?(hidden)`.
    """
    public: dict[str, Any] = _public("", settings.model_dump(mode="json"))
    return public


def git_commit(folder: Path) -> str | None:
    """The commit checked out in a folder, with `-dirty` where files differ from it; None where there is no git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _public(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_public(name, inner) for inner in value]
    if not isinstance(value, str):
        return value
    if _SECRET.search(name):
        return HIDDEN
    if "://" in value:
        return _QUERY.sub(f"?{HIDDEN}", _USER_INFO.sub(f"{HIDDEN}@", value))
    return value
