"""Logs of a run in an object store: sent in pieces, read back whole, whenever their writer dies."""

import json
import uuid
from pathlib import Path

import pytest

from mmray.run import log_pieces
from mmray.run.folder import RunFolder
from mmray.storage import Folder
from mmray.training.json_lines import JsonLines, replace_json_lines

LOG = "metrics.jsonl"
PIECE = 1000


class Store:
    """A store in memory that counts the bytes it takes and gives, and may break."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uri = f"memory://{uuid.uuid4().hex}/run"
        self.sent = self.read = 0
        self.writes_left: int | None = None
        write, read = Folder.write, Folder.read

        def counted_write(folder: Folder, name: str, data: bytes) -> None:
            if self.writes_left is not None:
                if not self.writes_left:
                    raise OSError("the process is killed")
                self.writes_left -= 1
            self.sent += len(data)
            write(folder, name, data)

        def counted_read(folder: Folder, name: str) -> bytes:
            data = read(folder, name)
            self.read += len(data)
            return data

        monkeypatch.setattr(Folder, "write", counted_write)
        monkeypatch.setattr(Folder, "read", counted_read)

    def content(self) -> bytes:
        """The log as a process that has never seen it reads it."""
        return (RunFolder(self.uri).fetch() / LOG).read_bytes()

    def names(self) -> list[str]:
        return Folder(self.uri).names()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(log_pieces, "PIECE_BYTES", PIECE)
    return Store(monkeypatch)


def line(step: int) -> dict[str, object]:
    return {"step": step, "loss": 1 / (step + 1), "text": "x" * (step % 37)}


def test_a_log_that_grows_is_sent_about_once(store: Store) -> None:
    """Sent whole each time, it would have been sent 100 times over."""
    writer, reader = RunFolder(store.uri), RunFolder(store.uri)
    lines = JsonLines(writer.fetch() / LOG)
    for step in range(600):
        lines.append(line(step))
        if step % 3 == 0:
            writer.publish()
            assert (reader.fetch() / LOG).read_bytes() == (writer.path / LOG).read_bytes()
    size = (writer.path / LOG).stat().st_size
    writer.publish()
    assert size > 30 * PIECE
    publications = 200
    assert store.sent < size + publications * (PIECE + 300)
    assert store.read < 1.1 * (size + publications * (PIECE + 300))
    assert store.names() == [LOG, *(f"{LOG}.from-{start:016d}" for start in range(PIECE, size, PIECE))]
    assert b"".join(Folder(store.uri).read(name) for name in store.names()) == (writer.path / LOG).read_bytes()


def test_a_short_log_is_one_file_of_its_name(store: Store) -> None:
    writer = RunFolder(store.uri)
    JsonLines(writer.fetch() / LOG).append(line(1))
    writer.publish()
    assert store.names() == [LOG]


def test_a_run_that_resumes_cuts_its_log_back(store: Store) -> None:
    first, reader = RunFolder(store.uri), RunFolder(store.uri)
    lines = JsonLines(first.fetch() / LOG)
    for step in range(200):
        lines.append(line(step))
    first.publish()
    assert (reader.fetch() / LOG).read_bytes() == (first.path / LOG).read_bytes()
    next_one = RunFolder(store.uri)
    path = next_one.fetch() / LOG
    sent = store.sent
    replace_json_lines(path, [line(step) for step in range(95)])
    next_one.publish()
    assert store.sent - sent < 2 * PIECE, "what is the same is not sent again"
    again = JsonLines(path)
    for step in range(95, 130):
        again.append(line(step) | {"workers": 3})
    next_one.publish()
    for content in (store.content(), (reader.fetch() / LOG).read_bytes()):
        assert content == path.read_bytes()
        assert [json.loads(text)["step"] for text in content.splitlines()] == list(range(130))


@pytest.mark.parametrize("writes", range(12))
def test_a_writer_that_dies_leaves_a_beginning_of_the_log(store: Store, writes: int) -> None:
    writer = RunFolder(store.uri)
    lines = JsonLines(writer.fetch() / LOG)
    for step in range(60):
        lines.append(line(step))
    writer.publish()
    before = store.content()
    for step in range(60, 180):
        lines.append(line(step))
    store.writes_left = writes
    try:
        writer.publish()
    except OSError:
        content = store.content()
        assert content.startswith(before[: len(before) // PIECE * PIECE])
        assert (writer.path / LOG).read_bytes().startswith(content)
        store.writes_left = None
        writer.publish()
    assert store.content() == (writer.path / LOG).read_bytes()


@pytest.mark.parametrize("writes", range(14))
def test_a_log_that_was_sent_whole_is_cut_without_a_moment_in_which_it_is_short(store: Store, writes: int) -> None:
    """Logs of earlier versions of mmray are one object, of any size."""
    whole = b"".join(json.dumps(line(step)).encode() + b"\n" for step in range(200))
    assert len(whole) > 9 * PIECE
    Folder(store.uri).write(LOG, whole)
    writer = RunFolder(store.uri)
    JsonLines(writer.fetch() / LOG).append(line(200))
    store.writes_left = writes
    try:
        writer.publish()
    except OSError:
        assert store.content().startswith(whole)
        store.writes_left = None
        later = RunFolder(store.uri)
        assert (later.fetch() / LOG).read_bytes().startswith(whole)
        writer.publish()
    assert store.content() == (writer.path / LOG).read_bytes()
    assert len(Folder(store.uri).read(LOG)) == PIECE


def test_what_is_no_log_goes_whole(store: Store, tmp_path: Path) -> None:
    writer = RunFolder(store.uri)
    (writer.fetch() / "best.json").write_bytes(b"7" * 3 * PIECE)
    writer.publish()
    assert store.names() == ["best.json"]
    assert (RunFolder(store.uri).fetch() / "best.json").read_bytes() == b"7" * 3 * PIECE
