"""Files that are appended to survive their writers, and tell what counts."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import pytest

from mmray.run.history import HISTORY_FILE, add_to_history, read_history
from mmray.training import json_lines
from mmray.training.bins_log import TRAINED_FILE, TrainedLog, TrainedStep, read_trained
from mmray.training.json_lines import JsonLines, last_json_line, read_json_lines


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


def test_a_step_of_a_long_log_is_read_without_the_others(tmp_path: Path) -> None:
    """Also where steps were done again, after a crash, with other ranks."""
    log = JsonLines(tmp_path / TRAINED_FILE)
    for number in [*range(1, 9), *range(5, 12)]:
        log.append(step(number, [number], [10 * number]).to_json())
    found = TrainedLog(tmp_path)
    assert list(found.steps) == list(range(1, 12))
    assert [each.step for each in found] == list(range(1, 12))
    assert found.get(7) == step(7, [7], [70])
    assert found.get(12) is None
    assert found.get(0) is None
    assert len(TrainedLog(tmp_path / "nowhere")) == 0


@pytest.mark.parametrize("block", [1, 7, 1 << 16])
def test_the_end_of_a_file_is_found_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", block)
    path = tmp_path / "lines.jsonl"
    assert last_json_line(path) is None
    path.write_bytes(b'{"step": 1}')
    assert last_json_line(path) is None, "an incomplete line"
    path.write_bytes(b'{"step": 1}\n{"step": 22}\n{"st')
    assert last_json_line(path) == {"step": 22}
    JsonLines(path).append({"step": 23})
    assert read_json_lines(path) == [{"step": 1}, {"step": 22}, {"step": 23}]
    assert last_json_line(path) == {"step": 23}
