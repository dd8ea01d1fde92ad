"""What the driver shows of a run and refuses of a job, without a cluster."""

import json
import logging
from pathlib import Path

import pytest
import yaml

from jobs.checks import check_outputs
from jobs.run_watch import RunWatch
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.run.folder import RunFolder
from mmray.run.history import add_to_history
from mmray.run.metrics import METRICS_FILE
from mmray.run.warnings import WARNINGS_FILE
from tests.mmray.config.test_docs_jobs import LEAST

LINE = {"step": 3, "loss": 1.5, "tokens": 100, "step_seconds": 1.0, "data_wait_seconds": 0.1}


def test_warnings_of_actors_are_counted_and_the_last_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Those of this run; not what an earlier one left."""
    warnings = tmp_path / WARNINGS_FILE
    warnings.write_text("an old one\n")
    with caplog.at_level(logging.WARNING, "mmray"), RunWatch("job", RunFolder(tmp_path), 3):
        with warnings.open("a") as file:
            file.write("one\ntwo\n")
        (tmp_path / METRICS_FILE).write_text(json.dumps(LINE) + "\n")
    assert "warnings: 2" in capsys.readouterr().err
    assert caplog.messages == [f"{warnings}: 2 warnings, the last: two"]


def test_a_run_without_warnings_says_nothing_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with RunWatch("job", RunFolder(tmp_path), 3):
        (tmp_path / METRICS_FILE).write_text(json.dumps(LINE) + "\n")
    assert "3/3 steps" in (shown := capsys.readouterr().err)
    assert "warnings" not in shown
    assert caplog.messages == []


def test_shares_of_a_mixture_are_those_of_the_last_100_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 150 steps, the first 50 of which had no texts; evaluations stand between them, and lines are long."""
    names = ["pages", "texts", *(f"small{number}" for number in range(60))]
    lines = []
    for step in range(1, 151):
        counts = dict.fromkeys(names, 0) | ({"pages": 8} if step <= 50 else {"pages": 4, "texts": 3, "small7": 1})
        lines.append(LINE | {"step": step, "bins_by_dataset": counts, "loss_by_set": dict.fromkeys(names, 1.23456)})
        lines.append({"step": step, "eval_loss": 1.0})
    with RunWatch("job", RunFolder(tmp_path), 150):
        (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = capsys.readouterr().err
    assert "last 100 steps: pages 50.0%, texts 37.5%, small7 12.5%" in shown
    with RunWatch("job", RunFolder(tmp_path), 151), (tmp_path / METRICS_FILE).open("a") as file:
        file.write(json.dumps(LINE | {"step": 151}) + "\n")
    assert "last 100 steps" not in capsys.readouterr().err, "a run that went on on one dataset"


def test_steps_are_read_wherever_the_last_bytes_begin(tmp_path: Path) -> None:
    """Also in the middle of a line, where a table of its own begins as a line does."""
    step = LINE | {"loss_by_set": {"0": 1.5}}
    (tmp_path / METRICS_FILE).write_text((json.dumps(step | {"step": 1}) + "\n") + (json.dumps(step) + "\n"))
    watch, length = RunWatch("job", RunFolder(tmp_path), 3), (tmp_path / METRICS_FILE).stat().st_size
    read = [[line["step"] for line in watch._steps(num_bytes)] for num_bytes in range(length + 2)]
    assert read == sorted(read, key=len)
    assert read[0] == []
    assert read[length - 1 : length + 2] == [[3], [1, 3], [1, 3]]


def test_what_happens_to_a_run_is_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Not what happened before, and no progress until the first new step: those before it may be done again."""
    add_to_history(tmp_path, "start", 0, 2)
    (tmp_path / METRICS_FILE).write_text(json.dumps(LINE) + "\n")
    with caplog.at_level(logging.INFO, "mmray"), RunWatch("job", RunFolder(tmp_path), 3):
        add_to_history(tmp_path, "damaged_checkpoint", 2, 2, checkpoint="checkpoint_2", problem="a file is missing")
        add_to_history(tmp_path, "resume", 1, 1, checkpoint="checkpoint_1")
        add_to_history(tmp_path, "preemption", 2, 1, nodes=["ab", "cd"], deadline=None)
        add_to_history(tmp_path, "checkpoint", 2, 1, name="checkpoint_2", seconds=0.1)
        add_to_history(tmp_path, "continue_on", 2, 1, prepared="/other", fingerprint="f", bins=7)
        add_to_history(tmp_path, "finish", 3, 1)
    assert caplog.messages == [
        "job: checkpoint_2 is damaged and passed over: a file is missing",
        "job: resumed from checkpoint_1 at step 1 with 1 worker",
        "job: nodes ab, cd will be taken away; a checkpoint is written at step 2",
        "job: from step 2 on it trains on /other, 7 bins",
        "job: finished 3 steps",
    ]
    assert "3/3 steps" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "setting", "value", "remedy"),
    [
        ("output", "run", "out/run", "that all nodes share"),
        ("data", "size_cache", "out/sizes", "that all nodes share"),
        ("resources", "tile_cache", {"folder": "out/tiles", "max_gigabytes": 1}, "on each node's own disk"),
    ],
)
def test_places_in_the_copy_of_a_submitted_checkout_are_refused(
    part: str, setting: str, value: object, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = yaml.safe_load(LEAST.replace("out/", f"{tmp_path}/"))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    check_outputs(Job.model_validate(content))
    here = str(Path.cwd())
    content[part][setting] = yaml.safe_load(yaml.safe_dump(value).replace("out/", f"{here}/out/"))
    with pytest.raises(UserError, match=rf"^{part}\.{setting}.* 'out/\w+' is relative: .*{remedy}$"):
        check_outputs(Job.model_validate(content))
