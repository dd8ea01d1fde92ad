"""Signals of a planned stop, as a process of its own gets them: what is asked of the run, and how the process ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROCESS = """
import sys, time
from pathlib import Path
from jobs.command_line import run_main, Stopped
from jobs.stopping import run_until_stopped
from mmray.run.folder import RunFolder

folder, begun, saves_after, limit = Path(sys.argv[1]), sys.argv[2] == "begun", float(sys.argv[3]), float(sys.argv[4])
run = RunFolder(folder)

def work():
    (folder / "working").touch()
    while run.asked_to_stop() is None:
        time.sleep(0.02)
    with (folder / "asked").open("a") as file:
        file.write(run.asked_to_stop())
    time.sleep(saves_after)
    (folder / "saved").touch()

def main() -> None:
    run_until_stopped(work, run, lambda: begun, limit)
    raise Stopped("stopped and saved")

sys.argv = sys.argv[:1]
run_main(main)
"""


@pytest.fixture
def process(tmp_path: Path):
    """Starts the process with: begun or not, seconds that saving takes, the limit."""
    started = []

    def start(begun: str, saves_after: float, limit: float) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), begun, str(saves_after), str(limit)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        wait_for(tmp_path / "working")
        return process

    yield start
    for each in started:
        each.kill()
        each.communicate()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_the_first_signal_asks_the_run_and_waits_for_it(process, tmp_path: Path, number: int, name: str) -> None:
    stopping = process("begun", 0.5, 60)
    stopping.send_signal(number)
    time.sleep(0.1)
    os.killpg(stopping.pid, number)  # a supervisor signals the process, and its group
    output, _ = stopping.communicate(timeout=60)
    assert stopping.returncode == 130
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "asked").read_text() == name
    assert output.splitlines() == ["stopped and saved"]


def test_the_second_ends_it_at_once(process, tmp_path: Path) -> None:
    stopping = process("begun", 600, 600)
    stopping.send_signal(signal.SIGINT)
    wait_for(tmp_path / "asked")
    time.sleep(1.2)
    stopping.send_signal(signal.SIGINT)
    output, _ = stopping.communicate(timeout=20)
    assert stopping.returncode == 130
    assert not (tmp_path / "saved").exists()
    assert output.splitlines() == ["interrupted; the same command continues"]


def test_it_waits_no_longer_than_the_limit(process, tmp_path: Path) -> None:
    stopping = process("begun", 600, 1)
    stopping.send_signal(signal.SIGTERM)
    output, _ = stopping.communicate(timeout=20)
    assert stopping.returncode == 130
    assert not (tmp_path / "saved").exists()
    first, last = output.splitlines()
    assert "took more than 1 s (training.stop_seconds)" in first
    assert last == "interrupted; the same command continues"


def test_before_workers_train_there_is_nothing_to_wait_for(process, tmp_path: Path) -> None:
    stopping = process("starting", 600, 600)
    stopping.send_signal(signal.SIGINT)
    output, _ = stopping.communicate(timeout=20)
    assert stopping.returncode == 130
    assert not (tmp_path / "asked").exists()
    assert output.splitlines() == ["interrupted; the same command continues"]
