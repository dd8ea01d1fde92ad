"""Logs in an object store, in pieces: a log that grows is sent from where it grew, not from its beginning.

A store cannot append. Sent whole every 15 s, a log of n bytes costs n² / 2 of traffic in its life: 10^6 steps at 300
bytes and 10 s a step, 100 TB. So a log is cut every PIECE_BYTES:

    metrics.jsonl                            bytes 0 to 1,048,575; the whole log of a short run
    metrics.jsonl.from-0000000001048576      the bytes from there on
    metrics.jsonl.from-0000000002097152      …

The log is all of them one after another (`cat metrics.jsonl metrics.jsonl.from-*`). Only the last grows. Pieces are
sent from the last to the first, and a reader stops at a gap and lets a piece replace what an earlier one has from its
beginning on: whenever a writer dies, a reader finds the log as it was or a beginning of it, also while a log that an
earlier version of mmray sent whole is cut for the first time.
"""

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from mmray.storage import FileState, Folder

PIECE_BYTES = 1 << 20
"""Size of all pieces but the last. It is in the names of pieces, so a run keeps it."""
_PIECE = re.compile(r"(?P<log>.+\.jsonl)(\.from-(?P<start>\d{16}))?")


def log_of(name: str) -> str | None:
    """The log that a file of a run's folder is a piece of; None where it is no piece of a log."""
    matched = _PIECE.fullmatch(name)
    return matched and matched["log"]


def start_of(name: str) -> int:
    """The first byte of a piece in its log."""
    matched = _PIECE.fullmatch(name)
    assert matched is not None
    return int(matched["start"] or 0)


def piece_name(log: str, number: int) -> str:
    """The name of a piece. number: counted from 0."""
    return f"{log}.from-{number * PIECE_BYTES:016d}" if number else log


@dataclass
class SentLog:
    """The pieces of one log that the store holds, as this process knows them."""

    fetched: dict[str, FileState] = field(default_factory=dict)
    """State of each piece as it was last read, by its name."""
    digests: dict[str, bytes] = field(default_factory=dict)
    """Digest of each piece that the store holds, by its name."""
    local: tuple[int, int] = (0, 0)
    """Inode and size of the local file when it was last sent: a file that is rewritten has another inode."""


def fetch_log(store: Folder, place: Path, pieces: dict[str, FileState], sent: SentLog) -> None:
    """Brings a local copy of a log up to date. pieces: states of its pieces in the store; place: the local file."""
    names = sorted(pieces, key=start_of)
    if sent.fetched == pieces and place.exists():
        return
    first = names[0]
    again = sent.fetched.get(first) != pieces[first] or not place.exists()  # it may have been cut from a whole log
    place.parent.mkdir(parents=True, exist_ok=True)
    end, read = 0, {}
    with os.fdopen(os.open(place, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        for name in names:
            start, state = start_of(name), pieces[name]
            if start > end:
                break
            if again or sent.fetched.get(name) != state:
                try:
                    content = store.read(name)
                except FileNotFoundError:  # the writer has cut its log back
                    break
                file.seek(start)
                file.write(content)
                sent.digests[name] = _digest(content)
                end = start + len(content)
            else:
                end = start + state.size
            read[name] = state
        file.truncate(end)
    sent.digests = {name: sent.digests[name] for name in pieces if name in sent.digests}
    sent.fetched = read


def publish_log(store: Folder, place: Path, log: str, sent: SentLog) -> None:
    """Sends what has changed of a log since it was last sent or fetched."""
    status = place.stat()
    inode, size = sent.local
    if (status.st_ino, status.st_size) == sent.local:
        return
    grew = inode == status.st_ino and size <= status.st_size
    pieces = max(1, -(-status.st_size // PIECE_BYTES))
    stale = [name for name in sent.digests if start_of(name) >= pieces * PIECE_BYTES]
    store.remove_files(sorted(stale, key=start_of, reverse=True))
    for name in stale:
        del sent.digests[name]
    with place.open("rb") as file:
        for number in reversed(range(size // PIECE_BYTES if grew else 0, pieces)):
            file.seek(number * PIECE_BYTES)
            content, name = file.read(min(PIECE_BYTES, status.st_size - number * PIECE_BYTES)), piece_name(log, number)
            if sent.digests.get(name) != (digest := _digest(content)):
                store.write(name, content)
                sent.digests[name] = digest
    sent.local = status.st_ino, status.st_size


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
