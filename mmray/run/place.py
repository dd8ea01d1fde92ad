"""The place of a run in its data, as a checkpoint carries it.

It is `cursor.json`, and `prepared.json` with the record that the cursor's fingerprint stands for.

A fingerprint alone can only show that two datasets differ. With the record of what was prepared beside it, a refusal
names the settings or files that differ.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmray.errors import UserError
from mmray.prepared.fingerprint import differences
from mmray.prepared.joined import PreparedMixture
from mmray.run.data import RunData
from mmray.schedule.balanced import BalancedSchedule
from mmray.schedule.cursor import Cursor
from mmray.schedule.mixture import mixture_differences
from mmray.schedule.order import Order

CURSOR_FILE = "cursor.json"
PREPARED_FILE = "prepared.json"

SHOWN_DIFFERENCES = 8


def write_place(folder: Path, cursor: Cursor, prepared: RunData) -> None:
    """Writes both files into a checkpoint. prepared: the dataset that the cursor belongs to."""
    cursor.write(folder / CURSOR_FILE)
    content = {
        "path": prepared.path,
        "fingerprint": prepared.fingerprint,
        "rows": prepared.statistics["rows_packed"],
        "record": prepared.record,
    }
    (folder / PREPARED_FILE).write_text(json.dumps(content, indent=1) + "\n")


def place_in(
    checkpoint: Path,
    schedule_at: Callable[[Cursor], Order | BalancedSchedule],
    prepared: RunData,
    *,
    continue_on: bool,
) -> Cursor:
    """The place in `prepared` at which a run that resumes from `checkpoint` continues.

    schedule_at: the order of `prepared` in a run that stands at the checkpoint's cursor.
    continue_on: whether the user wants data other than the checkpoint's, or other weights of a mixture, from here on.
    Without it, raises UserError that names both fingerprints, the settings that differ and the remedy. Other settings
    of the order are refused either way.
    """
    cursor = Cursor.read(checkpoint / CURSOR_FILE)
    schedule = schedule_at(cursor)
    if cursor.fingerprint == prepared.fingerprint:
        cursor.check(schedule)
        return cursor
    if not continue_on:
        raise UserError(_other_data(checkpoint, cursor, prepared))
    moved = cursor.continue_on(schedule, prepared.path)
    cursor.check_order(schedule)
    return moved


def _other_data(checkpoint: Path, cursor: Cursor, prepared: RunData) -> str:
    saved = _record_in(checkpoint)
    if cursor.mixture is not None and isinstance(prepared, PreparedMixture):
        lines = mixture_differences(cursor.mixture, prepared.mixture)
    elif saved is None:
        lines = ["(the checkpoint does not tell its settings)"]
    else:
        lines = differences(saved, prepared.record)
    if not lines:
        lines = ["the same settings and files, but other bins came of them: an image's size has changed"]
    hidden = len(lines) - SHOWN_DIFFERENCES
    shown = lines[:SHOWN_DIFFERENCES] + ([f"and {hidden} more"] if hidden > 0 else [])
    known = f" ({cursor.prepared})" if cursor.prepared else ""
    listed = "".join(f"\n  {line}" for line in shown)
    return (
        f"{checkpoint} was trained to step {cursor.step} on other data: its fingerprint is {cursor.fingerprint}"
        f"{known}, that of {prepared.path} is {prepared.fingerprint}; the difference:{listed}\n"
        f"{_remedy(cursor, prepared)}"
    )


def _remedy(cursor: Cursor, prepared: RunData) -> str:
    back = "Point output.prepared at the data of the checkpoint"
    if cursor.mixture is not None:
        back = "Put mixture and stages of the checkpoint back into the job file"
    if isinstance(prepared, PreparedMixture):
        return f"{back}; or, to train on with the job's mixture from here, give --continue-on mixture"
    return f"{back}; or, to train on with the other data from here, give --continue-on and its folder"


def _record_in(checkpoint: Path) -> dict[str, Any] | None:
    path = checkpoint / PREPARED_FILE
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())["record"]
    return record
