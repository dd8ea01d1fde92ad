"""Warnings that are kept in a file: all of them, once, and never an error."""

import logging
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmray.run import warnings as kept_warnings
from mmray.run.warnings import LIBRARIES, keep_warnings, read_warnings

log = logging.getLogger("mmray")


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A file that this process keeps its warnings in."""
    before = list(log.handlers)
    keep_warnings(tmp_path / "warnings.log")
    yield tmp_path / "warnings.log"
    for handler in set(log.handlers) - set(before):
        log.removeHandler(handler)


def test_warnings_are_kept_and_nothing_else(path: Path) -> None:
    log.info("a note")
    assert not path.exists()
    assert read_warnings(path) == []
    log.warning("tile cache %s: full", "/disk")
    log.error("two\nlines")
    first, second = read_warnings(path)
    assert first.endswith(" tile cache /disk: full")
    assert second.endswith(" two lines")


def test_each_is_written_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_warnings, "MOST_WARNINGS", 3)
    for number in (0, 1, 0, 1, 2, 3, 4):
        log.warning("page %d", number)
    assert [line.split()[-1] for line in read_warnings(path)] == ["0", "1", "2"]


def test_those_of_an_earlier_run_are_not_read(path: Path) -> None:
    log.warning("old")
    size = path.stat().st_size
    assert read_warnings(path, size) == []
    log.warning("new")
    (line,) = read_warnings(path, size)
    assert line.endswith("new")


def test_a_warning_that_cannot_be_written_is_no_error(path: Path) -> None:
    path.mkdir()
    log.warning("lost")


def _warn(path: Path, name: str) -> None:
    keep_warnings(path)
    for number in range(50):
        log.warning("%s %d", name, number)


def test_processes_share_a_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_warn, args=(tmp_path / "w", name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    found = {tuple(line.split()[-2:]) for line in read_warnings(tmp_path / "w")}
    assert found == {(name, str(number)) for name in "abc" for number in range(50)}


def test_those_of_libraries_are_kept_where_asked_for(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' and DeepSpeed's, which decide numbers; not what they say in every run."""
    others = [logging.getLogger(name) for name in LIBRARIES]
    for other in others:  # other tests may have silenced them, as drivers do
        monkeypatch.setattr(other, "level", logging.WARNING)
        other.manager._clear_cache()  # type: ignore[attr-defined]
    for other in others:
        other.warning("in a process that does not ask")
    assert not path.exists()
    handler = keep_warnings(tmp_path / "worker.log", LIBRARIES)
    try:
        for other in (log, *others):
            other.warning("of %s", other.name)
        logging.getLogger("transformers.modeling_utils").warning("LOAD REPORT\n lm_head.weight | MISSING")
        logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If you have GPU or other accelerator, …")
    finally:
        for other in (log, *others):
            other.removeHandler(handler)
    lines = [line.split(" ", 3)[-1] for line in read_warnings(tmp_path / "worker.log")]
    assert lines == ["of mmray", "of transformers", "of DeepSpeed", "LOAD REPORT lm_head.weight | MISSING"]


def test_they_are_printed_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As Python does where a process, like an actor, has set up no logging."""
    process = multiprocessing.get_context("spawn").Process(target=_warn, args=(tmp_path / "w", "seen"))
    process.start()
    process.join(30)
    assert "seen 49" in capfd.readouterr().err
