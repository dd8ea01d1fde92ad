"""That the judge of all faults sees what is wrong; a run that meets several is in tests/jobs/test_interrupts.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmray.schedule.schedule import Schedule
from tests.conftest import Inputs
from tests.faults import table
from tests.faults.machines import OneMachine
from tests.faults.runs import TrainingRun, furthest_loss
from tests.faults.table import Row


class _Batches:
    """A plan without its dataset."""

    def __init__(self) -> None:
        self.schedule = self.order = Schedule(10, 4, seed=1, fingerprint="f")
        self.dataset = range(10)


@pytest.fixture
def run(tmp_path: Path) -> TrainingRun:
    """A run whose files are written by hand: two epochs of ten bins, as scheduled."""
    inputs = Inputs(tmp_path, {}, {})
    run = TrainingRun(OneMachine(1, ""), inputs, tmp_path, "run")
    run.__dict__["batches"] = _Batches()
    run.run.mkdir(parents=True)
    write_trained(run, [scheduled(run, step) for step in range(6)])
    return run


def scheduled(run: TrainingRun, step: int) -> list[int]:
    return [number for number in run.batches.order.bins(step) if number is not None]


def write_trained(run: TrainingRun, bins: list[list[int]], first: int = 1) -> None:
    with (run.run / "trained.jsonl").open("a") as file:
        for step, each in enumerate(bins, start=first):
            file.write(json.dumps({"step": step, "data": "f", "workers": 2, "bins": [each[:2], each[2:]]}) + "\n")


def test_a_run_as_scheduled_is_whole(run: TrainingRun) -> None:
    assert run.audit().lost == run.audit().doubled == 0
    assert run.epochs() == (2, 0)


def test_steps_that_are_done_again_count_once(run: TrainingRun) -> None:
    write_trained(run, [scheduled(run, step) for step in (4, 5)], first=5)
    assert run.audit() == replace(run.audit(), step=6, lost=0, doubled=0)
    assert run.epochs() == (2, 0)


def test_a_bin_that_is_lost_or_doubled_is_seen(run: TrainingRun) -> None:
    step = scheduled(run, 4)
    write_trained(run, [step[1:], scheduled(run, 5)], first=5)
    assert (run.audit().lost, run.audit().doubled) == (1, 0)
    assert run.epochs() == (2, 1)
    write_trained(run, [[*step, step[0]], scheduled(run, 5)], first=5)
    assert (run.audit().lost, run.audit().doubled) == (0, 1)
    assert run.epochs() == (2, 1)
    write_trained(run, [[scheduled(run, 3)[0], *step[1:]], scheduled(run, 5)], first=5)
    assert (run.audit().lost, run.audit().doubled) == (1, 1)
    assert run.epochs() == (2, 2)


def test_a_step_that_is_missing_is_seen(run: TrainingRun) -> None:
    write_trained(run, [scheduled(run, 7)], first=8)
    with pytest.raises(AssertionError, match="step 8 follows 6"):
        run.audit()


def test_losses_are_compared_step_by_step() -> None:
    lines = [{"step": step, "loss": 2.0} for step in (1, 2)]
    assert furthest_loss(lines, lines) == 0
    assert furthest_loss(lines[:1], lines) == 0
    assert furthest_loss([lines[0], {"step": 2, "loss": 2.2}], lines) == pytest.approx(0.1)
    with pytest.raises(AssertionError):
        furthest_loss([{"step": 2, "loss": 2.0}], lines)


def test_rows_are_written_between_the_marks_and_read_again(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\n{table.END}\nafter\n")
    one, two = Row("a dies", "kill -9 | again", 0, 0, "3 steps", "fine"), Row("b", "x", 1, 0, "", "FAILED: lost")
    table.write([one], page)
    table.write([two], page)
    table.write([replace(one, outcome="better")], page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert table.read(text.split(table.BEGIN)[1].split(table.END)[0]) == [replace(one, outcome="better"), two]
    assert [row.holds for row in (one, two)] == [True, False]


def test_the_page_has_a_row_for_each_fault_and_all_were_survived() -> None:
    from tests.faults.__main__ import NAMES

    text = table.PAGE.read_text()
    rows = table.read(text.split(table.BEGIN)[1].split(table.END)[0])
    assert {row.fault for row in rows} <= set(NAMES)
    assert all(row.holds for row in rows)
