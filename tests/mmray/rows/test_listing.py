"""Files behind names: links followed, nothing left out without a word, brackets taken as people wrote them."""

import os
import socket
from itertools import count
from pathlib import Path

import fsspec
import pytest

from mmray.errors import UserError
from mmray.rows.files import source_files
from mmray.rows.listing import listed_files
from mmray.rows.plan import plan_chunks
from mmray.rows.read import read_piece
from mmray.rows.settings import DatasetSettings
from tests.mmray.oddities import ODD_ROWS, restored

fresh_names = count()


def names(pattern: object, root: Path) -> list[str]:
    return [os.path.relpath(path, root) for _, path, _ in listed_files(str(pattern))]


def ids(*patterns: str) -> list[str]:
    files = source_files([DatasetSettings(files=patterns, kind="pretrain")])
    chunks = plan_chunks(files, window_rows=64, chunk_rows=64)
    return [row.value["id"] for chunk in chunks for piece in chunk.pieces for row in read_piece(piece)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two plain files, a linked one, and a linked folder with one more."""
    for name in ("data", "store", "elsewhere"):
        (tmp_path / name).mkdir()
    for number, folder in enumerate(("data", "data", "store", "elsewhere")):
        (tmp_path / folder / f"part-{number}.jsonl").write_text(f'{{"id": "{number}", "text": "x"}}\n')
    (tmp_path / "data/part-2.jsonl").symlink_to("../store/part-2.jsonl")
    (tmp_path / "data/more").symlink_to("../elsewhere")
    return tmp_path


def test_links_to_files_and_folders_are_followed(shards: Path) -> None:
    assert ids(f"{shards}/data/*.jsonl") == ["0", "1", "2"]
    assert ids(f"{shards}/data/part-2.jsonl") == ["2"]
    assert ids(f"{shards}/data/*/*.jsonl") == ["3"]
    assert sorted(ids(f"{shards}/data/**/*.jsonl")) == ["0", "1", "2", "3"]
    assert sorted(ids(f"{shards}/data/**")) == ["0", "1", "2", "3"]


@pytest.mark.skipif(ODD_ROWS is None, reason="the shared data is not here")
def test_the_shards_that_people_linked_are_all_read(tmp_path: Path) -> None:
    root = restored("links", tmp_path)
    expected = [f"{file}-{row}" for file in range(4) for row in range(2)]
    for folder in ("data", "all", "store", "linkdir"):
        assert ids(f"{root}/{folder}/part-*.jsonl") == expected


def test_a_linked_file_is_known_by_the_state_of_what_it_leads_to(shards: Path) -> None:
    (before,) = source_files([DatasetSettings(files=f"{shards}/data/part-2.jsonl", kind="pretrain")])
    (shards / "store/part-2.jsonl").write_text('{"id": "another", "text": "y"}\n')
    (after,) = source_files([DatasetSettings(files=f"{shards}/data/part-2.jsonl", kind="pretrain")])
    assert before.size == 25
    assert (after.size, after.version) != (before.size, before.version)


@pytest.mark.parametrize("pattern", ["data/*.jsonl", "data/**/*.jsonl", "data/**", "data/broken.jsonl"])
def test_a_broken_link_is_an_error_that_names_it_and_where_it_leads(shards: Path, pattern: str) -> None:
    (shards / "data/broken.jsonl").symlink_to("../store/gone.jsonl")
    with pytest.raises(UserError, match=r"data/broken\.jsonl is a link to '\.\./store/gone\.jsonl', where nothing is"):
        listed_files(f"{shards}/{pattern}")
    assert names(f"{shards}/data/part*.jsonl", shards) == [f"data/part-{n}.jsonl" for n in range(3)]


@pytest.mark.parametrize("pattern", ["data/*/*.jsonl", "data/**/*.jsonl"])
def test_a_broken_link_that_may_have_led_to_a_folder_of_shards_is_an_error(shards: Path, pattern: str) -> None:
    (shards / "data/unmounted").symlink_to("/no/such/place")
    with pytest.raises(UserError, match=r"data/unmounted is a link to '/no/such/place'"):
        listed_files(f"{shards}/{pattern}")


def test_a_loop_is_an_error_that_names_it(shards: Path) -> None:
    (shards / "data/self.jsonl").symlink_to("self.jsonl")
    with pytest.raises(UserError, match=r"data/self\.jsonl: Too many levels of symbolic links"):
        listed_files(f"{shards}/data/*.jsonl")
    (shards / "data/self.jsonl").unlink()
    (shards / "elsewhere/back").symlink_to("../data")
    with pytest.raises(UserError, match=r"data/more/back leads back to a folder above it"):
        listed_files(f"{shards}/data/**/*.jsonl")
    assert ids(f"{shards}/data/*.jsonl") == ["0", "1", "2"]


def test_a_pipe_or_a_socket_is_an_error_that_names_it(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(shards / "data/pipe.jsonl")
    with pytest.raises(UserError, match=r"data/pipe\.jsonl is a pipe"):
        listed_files(f"{shards}/data/*.jsonl")
    (shards / "data/pipe.jsonl").unlink()
    monkeypatch.chdir(shards)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("data/s.jsonl")
        with pytest.raises(UserError, match=r"data/s\.jsonl is a socket"):
            listed_files(f"{shards}/data/*.jsonl")


def test_a_folder_says_what_to_write_instead(shards: Path) -> None:
    (shards / "data/readme.md").write_text("x")
    with pytest.raises(UserError, match=r"but a folder; name its files, such as .*/data/\*\.jsonl \(3\)$"):
        listed_files(f"{shards}/data")
    (shards / "scans").mkdir()
    for name in ("a.jpg", "a.txt", "b.JPG"):
        (shards / "scans" / name).touch()
    with pytest.raises(UserError, match=r"but a folder of \*\.jpg, \*\.txt; images and texts are not read as they are"):
        listed_files(f"{shards}/scans")
    (shards / "saved").mkdir()
    (shards / "saved/state.json").write_text("{}")
    with pytest.raises(UserError, match="set format: huggingface"):
        listed_files(f"{shards}/saved/")
    with fsspec.open(f"memory://folder-{next(fresh_names)}/rows/a.jsonl", "wb") as file:
        file.write(b"{}\n")
        place = file.path.rsplit("/", 1)[0]
    with pytest.raises(UserError, match=r"rows/\*\.jsonl \(1\)"):
        listed_files(f"memory://{place}")


def test_a_folder_that_a_glob_matches_is_left_out_with_a_warning(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (shards / "data/old.jsonl").mkdir()
    assert ids(f"{shards}/data/*.jsonl") == ["0", "1", "2"]
    (said,) = [record.message for record in caplog.records]
    assert f"folders are left out, such as {shards}/data/old.jsonl" in said


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_brackets_in_the_names_of_folders_and_files_are_taken_as_written(tmp_path: Path, scheme: str) -> None:
    root = f"{tmp_path}" if not scheme else f"memory://brackets-{next(fresh_names)}"
    if not scheme:
        (tmp_path / "scans [2024]/a[1]").mkdir(parents=True)
        (tmp_path / "scans 2").mkdir()
    for name in ("scans [2024]/a[1]/x.jsonl", "scans [2024]/a[1]/y[0].jsonl", "scans 2/z.jsonl", "p1.jsonl"):
        with fsspec.open(f"{root}/{name}", "wb") as file:
            file.write(f'{{"id": "{name}", "text": "x"}}\n'.encode())
    assert ids(f"{root}/scans [2024]/*/*.jsonl") == ["scans [2024]/a[1]/x.jsonl", "scans [2024]/a[1]/y[0].jsonl"]
    assert ids(f"{root}/scans [2024]/a[1]/y[0].jsonl") == ["scans [2024]/a[1]/y[0].jsonl"]
    assert ids(f"{root}/scans [2]/*.jsonl") == ["scans 2/z.jsonl"]
    assert ids(f"{root}/p[0-9].jsonl") == ["p1.jsonl"]


def test_a_file_called_like_a_glob_does_not_hide_the_others(shards: Path) -> None:
    (shards / "data/*.jsonl").write_text('{"id": "star", "text": "x"}\n')
    assert sorted(ids(f"{shards}/data/*.jsonl")) == ["0", "1", "2", "star"]


@pytest.mark.parametrize(
    ("second", "said"),
    [("data/part-0.jsonl", "is listed twice"), ("data/linked.jsonl", "are one file"), ("data/hard.jsonl", "one file")],
)
def test_a_file_that_has_two_names_in_a_set_is_told(
    shards: Path, second: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    (shards / "data/linked.jsonl").symlink_to("part-0.jsonl")
    (shards / "data/hard.jsonl").hardlink_to(shards / "data/part-0.jsonl")
    first = f"{shards}/data/part-0.jsonl"
    assert ids(first, first if second in first else f"{shards}/{second}") == ["0", "0"]
    (message,) = [record.message for record in caplog.records]
    assert said in message
    assert str(shards / "data/part-0.jsonl") in message


@pytest.mark.parametrize("name", ["a::b.jsonl", "file::c.jsonl", "per%20cent.jsonl", "a#b?.jsonl", "two\nlines.jsonl"])
def test_a_local_name_is_taken_as_written(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"id": "x", "text": "x"}\n')
    assert ids(f"{tmp_path}/{name}") == ids(f"{tmp_path}/*.jsonl") == ["x"]
