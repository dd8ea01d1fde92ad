"""The numbers of a run by column: the same as of its lines, in few bytes a step."""

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmray.report import Run
from mmray.report.step_table import StepTable
from mmray.run.metrics import METRICS_FILE

LINES: list[dict[str, Any]] = [
    {"step": 1, "loss": 2.5, "lr": 1e-5},
    {"step": 2, "loss": None, "lr": 1e-5, "loss_by_set": {"a": 1.0, "b": None}},
    {"step": 2, "eval_loss": 2.25},
    {"step": 3, "loss": 2.0, "loss_by_set": {"b": 3.0, "c": 0.5}, "router_loss": 1.25},
]


def test_columns_are_those_of_the_lines(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"step": 4, "lo')
    run = Run(tmp_path)
    assert len(run.steps) == 3
    assert run.last_step == 3
    assert [line["eval_loss"] for line in run.evaluations] == [2.25]
    np.testing.assert_array_equal(run.column("loss"), [2.5, np.nan, 2.0])
    np.testing.assert_array_equal(run.column("lr"), [1e-5, 1e-5, np.nan])
    np.testing.assert_array_equal(run.column("router_loss"), [np.nan, np.nan, 1.25])
    np.testing.assert_array_equal(run.column("never"), [np.nan] * 3)
    by_set = run.columns_by_name("loss_by_set")
    assert list(by_set) == ["a", "b", "c"]
    np.testing.assert_array_equal(by_set["a"], [np.nan, 1.0, np.nan])
    np.testing.assert_array_equal(by_set["b"], [np.nan, np.nan, 3.0])
    assert run.metrics == LINES


def test_a_table_without_steps_is_false() -> None:
    table = StepTable()
    assert not table
    assert table.column("loss").shape == (0,)
    assert table.columns_by_name("loss_by_set") == {}


def test_a_step_takes_few_bytes() -> None:
    """10^6 steps of 13 numbers are to take 0.13 GB; as dictionaries they take 1.5."""
    steps, names = 20_000, [f"number_{number}" for number in range(12)]
    tracemalloc.start()
    try:
        table = StepTable()
        for step in range(steps):
            table.add({"step": step} | dict.fromkeys(names, step / 7))
        columns = [table.column(name) for name in names]
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held / steps < 13 * 8 * 1.2
    assert all(column[-1] == pytest.approx((steps - 1) / 7) for column in columns)
    with pytest.raises(ValueError, match="read-only"):
        columns[0][0] = math.pi
