"""A run's folder in an object store: records that reach every process, checkpoints that come back whole."""

import json
import logging
from pathlib import Path

import pytest

from mmray.report import Run
from mmray.run import folder as run_folder
from mmray.run.checkpoints import Scratch, checkpoint_names, newest_looking_whole, newest_whole, prune
from mmray.run.folder import RunFolder
from mmray.run.history import add_to_history, read_history
from mmray.run.warnings import keep_warnings, read_warnings
from mmray.storage import Folder
from mmray.training.checkpoint import STATE_FILE
from mmray.training.json_lines import JsonLines, read_json_lines
from tests.mmray.run.test_checkpoints import Alone, write_checkpoint


@pytest.fixture(params=["local", "s3"])
def uri(request, tmp_path: Path) -> str:
    """An empty run's folder."""
    if request.param == "local":
        return str(tmp_path / "run")
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}/run"


def send(folder: Path, uri: str) -> None:
    """Put a folder where a run is, as Ray Train does with a checkpoint."""
    for path in folder.rglob("*"):
        if path.is_file():
            Folder(f"{uri}/{folder.name}").write(path.relative_to(folder).as_posix(), path.read_bytes())


def test_records_go_there_and_come_back_in_another_process(uri: str) -> None:
    writer = RunFolder(uri)
    assert read_history(writer.fetch()) == []
    add_to_history(writer.path, "start", 0, 2)
    lines = JsonLines(writer.path / "metrics.jsonl")
    lines.append({"step": 1, "loss": 2.0})
    (writer.path / "tensorboard").mkdir()
    (writer.path / "tensorboard" / "events").write_bytes(b"1")
    writer.publish()
    reader = RunFolder(uri)
    assert [event["event"] for event in read_history(reader.fetch())] == ["start"]
    lines.append({"step": 2, "loss": 1.0})
    writer.publish()
    assert [line["step"] for line in read_json_lines(reader.fetch() / "metrics.jsonl")] == [1, 2]
    assert (reader.path / "tensorboard" / "events").read_bytes() == b"1"
    assert Run(uri).last_step == 2
    next_one = RunFolder(uri)
    assert len(read_json_lines(next_one.fetch() / "metrics.jsonl")) == 2
    (next_one.path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    next_one.publish()
    assert len(read_json_lines(reader.fetch() / "metrics.jsonl")) == 1, "a run that resumes cuts its records back"


def test_records_are_published_by_themselves_and_at_the_end(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "PUBLISH_SECONDS", 0.05)
    writer, reader = RunFolder(uri), RunFolder(uri)
    writer.path.mkdir(exist_ok=True)

    def fail_after_writing() -> None:
        with writer.publishing():
            (writer.path / "metrics.jsonl").write_text("1\n")
            while not (reader.fetch() / "metrics.jsonl").exists():
                pass
            (writer.path / "metrics.jsonl").write_text("1\n2\n")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail_after_writing()
    assert (reader.fetch() / "metrics.jsonl").read_text() == "1\n2\n"


def test_warnings_of_many_processes_are_read_in_their_order(uri: str) -> None:
    RunFolder(uri).path.mkdir(exist_ok=True)
    handlers = [keep_warnings(RunFolder(uri).warnings) for _ in range(2)]
    try:
        logging.getLogger("mmray").warning("one")
        logging.getLogger("mmray").warning("two\nlines")
        logging.getLogger("mmray").warning("one")
    finally:
        for handler in handlers:
            logging.getLogger("mmray").removeHandler(handler)
    found = RunFolder(uri)
    lines = read_warnings(found.fetch() / "warnings.log")
    assert [line.split(" ", 3)[3] for line in lines] == ["one", "one", "two lines", "two lines"]
    found.publish()
    assert len(read_warnings(RunFolder(uri).fetch() / "warnings.log")) == 4, "they are not sent a second time"


def test_checkpoints_are_looked_at_without_their_contents_and_restored_whole(uri: str, tmp_path: Path) -> None:
    for step in (5, 10):
        send(write_checkpoint(tmp_path / "made", step), uri)
    run = RunFolder(uri)
    newest = newest_looking_whole(run)
    assert newest is not None
    assert newest.name == checkpoint_names(run)[0]
    Folder(uri).write("checkpoint_manager_snapshot.json", b"{}")
    assert len(checkpoint_names(run)) == 2, "what Ray Train keeps beside them is none"
    assert json.loads((newest / STATE_FILE).read_text())["step"] == 10
    scratch = None if run.shared_path else Scratch(tmp_path / "scratch", "node")
    restored = newest_whole(run, Alone(), lambda *_: None, scratch)
    assert restored is not None
    made = tmp_path / "made" / restored.name
    for path in made.rglob("*"):
        assert path.is_dir() or (restored / path.relative_to(made)).read_bytes() == path.read_bytes()


def test_a_damaged_checkpoint_is_passed_over_for_good(uri: str, tmp_path: Path) -> None:
    for step in (5, 10, 15):
        send(write_checkpoint(tmp_path / "made", step), uri)
    run = RunFolder(uri)
    newest, middle, oldest = checkpoint_names(run)
    largest = "deepspeed/shard-0.pt"
    content = bytearray(Folder(f"{uri}/{newest}").read(largest))
    content[0] ^= 1
    Folder(f"{uri}/{newest}").write(largest, bytes(content))
    told: list[str] = []
    scratch = None if run.shared_path else Scratch(tmp_path / "scratch", "node")
    restored = newest_whole(run, Alone(), lambda name, problem: told.append(f"{name}: {problem}"), scratch)
    assert restored is not None
    assert restored.name == middle
    assert told == [f"{newest}: {largest} was changed: its checksum is another"]
    assert checkpoint_names(RunFolder(uri)) == [middle, oldest]
    prune(run, keep=1)
    assert checkpoint_names(run) == [middle]
    send(write_checkpoint(tmp_path / "made", 20), uri)
    prune(run, keep=1)
    assert [name for name in Folder(uri).names() if "checkpoint" in name] == checkpoint_names(run)
    assert len(checkpoint_names(run)) == 1
