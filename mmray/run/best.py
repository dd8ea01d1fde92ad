"""The best checkpoint of a run, by the record that each checkpoint carries (`KeepBest` in `callbacks.json`)."""

from pathlib import Path

from mmray.run.callback_states import read_callback_states

KEEP_BEST = "KeepBest"
"""Name of the callback whose state is the record."""


def best_step(checkpoint: Path) -> int | None:
    """The step of the best evaluation so far, by the record in a checkpoint; None where it has none."""
    step = read_callback_states(checkpoint).get(KEEP_BEST, {}).get("step")
    return None if step is None else int(step)
