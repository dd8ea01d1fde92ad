"""The metrics file across a crash and a resumption."""

import json
from pathlib import Path

from mmray.training.metrics import MetricsLog, read_metrics


def test_steps_done_again_stand_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in range(1, 6):
        log.write(step, loss=1.0 / step, tokens=10)
    log.write(4, eval_loss=0.5)
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    assert [line["step"] for line in read_metrics(log.path)] == [1, 2, 3, 4, 5, 4]

    resumed = MetricsLog(tmp_path)
    resumed.truncate_after(3)
    resumed.write(4, loss=float("nan"), grad_norm=2.0)
    resumed.close()
    lines = [json.loads(line) for line in resumed.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[2] == {"step": 3, "loss": 1.0 / 3, "tokens": 10}
    assert lines[3] == {"step": 4, "loss": None, "grad_norm": 2.0}
    assert not list(tmp_path.glob("*.tmp"))


def test_tensorboard_mirrors_the_file(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path)
    log.write(1, loss=3.0)
    log.write(2, loss=2.0)
    log.truncate_after(1)
    log.write(2, loss=1.5)
    log.write(2, eval_loss=1.25)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 3.0), (2, 1.5)]
    assert [(event.step, event.value) for event in events.Scalars("eval/loss")] == [(2, 1.25)]
