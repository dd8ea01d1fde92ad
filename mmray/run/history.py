"""The history of a run: `history.jsonl`, one line for each event, never rewritten.

`metrics.jsonl` has every step once, as it was finally done; the history tells how the run got there: with how many
workers, from which checkpoints, after which losses of machines. One process writes at a time: rank 0, or the driver
before it starts any worker.

Where it starts and is resumed, a run tells the attention of each part of its model (`attention`).
A run that trains on a mixture also tells its datasets and weights (`mixture`) where it starts and continues on others.

| event | besides `time`, `step`, `workers` |
| --- | --- |
| `start` | a new run begins; `total_steps`: of the whole run; `model`, `start_from`: the files that it begins with |
| `resume` | `total_steps`; `checkpoint`: that it continues from; `changed`: other settings than the checkpoint's |
| `checkpoint` | `name`; `seconds`: how long the step loop was held up |
| `damaged_checkpoint` | `checkpoint`, `problem`: it is passed over |
| `preemption` | `nodes`: those that will be taken away; `deadline`: when, or null |
| `first_loss` | `loss`, `problem`: that of the first step is not one of trained weights |
| `profile` | `file`: the trace of some steps, in the run's folder |
| `continue_on` | `prepared`, `fingerprint`, `bins`: the data from the next step on; `skipped_bins`: those left out |
| `stage` | `stage`, `stages`: the number of the stage that begins, of how many; `parts`: how each is trained |
| `stop` | `reason`: who or what asked the run to stop before its last step; all that is done is saved |
| `finish` | the last step is done and its checkpoint whole |

`step` is the number of steps done when it happened; `workers` the number of ranks, 0 where there were none yet.
"""

from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mmray.base.words import counted
from mmray.schedule.mixture import shares_at
from mmray.training.json_lines import JsonLines, read_json_lines

HISTORY_FILE = "history.jsonl"

Event = Literal[
    "start",
    "resume",
    "checkpoint",
    "damaged_checkpoint",
    "preemption",
    "first_loss",
    "profile",
    "continue_on",
    "stage",
    "stop",
    "finish",
]


def add_to_history(run: Path, event: Event, step: int, workers: int, **values: Any) -> None:
    """Appends one event, with the current time, to the history of the run in folder `run`."""
    time = datetime.now(UTC).isoformat(timespec="seconds")
    with closing(JsonLines(run / HISTORY_FILE)) as lines:
        lines.append({"time": time, "event": event, "step": step, "workers": workers} | values)


def read_history(run: Path) -> list[dict[str, Any]]:
    """The events of a run, in order; none where it has no history."""
    return read_json_lines(run / HISTORY_FILE)


def in_words(event: dict[str, Any]) -> str:
    """One line about an event for a person; "" for a checkpoint, because there are many."""
    step, workers = event["step"], counted(event["workers"], "worker")
    match event["event"]:
        case "start":
            adapter = f", from the adapter in {event['start_from']}" if "start_from" in event else ""
            return f"started with {workers}{adapter}" + _mixed(event, ", training on")
        case "resume":
            return f"resumed from {event['checkpoint']} at step {step} with {workers}{_changed(event)}"
        case "damaged_checkpoint":
            return f"{event['checkpoint']} is damaged and passed over: {event['problem']}"
        case "preemption":
            return f"nodes {', '.join(event['nodes'])} will be taken away; a checkpoint is written at step {step}"
        case "first_loss":
            return str(event["problem"])
        case "profile":
            return f"a trace of the steps up to {step} is in {event['file']}"
        case "continue_on":
            data = _mixed(event, "") or f" {event['prepared']}, {counted(event['bins'], 'bin')}"
            return f"from step {step} on it trains on{data}{_skipped(event.get('skipped_bins', 0))}"
        case "stage":
            parts = ", ".join(f"{part} {treated}" for part, treated in event["parts"].items())
            return f"stage {event['stage']} of {event['stages']} begins after step {step}: {parts}"
        case "stop":
            return f"stopped after step {step} ({event['reason']}); all that is done is saved"
        case "finish":
            reason = f": {event['reason']}" if event.get("reason") else ""
            return f"finished {counted(step, 'step')}{reason}"
    return ""


def _changed(event: dict[str, Any]) -> str:
    """The settings that a resumed run has otherwise than before, in words after a semicolon; "" for none."""
    pairs = event.get("changed", {}).items()
    texts = [f"{name} was {_value(before)}, is {_value(now)}" for name, (before, now) in pairs]
    return "".join(f"; {text}" for text in texts)


def _value(value: Any) -> str:
    return "not set" if value is None else str(value)


def _skipped(bins: int) -> str:
    """Words for the bins that a change of data skips; "" for none."""
    verb = "is" if bins == 1 else "are"
    return (
        f"; {counted(bins, 'bin')} left in a window of sorted batches {verb} not trained on this epoch" if bins else ""
    )


def _mixed(event: dict[str, Any], before: str) -> str:
    """The shares of a mixture in words, after `before`; "" where the event tells of none."""
    if "mixture" not in event:
        return ""
    datasets = event["mixture"]["datasets"]
    shares = shares_at(event["mixture"], [event["step"] + 1])[0]
    return (
        f"{before} "
        + ", ".join(f"{dataset['name']} {share:.4g}" for dataset, share in zip(datasets, 100 * shares))
        + " %"
    )
