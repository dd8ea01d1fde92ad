"""What tests of reports share: hostile text, a run's folder."""

import json

from mmray.base.visible import visible
from mmray.packing.settings import PackingSettings
from mmray.run.history import HISTORY_FILE
from mmray.run.metrics import METRICS_FILE

HOSTILE = "</span><script>alert(1)</script><img src=x onerror=alert(2)>\"' {{ 7*7 }} &lt; \x1b"
PACKING = {"token_capacity": 300, "visual_capacity": 200, "window_rows": 16}


def packing(**changes):
    return PackingSettings(**PACKING | changes)


def page_text(text):
    """As a browser shows text of the data."""
    return visible(text)


def write_run(folder, steps, history=(), warnings="", **columns):
    folder.mkdir(exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        line = {
            "step": step, "epoch": step / 10, "loss": 5 - step / steps, "tokens": 1000, "trained_tokens": 400,
            "bins": 8, "lr": 1e-4, "grad_norm": 1.5, "step_seconds": 0.5, "data_wait_seconds": 0.25,
        }  # fmt: skip
        lines.append(line | {key: value(step) for key, value in columns.items()})
        if step % 4 == 0:
            lines.append({"step": step, "epoch": step / 10, "eval_loss": 6 - step / steps})
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if history:
        events = [{"time": f"2026-11-25T22:00:{number:02d}+00:00"} | event for number, event in enumerate(history)]
        (folder / HISTORY_FILE).write_text("".join(json.dumps(event) + "\n" for event in events))
    if warnings:
        (folder / "warnings.log").write_text(warnings)
    return folder


HISTORY = (
    {"event": "start", "step": 0, "workers": 2, "attention": {"text": "packed", "vision": "sdpa"}},
    {"event": "checkpoint", "step": 4, "workers": 2, "name": "checkpoint_4", "seconds": 1.25},
    {"event": "preemption", "step": 5, "workers": 2, "nodes": ["a", "b"], "deadline": None},
    {"event": "damaged_checkpoint", "step": 4, "workers": 0, "checkpoint": "checkpoint_5", "problem": HOSTILE},
    {"event": "resume", "step": 4, "workers": 3, "checkpoint": "checkpoint_4"},
    {"event": "checkpoint", "step": 8, "workers": 3, "name": "checkpoint_8", "seconds": 0.75},
    {"event": "finish", "step": 8, "workers": 3},
)
