"""What happened to a run: `history.jsonl`, one line an event, never rewritten.

`metrics.jsonl` has every step once, as it was finally done; here stands how it came to that: with how many workers,
from which checkpoints, after which losses of machines. One process at a time writes: rank 0, or the driver before it
starts any.

| event | besides `time`, `step`, `workers` |
| --- | --- |
| `start` | a new run begins |
| `resume` | `checkpoint`: the name of the one it continues from |
| `checkpoint` | `name`; `seconds`: how long the step loop was held up |
| `damaged_checkpoint` | `checkpoint`, `problem`: it is passed over |
| `preemption` | `nodes`: those that will go; `deadline`: when, or null |
| `continue_on` | `prepared`, `fingerprint`, `bins`: the data from the next step on |
| `finish` | the last step is done and its checkpoint whole |

`step` counts the steps done when it happened; `workers` the ranks, 0 where there were none yet.
"""

from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mmray.training.json_lines import JsonLines, read_json_lines

HISTORY_FILE = "history.jsonl"

Event = Literal["start", "resume", "checkpoint", "damaged_checkpoint", "preemption", "continue_on", "finish"]


def add_to_history(run: Path, event: Event, step: int, workers: int, **values: Any) -> None:
    """Append one event to the history of the run in folder `run`, with the time it is now."""
    time = datetime.now(UTC).isoformat(timespec="seconds")
    with closing(JsonLines(run / HISTORY_FILE)) as lines:
        lines.append({"time": time, "event": event, "step": step, "workers": workers} | values)


def read_history(run: Path) -> list[dict[str, Any]]:
    """The events of a run, in order; none where it has no history."""
    return read_json_lines(run / HISTORY_FILE)
