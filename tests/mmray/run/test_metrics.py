"""The metrics file across a crash and a resumption."""

import json
from pathlib import Path

from mmray.run.metrics import METRICS_FILE, MetricsLog, read_metrics
from mmray.run.tracking import TrackedRun


def test_steps_done_again_stand_once(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    log = MetricsLog(TrackedRun("test", tmp_path), 0)
    for step in range(1, 6):
        log.write(step, loss=1.0 / step, tokens=10)
    log.write(4, eval_loss=0.5)
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5, 4]

    resumed = MetricsLog(TrackedRun("test", tmp_path), 3)
    resumed.write(4, loss=float("nan"), grad_norm=2.0)
    resumed.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[2] == {"step": 3, "loss": 1.0 / 3, "tokens": 10}
    assert lines[3] == {"step": 4, "loss": None, "grad_norm": 2.0}
    assert not list(tmp_path.glob(".*"))


def test_tensorboard_mirrors_the_file(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(TrackedRun("test", tmp_path), 0)
    log.write(1, loss=3.0)
    log.write(2, loss=2.0)
    log.close()
    log = MetricsLog(TrackedRun("test", tmp_path), 1)
    log.write(2, epoch=0.5, loss=1.5)
    log.write(2, epoch=0.5, eval_loss=1.25)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert shown == {
        "train/loss": [(1, 3.0), (2, 1.5)],
        "train/epoch": [(2, 0.5)],
        "eval/loss": [(2, 1.25)],
        "eval/epoch": [(2, 0.5)],
    }
