"""Files that are appended to survive their writers, and tell what counts."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import pytest

from mmray.run.history import HISTORY_FILE, add_to_history, read_history
from mmray.training.bins_log import TRAINED_FILE, TrainedStep, read_trained
from mmray.training.json_lines import JsonLines


def step(number: int, *bins: list[int]) -> TrainedStep:
    return TrainedStep(number, "3f2a", len(bins), list(bins))


def append(run: Path, *steps: TrainedStep) -> None:
    lines = JsonLines(run / TRAINED_FILE)
    for each in steps:
        lines.append(asdict(each))
    lines.close()


def test_what_is_done_again_replaces_all_that_came_after(tmp_path: Path) -> None:
    """Two workers did steps 1 to 4 and died; three went on from the checkpoint of step 2, and did step 3."""
    append(tmp_path, step(1, [0], [1]), step(2, [2], [3]), step(3, [4], [5]), step(4, [6], [7]))
    again = step(3, [4], [5], [])
    append(tmp_path, again)
    assert read_trained(str(tmp_path)) == [step(1, [0], [1]), step(2, [2], [3]), again]
    assert again.all_bins == [4, 5]
    append(tmp_path, step(4, [7], [6], []))
    assert [each.workers for each in read_trained(tmp_path)] == [2, 2, 3, 3]


def test_a_torn_line_is_cut_off_by_the_next_writer(tmp_path: Path) -> None:
    append(tmp_path, step(1, [0]))
    path = tmp_path / TRAINED_FILE
    with path.open("a") as file:
        file.write('{"step": 2, "da')
    assert read_trained(str(tmp_path)) == [step(1, [0])]
    append(tmp_path, step(2, [1]))
    assert read_trained(str(tmp_path)) == [step(1, [0]), step(2, [1])]
    assert path.read_text().count("\n") == 2


@pytest.mark.parametrize("torn", [b"", b'{"step": 1'])
def test_a_file_without_a_whole_line_is_empty(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / TRAINED_FILE).write_bytes(torn)
    assert read_trained(tmp_path) == []
    append(tmp_path, step(1, [0]))
    assert read_trained(str(tmp_path)) == [step(1, [0])]


def test_history_is_appended_with_the_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert read_history(run) == []
    add_to_history(run, "start", 0, 2)
    add_to_history(run, "checkpoint", 5, 2, name="checkpoint_00000005", seconds=0.25)
    start, checkpoint = read_history(run)
    assert (start["event"], start["step"], start["workers"]) == ("start", 0, 2)
    assert (checkpoint["name"], checkpoint["seconds"]) == ("checkpoint_00000005", 0.25)
    assert datetime.fromisoformat(start["time"]).utcoffset() is not None
    assert (run / HISTORY_FILE).read_text().count("\n") == 2
