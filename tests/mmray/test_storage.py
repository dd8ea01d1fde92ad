"""Folders by path or URI: files that are whole or not there, and the same words for every file system."""

from itertools import count

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mmray.errors import UserError
from mmray.rows.listing import listed_files
from mmray.storage import Folder, file_system

fresh_names = count()


@pytest.fixture(params=["local", "file://", "memory://"])
def folder(request, tmp_path) -> Folder:
    if request.param == "memory://":
        return Folder(f"memory://storage-{next(fresh_names)}/a/b")
    return Folder(f"{'file://' if request.param == 'file://' else ''}{tmp_path}/a/b")


def test_what_is_written_is_read(folder):
    folder.create()
    assert folder.exists() == folder.is_local, "object stores have no folders without files"
    folder.write("one", b"1")
    folder.write("deeper/two", b"2")
    assert folder.read("one") == b"1"
    with folder.open("deeper/two") as file:
        assert file.read() == b"2"
    assert folder.names() == ["deeper", "one"]
    assert folder.exists("one")
    assert not folder.exists("three")
    folder.write("one", b"new")
    assert folder.read("one") == b"new"
    assert folder.is_local == (not folder.uri.startswith("memory"))


def test_a_folder_that_is_not_there_has_no_names(folder):
    assert folder.names() == []
    assert not folder.exists()


def test_writing_needs_no_folder_before(folder):
    folder.write("one", b"1")
    assert folder.names() == ["one"]


def test_files_and_folders_are_removed(folder):
    folder.write("one", b"1")
    folder.write("two", b"2")
    folder.remove("one")
    assert folder.names() == ["two"]
    folder.remove()
    assert not folder.exists()


class Stopped(BaseException):
    """As a process that is told to stop in the middle."""


def write_half(folder, error):
    with folder.writing("file") as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, Stopped])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_block_that_fails_leaves_nothing_and_keeps_the_old_file(folder, error, before):
    folder.create()
    if before:
        folder.write("file", before)
    names = folder.names()
    with pytest.raises(error):
        write_half(folder, error)
    assert folder.names() == names
    assert before is None or folder.read("file") == before


def test_a_file_is_not_seen_before_it_is_whole(folder):
    folder.write("file", b"old")
    with folder.writing("file") as file:
        file.write(b"new" * 100_000)
        file.flush()
        assert folder.read("file") == b"old"
    assert folder.read("file") == b"new" * 100_000


def test_paths_are_those_of_the_file_system(tmp_path):
    folder = Folder(f"file://{tmp_path}/x")
    assert folder.path() == f"{tmp_path}/x"
    assert folder.path("a/b") == f"{tmp_path}/x/a/b"


def test_an_address_that_nothing_opens_is_an_error_of_the_user():
    with pytest.raises(UserError, match="nosuchscheme://x/y: this kind of address cannot be opened"):
        Folder("nosuchscheme://x/y").create()


@pytest.mark.parametrize("fails_at", ["opening", "asking"])
def test_an_error_of_any_stores_client_is_told_in_one_line(fails_at):
    """A client's own errors are of a class that no caller can know."""
    client_error = type("ConnectFailed", (Exception,), {"__module__": "somecloud.http"})

    class Store(MemoryFileSystem):
        protocol = "somecloud"
        cachable = False

        def __init__(self, **options):
            if fails_at == "opening":
                raise client_error("name or service\nnot known")
            super().__init__(**options)

        def info(self, path, **_):
            raise client_error("name or service\nnot known")

        find = glob = ls = info

    fsspec.register_implementation("somecloud", Store, clobber=True)
    for name in ("info", "exists", "isfile", "isdir"):
        with pytest.raises(ConnectionError, match=r"^name or service not known$"):
            getattr(file_system("somecloud://a/b")[0], name)("a/b")
    for pattern in ("somecloud://a/b.jsonl", "somecloud://a/*.jsonl"):
        with pytest.raises(UserError, match=r"^data files .*: name or service not known$"):
            listed_files(pattern)
