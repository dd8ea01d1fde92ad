"""The state of callbacks in a checkpoint: `callbacks.json`, an object with each callback's state by its name.

A checkpoint whose callbacks have no state has no such file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmray.errors import UserError

CALLBACKS_FILE = "callbacks.json"
KEEP_BEST = "KeepBest"
"""Name of the callback whose state is the record of the best evaluation (`best.py`)."""


def write_callback_states(folder: Path, states: Mapping[str, dict[str, Any]]) -> None:
    """Writes the states that are not empty into a checkpoint; no file where all are."""
    kept = {name: state for name, state in states.items() if state}
    if kept:
        (folder / CALLBACKS_FILE).write_text(json.dumps(kept, indent=1) + "\n")


def read_callback_states(folder: Path) -> dict[str, dict[str, Any]]:
    """The states in a checkpoint, by callback; none where it has no such file. Raises UserError where it cannot be
    read."""
    path = folder / CALLBACKS_FILE
    if not path.exists():
        return {}
    try:
        states: dict[str, dict[str, Any]] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; resume from another checkpoint") from error
    return states


def best_step(folder: Path) -> int | None:
    """The step of the run's best evaluation, by the record in a checkpoint; None where it has none."""
    step = read_callback_states(folder).get(KEEP_BEST, {}).get("step")
    return None if step is None else int(step)
