"""What a tracker is told, whatever happens to it and to the run. It is one that keeps a list in a file."""

import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from mmray.run.metrics import METRICS_FILE, MetricsLog, read_metrics
from mmray.run.tracking import TrackedRun, feed
from mmray.run.tracking.base import Tracker


@dataclass
class Listed:
    """A tracker and its settings: what it was told, over all starts of a run."""

    library: ClassVar[str] = "json"
    told: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    ids: list[str | None] = field(default_factory=list)
    closed: int = 0
    fails: str = ""
    """In which call it raises an error."""
    gate: threading.Event | None = None
    """What a call waits for."""

    def open(self, run: TrackedRun, run_id: str | None) -> tuple[Tracker, str]:
        if self.fails == "open":
            raise SystemExit("wrong key\nfor the service")
        self.ids.append(run_id)
        return self, run_id or "its id"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self.gate:
            self.gate.wait()
        if self.fails == "write":
            raise ConnectionError("network down")
        self.told.append((step, dict(values)))

    def close(self) -> None:
        self.closed += 1


def train(folder: Path, tracker: Listed, steps: range, *, kill: bool = False, scale: float = 1.0) -> None:
    """Log these steps, the first of them after a checkpoint. kill: without an end, when the tracker has them all."""
    starts = len(tracker.ids)
    log = MetricsLog(TrackedRun("test", folder), steps.start - 1, {"listed": tracker})
    for step in steps:
        log.write(step, loss=scale * step)
    if kill:
        deadline = time.monotonic() + 60
        while len(tracker.ids) == starts or max((step for step, _ in losses(tracker)), default=0) < steps.stop - 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    else:
        log.close()


def losses(tracker: Listed) -> list[tuple[int, float]]:
    return [(step, values["train/loss"]) for step, values in tracker.told]


def test_a_step_that_is_done_again_stands_once_as_it_was_first_told(tmp_path: Path) -> None:
    tracker = Listed()
    train(tmp_path, tracker, range(1, 8), kill=True)
    train(tmp_path, tracker, range(4, 6), scale=2.0, kill=True)  # dies again, before it is where it was
    train(tmp_path, tracker, range(3, 10), scale=3.0)
    assert losses(tracker) == [*((step, step) for step in range(1, 8)), (8, 24.0), (9, 27.0)]
    assert tracker.ids == [None, "its id", "its id"]
    assert tracker.closed == 1
    assert [line["loss"] for line in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, *(3.0 * n for n in range(3, 10))]


def test_an_evaluation_at_a_step_that_was_told_is_told_too(tmp_path: Path) -> None:
    tracker = Listed()
    train(tmp_path, tracker, range(1, 4), kill=True)
    log = MetricsLog(TrackedRun("test", tmp_path), 2, {"listed": tracker})
    log.write(3, loss=5.0)
    log.write(3, eval_loss=0.5)
    log.close()
    assert tracker.told[-1] == (3, {"eval/loss": 0.5})
    assert losses(Listed(tracker.told[:-1])) == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("call", ["open", "write"])
def test_one_that_fails_is_one_warning_and_is_made_up_for_at_the_next_start(
    call: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Listed()
    train(tmp_path, tracker, range(1, 3))
    tracker.fails = call
    with caplog.at_level(logging.WARNING, "mmray"):
        train(tmp_path, tracker, range(3, 6))
    assert [record.message for record in caplog.records] == [
        "tracking.listed: "
        + {"open": "SystemExit: wrong key for the service", "write": "ConnectionError: network down"}[call]
        + "; training goes on without it, and the next start of this run makes up for it"
    ]
    assert [line["step"] for line in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3, 4, 5]
    tracker.fails = ""
    train(tmp_path, tracker, range(6, 8))
    assert losses(tracker) == [(step, step) for step in range(1, 8)]
    assert not json.loads((tmp_path / "tracking" / "listed.json").read_text())["failed"]


def test_one_that_is_new_to_a_run_gets_all_of_it(tmp_path: Path) -> None:
    train(tmp_path, Listed(), range(1, 5))
    log = MetricsLog(TrackedRun("test", tmp_path), 3, {"other": (other := Listed())})
    log.write(4, loss=40.0)
    log.close()
    assert losses(other) == [(1, 1), (2, 2), (3, 3), (4, 40.0)]


def test_training_does_not_wait_for_one_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(feed, "CLOSE_SECONDS", 0.2)
    tracker = Listed(gate=threading.Event())
    with caplog.at_level(logging.WARNING, "mmray"):
        train(tmp_path, tracker, range(1, 50))
    assert "did not take all within 0 s" in caplog.text
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 49
    assert tracker.gate
    tracker.gate.set()


def test_one_that_is_too_slow_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(feed, "MOST_WAITING", 3)
    tracker = Listed(gate=threading.Event())
    with caplog.at_level(logging.WARNING, "mmray"):
        train(tmp_path, tracker, range(1, 50))
    assert len(caplog.records) == 1
    assert "is too slow" in caplog.text
    assert tracker.gate
    tracker.gate.set()


def test_half_a_memory_is_no_memory(tmp_path: Path) -> None:
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / "listed.json").write_text('{"id": "a", "st')
    tracker = Listed()
    train(tmp_path, tracker, range(1, 3))
    assert tracker.ids == [None]
    assert losses(tracker) == [(1, 1), (2, 2)]
