"""Progress as lines of a log, now and then, and as a live bar in a terminal."""

import contextlib
import sys
from pathlib import Path

import pytest

from mmray.display import progress
from mmray.display.progress import LOG_SECONDS, ProgressBar

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def clock(monkeypatch):
    """The time, as a list of one number to change."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_at_the_start_now_and_then_and_at_the_end(clock, capsys):
    with ProgressBar("preparing train", "rows") as bar:
        for second in range(int(2.5 * LOG_SECONDS) + 1):
            clock[0] = 100.0 + second
            bar.update(second * 1000, 25_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "preparing train: 0/25,000 rows (0%) in 0 s",
        "preparing train: 10,000/25,000 rows (40%) in 10 s, 1,000 rows/s, 15 s left",
        "preparing train: 20,000/25,000 rows (80%) in 20 s, 1,000 rows/s, 5 s left",
        "preparing train: 25,000/25,000 rows (100%) in 25 s, 1,000 rows/s",
    ]


def test_a_log_has_no_line_twice_and_notes_at_its_end(clock, capsys):
    with ProgressBar("training", "steps") as bar:
        bar.update(3, 10, "loss 2.5")
        clock[0] += 2 * LOG_SECONDS
        bar.update(3, 10, "loss 2.5")
        bar.update(10, 10, "[done]")
        bar.update(10, 10, "[done]")
    assert capsys.readouterr().err.splitlines() == [
        "training: 3/10 steps (30%) in 0 s  loss 2.5",
        "training: 10/10 steps (100%) in 20 s, 0.35 steps/s  [done]",
    ]


def test_the_rate_forgets_a_slow_start_and_what_was_done_before(clock, capsys):
    with ProgressBar("training", "steps") as bar:
        bar.update(1000, 2000)  # by an earlier run
        clock[0] += 100  # until the first step
        for _ in range(300):
            clock[0] += 1
            bar.update(1000 + int((clock[0] - 200) * 2), 2000)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "training: 1,582/2,000 steps (79%) in 6:31, 2 steps/s, 3:29 left"
    )


def test_time_that_does_not_count_is_not_in_the_rate(clock, capsys):
    """Ten steps a second, and after each hundred of them half a minute of evaluation."""
    with ProgressBar("training", "steps") as bar:
        idle = 0.0
        for step in range(10, 310, 10):
            clock[0] += 1
            if step % 100 == 0:
                clock[0] += 30
                idle += 30
            bar.update(step, 1000, idle_seconds=idle)
    assert "10 steps/s, 1:10 left" in capsys.readouterr().err.splitlines()[-1]


def test_what_goes_on_from_an_earlier_place_begins_its_rate_anew(clock, capsys):
    with ProgressBar("training", "steps") as bar:
        for step in (90, 100, 50, 60):
            bar.update(step, 200)
            clock[0] += LOG_SECONDS
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "training: 50/200 steps (25%) in 20 s",
        "training: 60/200 steps (30%) in 30 s, 1 steps/s, 2:20 left",
    ]


def test_a_notebook_has_one_bar_that_is_replaced_in_place():
    """In a real kernel, drawn from another thread as the jobs do."""
    import nbformat
    from nbclient import NotebookClient

    code = """
import threading
from mmray.display.progress import ProgressBar

def work():
    for step in range(1, 11):
        bar.update(step, 10, "loss <2.5>")

with ProgressBar("training", "steps") as bar:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    (output,) = book.cells[0].outputs
    assert output.output_type == "display_data"
    page = output.data["text/html"]
    assert page.startswith('<progress max="1" value="1.0"></progress> training: 10/10 steps (100%)')
    assert page.endswith("loss &lt;2.5&gt;")
    assert "widget" not in str(output)


def test_nothing_to_do_is_done(capsys):
    with ProgressBar("preparing", "rows") as bar:
        bar.update(0, 0)
    assert "0/0 rows (100%)" in capsys.readouterr().err


def test_a_terminal_gets_a_bar_that_is_closed_after_an_error_too(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with contextlib.suppress(KeyboardInterrupt), ProgressBar("[x] training", "steps") as bar:
        bar.update(3, 10, "loss [/] 2.5")
        raise KeyboardInterrupt
    output = capsys.readouterr().err
    assert "[x] training" in output
    assert "3/10" in output
    assert "loss [/] 2.5" in output
    assert "\x1b[?25h" in output  # the cursor is shown again
