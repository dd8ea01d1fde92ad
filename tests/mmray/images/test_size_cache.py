"""Sizes that are kept: always those of the images as they are now, whatever became of the cache."""

import io
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmray.errors import RowError, UserError
from mmray.images import size_cache
from mmray.images.header import Measured, measured
from mmray.images.size_cache import FILE_NAME, SIZES, SizeCache, kept_sizes, merge_sizes, read_sizes
from tests.mmray.images.counted import CountedFileSystem
from tests.mmray.images.test_load import encoded, stored

SIZE = (70, 40)


@pytest.fixture
def pages(tmp_path: Path) -> list[str]:
    """Paths of pages of several sizes; the first is stored turned."""
    image, exif = stored(Image.new("RGB", SIZE), 6)
    image.save(tmp_path / "0.jpg", exif=exif)
    for number in (1, 2):
        Image.new("RGB", (number + 9, 5)).save(tmp_path / f"{number}.png")
    return [str(tmp_path / name) for name in ("0.jpg", "1.png", "2.png")]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The images that were opened."""
    seen: list[object] = []

    def watched(source: object, **options: Any) -> Measured:
        seen.append(source)
        return measured(source, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(size_cache, "measured", watched)
    return seen


def second(*tables: pa.Table, uri: str) -> SizeCache:
    """The cache of a process that starts after `tables` were merged."""
    merge_sizes(uri, tables)
    return SizeCache(read_sizes(uri))


# ------------------------------------------------------------ what is remembered


def test_a_second_prepare_opens_no_image(pages: list[str], opened: list[object], tmp_path: Path) -> None:
    first = SizeCache(read_sizes(str(tmp_path)))
    assert [first.image_size(page) for page in pages] == [SIZE, (10, 5), (11, 5)]
    assert opened == pages
    again = second(first.take_new(), uri=str(tmp_path))
    assert [again.image_size(page) for page in pages] == [SIZE, (10, 5), (11, 5)]
    assert opened == pages
    assert len(again.take_new()) == 0


def test_a_page_of_several_rows_is_opened_once(pages: list[str], opened: list[object]) -> None:
    cache = SizeCache(read_sizes("memory://nowhere"))
    for _ in range(3):
        assert cache.image_size(pages[0]) == SIZE
    assert opened == pages[:1]
    assert len(cache.take_new()) == 1
    assert len(cache.take_new()) == 0


def test_paths_in_any_form_are_one_image(
    pages: list[str], opened: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = SizeCache(read_sizes(str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    for form in (pages[0], Path(pages[0]), "0.jpg", "./0.jpg"):
        assert cache.image_size(form) == SIZE
    assert len(opened) == 1


def test_remote_images_are_only_asked_for_their_state(remote: CountedFileSystem, tmp_path: Path) -> None:
    for name in "ab":
        remote.contents[name], remote.etags[name] = encoded(Image.new("RGB", SIZE), "JPEG"), name
    cache = SizeCache(read_sizes(str(tmp_path)))
    for name in "ab":
        assert cache.image_size(f"counted://{name}") == SIZE
    assert len(remote.ranges) == 2
    again = second(cache.take_new(), uri=str(tmp_path))
    CountedFileSystem.num_stats = 0
    for name in "ab":
        assert again.image_size(f"counted://{name}") == SIZE
    assert len(remote.ranges) == 2
    assert CountedFileSystem.num_stats == 2


@pytest.mark.parametrize("kind", [bytes, io.BytesIO])
def test_images_that_lie_in_no_file_are_measured(kind: type, opened: list[object]) -> None:
    cache = SizeCache(read_sizes("memory://nowhere"))
    for _ in range(2):
        assert cache.image_size(kind(encoded(Image.new("RGB", SIZE)))) == SIZE
    assert len(opened) == 2
    assert len(cache.take_new()) == 0


def test_a_file_system_without_times_is_asked_each_time(remote: CountedFileSystem) -> None:
    remote.contents["a"] = encoded(Image.new("RGB", SIZE), "JPEG")
    cache = SizeCache(read_sizes("memory://nowhere"))
    for _ in range(2):
        assert cache.image_size("counted://a") == SIZE
    assert len(remote.ranges) == 2
    assert len(cache.take_new()) == 0


# ------------------------------------------------------------ what has changed


def test_a_changed_file_is_measured_anew(pages: list[str], opened: list[object], tmp_path: Path) -> None:
    """By time, by size, and by both kept but the time's last nanosecond."""
    cache = SizeCache(read_sizes(str(tmp_path)))
    for page in pages:
        cache.image_size(page)
    again = second(cache.take_new(), uri=str(tmp_path))
    opened.clear()
    before = os.stat(pages[1])
    Image.new("RGB", (12, 5)).save(pages[1])
    assert os.stat(pages[1]).st_size == before.st_size
    os.utime(pages[1], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    before = os.stat(pages[2])
    Image.new("RGB", (600, 900)).save(pages[2])
    os.utime(pages[2], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [again.image_size(page) for page in pages] == [SIZE, (12, 5), (600, 900)]
    assert opened == pages[1:]
    third = second(again.take_new(), uri=str(tmp_path))
    assert len(read_sizes(str(tmp_path))) == 3, "the old entries are gone"
    assert [third.image_size(page) for page in pages] == [SIZE, (12, 5), (600, 900)]
    assert opened == pages[1:]


def test_a_changed_object_is_measured_anew(remote: CountedFileSystem, tmp_path: Path) -> None:
    remote.contents["a"], remote.etags["a"] = encoded(Image.new("L", (8, 9))), "old"
    cache = SizeCache(read_sizes(str(tmp_path)))
    assert cache.image_size("counted://a") == (8, 9)
    again = second(cache.take_new(), uri=str(tmp_path))
    remote.contents["a"], remote.etags["a"] = encoded(Image.new("L", (9, 8))), "new"
    assert again.image_size("counted://a") == (9, 8)
    assert cache.image_size("counted://a") == (9, 8)


def test_a_file_that_is_gone_is_missing(pages: list[str], tmp_path: Path) -> None:
    cache = SizeCache(read_sizes(str(tmp_path)))
    cache.image_size(pages[0])
    again = second(cache.take_new(), uri=str(tmp_path))
    Path(pages[0]).unlink()
    for each in (cache, again):
        with pytest.raises(RowError, match="image_missing"):
            each.image_size(pages[0])


def test_the_limit_of_pixels_holds_for_known_images(pages: list[str], tmp_path: Path) -> None:
    cache = SizeCache(read_sizes(str(tmp_path)))
    cache.image_size(pages[0])
    again = second(cache.take_new(), uri=str(tmp_path))
    assert again.image_size(pages[0], max_pixels=SIZE[0] * SIZE[1]) == SIZE
    with pytest.raises(RowError, match="image_too_large"):
        again.image_size(pages[0], max_pixels=SIZE[0] * SIZE[1] - 1)


@pytest.mark.parametrize(
    ("source", "reason"),
    [("http://host/a.jpg", "image_scheme"), ("a\0b.jpg", "image_unreadable"), ("none.jpg", "image_missing")],
)
def test_errors_are_those_of_image_size(source: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        SizeCache(read_sizes("memory://nowhere")).image_size(source)
    assert caught.value.reason == reason


def test_what_cannot_be_read_is_not_remembered(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    cache = SizeCache(read_sizes(str(tmp_path)))
    with pytest.raises(RowError, match="image_unreadable"):
        cache.image_size(tmp_path / "a.jpg")
    assert len(cache.take_new()) == 0


# ------------------------------------------------------------ the file

entries = st.tuples(
    st.integers(0, 5) | st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(1, 2**31 - 1),
    st.integers(1, 2**31 - 1),
)


def table(rows: list[tuple[int, int, int, int]]) -> pa.Table:
    return pa.table([list(column) for column in zip(*rows)] if rows else [[]] * 4, schema=SIZES)


def rows_of(found: pa.Table) -> list[tuple[int, ...]]:
    return [tuple(row.values()) for row in found.to_pylist()]


@given(st.lists(st.lists(entries, max_size=8), max_size=5))
@settings(max_examples=40, deadline=None)
def test_merging_keeps_the_last_entry_of_each_place(batches: list[list[tuple[int, int, int, int]]]) -> None:
    uri = "memory://size-cache/merged.parquet"
    size_cache.Folder("memory://size-cache").create()
    if size_cache.Folder("memory://size-cache").exists("merged.parquet"):
        size_cache.Folder("memory://size-cache").remove("merged.parquet")
    half = len(batches) // 2
    merge_sizes(uri, map(table, batches[:half]))
    expected = {row[0]: row for batch in batches for row in batch}
    assert merge_sizes(uri, map(table, batches[half:])) == len(expected)
    assert rows_of(read_sizes(uri)) == [expected[place] for place in sorted(expected)]


@pytest.mark.parametrize("name", ["", f"/{FILE_NAME}", "/other.parquet"])
@pytest.mark.parametrize("root", ["local", "memory://"])
def test_a_folder_or_a_file(root: str, name: str, tmp_path: Path) -> None:
    uri = f"{tmp_path / 'new' if root == 'local' else f'memory://{tmp_path.name}'}{name}"
    assert len(read_sizes(uri)) == 0
    assert merge_sizes(uri, [table([(1, 2, 3, 4)])]) == 1
    assert rows_of(read_sizes(uri)) == [(1, 2, 3, 4)]
    if not name:
        assert rows_of(read_sizes(f"{uri}/{FILE_NAME}")) == [(1, 2, 3, 4)]


def test_a_cache_of_an_unknown_kind_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="nosuch"):
        read_sizes("nosuch://bucket/sizes")


def test_nothing_new_writes_nothing(tmp_path: Path) -> None:
    assert merge_sizes(str(tmp_path / "sizes.parquet"), [table([])]) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge_sizes(str(tmp_path), [table([(1, 2, 3, 4)])])

    def fails(_: pa.Table, file: io.BytesIO) -> None:
        file.write(b"PAR1 half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", fails)
    with pytest.raises(OSError, match="No space"):
        merge_sizes(str(tmp_path), [table([(5, 6, 7, 8)])])
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert rows_of(read_sizes(str(tmp_path))) == [(1, 2, 3, 4)]


def test_it_travels_to_other_processes(pages: list[str], opened: list[object], tmp_path: Path) -> None:
    cache = SizeCache(read_sizes(str(tmp_path)))
    cache.image_size(pages[0])
    merge_sizes(str(tmp_path), [pickle.loads(pickle.dumps(cache.take_new()))])
    known = pickle.loads(pickle.dumps(read_sizes(str(tmp_path))))
    assert SizeCache(known).image_size(pages[0]) == SIZE
    assert len(opened) == 1


# ------------------------------------------------------------ damage

KEPT = [(place, place * 7, place + 1, place + 2) for place in range(50)]


def whole_file(tmp_path: Path) -> bytes:
    merge_sizes(str(tmp_path), [table(KEPT)])
    return (tmp_path / FILE_NAME).read_bytes()


@pytest.mark.parametrize("content", [b"", b"PAR1", b"something else"])
def test_a_damaged_file_is_a_warning_and_is_replaced(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with caplog.at_level(logging.WARNING, "mmray"):
        assert len(read_sizes(str(tmp_path))) == 0
    (record,) = caplog.records
    assert str(tmp_path / FILE_NAME) in record.getMessage()
    assert "measured anew" in record.getMessage()
    assert merge_sizes(str(tmp_path), [table([(1, 2, 3, 4)])]) == 1
    assert rows_of(read_sizes(str(tmp_path))) == [(1, 2, 3, 4)]


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_no_damage_gives_a_wrong_size(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    whole = whole_file(folder)
    changes = dict(data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)))
    end = data.draw(st.just(len(whole)) | st.integers(0, len(whole)))
    (folder / FILE_NAME).write_bytes(bytes(changes.get(at, byte) for at, byte in enumerate(whole[:end])))
    try:
        assert rows_of(read_sizes(str(folder))) in (KEPT, [])
    finally:
        (folder / FILE_NAME).unlink()


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.replace_schema_metadata({**found.schema.metadata, b"format_version": b"0"}),
        lambda found: found.replace_schema_metadata(None),
        lambda found: found.slice(1),
        lambda found: found.select(["place", "state", "height", "width"]),
        lambda found: found.set_column(2, SIZES.field(2), found["height"]),
    ],
)
def test_another_programs_file_is_not_used(change: object, tmp_path: Path) -> None:
    whole_file(tmp_path)
    path = tmp_path / FILE_NAME
    pq.write_table(change(pq.read_table(path)), path)  # type: ignore[operator]
    assert len(read_sizes(str(tmp_path))) == 0


# ---- Around a prepare ----

ONE_SIZE = pa.table([[1], [2], [3], [4]], schema=SIZES)


def measure_and_end(uri: str, error: BaseException) -> None:
    with kept_sizes(uri) as sizes:
        assert len(sizes.known) == 0
        sizes.add([ONE_SIZE])
        raise error


@pytest.mark.parametrize("error", [UserError("wrong"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_sizes_are_kept_whatever_ends_a_prepare(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        measure_and_end(str(tmp_path), error)
    with kept_sizes(str(tmp_path)) as sizes:
        assert sizes.known.equals(ONE_SIZE)


def test_a_size_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, "mmray"), kept_sizes(str(tmp_path / "file" / "cache")) as sizes:
        sizes.add([ONE_SIZE])
    assert "it stays as it was" in caplog.messages[-1]


def test_what_is_measured_is_kept_before_the_end_once_it_is_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a kill loses little; the larger the cache, the rarer it is written."""
    monkeypatch.setattr(size_cache, "KEPT_ROWS", 3)

    def sizes_of(first: int, count: int) -> pa.Table:
        numbers = range(first, first + count)
        columns = [
            pa.array([value] * count if value else numbers, field.type) for value, field in zip((0, 9, 5, 6), SIZES)
        ]
        return pa.table(columns, schema=SIZES)

    held = []
    with kept_sizes(str(tmp_path)) as sizes:
        for first in range(0, 80, 2):
            sizes.add([sizes_of(first, 2), sizes_of(0, 0)])
            held.append(len(read_sizes(str(tmp_path))))
        assert len(sizes.known) == 0
    assert held[:4] == [0, 4, 4, 8]
    assert len(set(held)) < 16, "80 images are not written 20 times"
    assert len(read_sizes(str(tmp_path))) == 80
