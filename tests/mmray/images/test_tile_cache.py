"""Kept tiles: always those that rendering gives, in a folder that never outgrows its bound."""

import errno
import fcntl
import logging
import multiprocessing
import os
import time
from pathlib import Path

import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmray.errors import RowError, UserError
from mmray.images import TilePlan, TilingPolicy, plan_tiles, render_tiles, tile_cache
from mmray.images.tile_cache import TileCache
from tests.mmray.images.counted import CountedFileSystem
from tests.mmray.images.test_load import encoded
from tests.mmray.noise import noise

SIZE = (60, 90)
FIELDS = {"grid": (2, 3), "tile_size": (20, 24), "overview": (16, 16), "labels": True}
AMPLE = 1 << 30


def plan_of(**changes: object) -> TilePlan:
    return plan_tiles(SIZE, TilingPolicy.model_validate({**FIELDS, **changes}))


def values(tiles: list[Image.Image]) -> list[tuple[str, tuple[int, int], bytes]]:
    return [(tile.mode, tile.size, tile.tobytes()) for tile in tiles]


def entries(cache: TileCache) -> list[Path]:
    return sorted(cache.folder.glob("*/*"))


def num_bytes(cache: TileCache) -> int:
    return sum(path.stat().st_size for path in entries(cache))


def write_page(folder: Path, number: int) -> str:
    path = folder / f"{number}.jpg"
    path.write_bytes(encoded(noise(SIZE, number), "JPEG"))
    return str(path)


@pytest.fixture
def page(tmp_path: Path) -> str:
    return write_page(tmp_path, 0)


@pytest.fixture
def cache(tmp_path: Path) -> TileCache:
    return TileCache(tmp_path / "tiles", AMPLE)


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The images that were rendered, not found."""
    seen: list[object] = []

    def watched(source: object, plan: TilePlan, *, max_pixels: int) -> list[Image.Image]:
        seen.append(source)
        return render_tiles(source, plan, max_pixels=max_pixels)  # type: ignore[arg-type]

    monkeypatch.setattr(tile_cache, "render_tiles", watched)
    return seen


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert all("\n" not in message and "anew" in message for message in found)
    return found


# ------------------------------------------------------------ hits and misses


def test_a_page_is_rendered_once(cache: TileCache, page: str, rendered: list[object]) -> None:
    expected = values(render_tiles(page, plan_of()))
    for each in (cache, cache, TileCache(cache.folder, AMPLE)):
        assert values(each.render_tiles(page, plan_of())) == expected
    assert rendered == [page]
    assert len(entries(cache)) == 1


def test_images_in_rows_are_kept_by_their_bytes(cache: TileCache, rendered: list[object]) -> None:
    pages = [encoded(noise(SIZE, number), "PNG") for number in range(2)]
    for _ in range(2):
        for data in pages:
            assert values(cache.render_tiles(data, plan_of())) == values(render_tiles(data, plan_of()))
    assert rendered == pages


def test_remote_images_are_only_asked_for_their_state(cache: TileCache, remote: CountedFileSystem) -> None:
    remote.contents["a"], remote.etags["a"] = encoded(noise(SIZE), "JPEG"), "1"
    first = values(cache.render_tiles("counted://a", plan_of()))
    remote.ranges.clear()
    assert values(cache.render_tiles("counted://a", plan_of())) == first
    assert remote.ranges == []
    remote.contents["a"], remote.etags["a"] = encoded(noise(SIZE, 1), "JPEG"), "2"
    assert values(cache.render_tiles("counted://a", plan_of())) != first


CHANGES = [
    {"grid": (1, 3)},
    {"tile_size": (24, 20)},
    {"overview": None},
    {"overview": (17, 16)},
    {"overlap": 0.2},
    {"no_upscale": True},
    {"pad_color": (9, 9, 9)},
    {"reading_order": "rtl"},
    {"exact_pixels": True},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_whatever_changes_the_pixels_is_rendered_anew(
    change: dict[str, object], cache: TileCache, page: str, rendered: list[object]
) -> None:
    for plan in (plan_of(), plan_of(**change)):
        assert values(cache.render_tiles(page, plan)) == values(render_tiles(page, plan))
    assert len(rendered) == 2


def test_labels_change_no_pixels(cache: TileCache, page: str, rendered: list[object]) -> None:
    for labels in (True, False):
        cache.render_tiles(page, plan_of(labels=labels))
    assert len(rendered) == 1


def test_other_versions_render_anew(
    cache: TileCache, page: str, rendered: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PIL.__version__ in tile_cache._LIBRARIES
    cache.render_tiles(page, plan_of())
    monkeypatch.setattr(tile_cache, "_LIBRARIES", (*tile_cache._LIBRARIES[:-1], "newer"))
    cache.render_tiles(page, plan_of())
    assert len(rendered) == 2


def test_a_changed_file_is_rendered_anew(cache: TileCache, page: str) -> None:
    before = os.stat(page)
    old = values(cache.render_tiles(page, plan_of()))
    changed = bytearray(Path(page).read_bytes())
    changed[-30] ^= 1
    Path(page).write_bytes(changed)
    os.utime(page, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    new = values(cache.render_tiles(page, plan_of()))
    assert new == values(render_tiles(page, plan_of())) != old


def test_errors_are_those_of_rendering(cache: TileCache, page: str) -> None:
    cache.render_tiles(page, plan_of())
    with pytest.raises(RowError, match="image_too_large"):
        cache.render_tiles(page, plan_of(), max_pixels=SIZE[0] * SIZE[1] - 1)
    with pytest.raises(RowError, match="image_changed"):
        cache.render_tiles(page, plan_tiles((61, 90), TilingPolicy.model_validate(FIELDS)))
    Path(page).unlink()
    with pytest.raises(RowError, match="image_missing"):
        cache.render_tiles(page, plan_of())
    assert len(entries(cache)) == 1


def test_pages_that_are_not_cut_are_not_kept(cache: TileCache, page: str) -> None:
    plan = plan_tiles(SIZE, TilingPolicy())
    assert values(cache.render_tiles(page, plan)) == values(render_tiles(page, plan))
    assert entries(cache) == []


# ------------------------------------------------------------ damage and full disks


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_no_damage_gives_a_wrong_tile(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged-tiles"
    cache = TileCache(folder, AMPLE)
    page = encoded(Image.new("RGB", SIZE, (9, 99, 199)))
    expected = values(cache.render_tiles(page, plan_of()))
    (path,) = entries(cache)
    whole = path.read_bytes()
    changes = dict(data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)))
    end = data.draw(st.just(len(whole)) | st.integers(0, len(whole)))
    more = data.draw(st.just(b"") | st.binary(max_size=5))
    path.write_bytes(bytes(changes.get(at, byte) for at, byte in enumerate(whole[:end])) + more)
    for _ in range(2):
        assert values(cache.render_tiles(page, plan_of())) == expected
    assert path.read_bytes() == whole


def test_a_damaged_entry_is_a_warning_and_is_replaced(
    cache: TileCache, page: str, rendered: list[object], caplog: pytest.LogCaptureFixture
) -> None:
    cache.render_tiles(page, plan_of())
    (path,) = entries(cache)
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        cache.render_tiles(page, plan_of())
    assert len(rendered) == 2
    (message,) = warnings_of(caplog)
    assert str(path) in message


def test_the_entry_of_another_page_is_not_used(cache: TileCache, page: str, tmp_path: Path) -> None:
    cache.render_tiles(page, plan_of())
    (first,) = entries(cache)
    other = write_page(tmp_path, 1)
    cache.render_tiles(other, plan_of())
    (second,) = set(entries(cache)) - {first}
    second.write_bytes(first.read_bytes())
    assert values(cache.render_tiles(other, plan_of())) == values(render_tiles(other, plan_of()))


def test_a_full_disk_is_one_warning(
    cache: TileCache, rendered: list[object], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fill_file = tile_cache._fill

    def full(path: Path, entry: bytes) -> None:
        fill_file(path, entry[: len(entry) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    pages = [write_page(tmp_path, number) for number in range(3)]
    monkeypatch.setattr(tile_cache, "_fill", full)
    for page in pages:
        assert values(cache.render_tiles(page, plan_of())) == values(render_tiles(page, plan_of()))
    assert entries(cache) == [], "nothing half written stays"
    (message,) = warnings_of(caplog)
    assert "No space left" in message
    monkeypatch.setattr(tile_cache, "_fill", fill_file)
    cache.render_tiles(pages[0], plan_of())
    assert entries(cache) == [], "not tried again at once"
    monkeypatch.setattr(tile_cache.time, "monotonic", lambda: cache._store_again + 1)
    cache.render_tiles(pages[0], plan_of())
    assert len(entries(cache)) == 1
    assert len(rendered) == 5


def test_an_entry_that_cannot_be_read(
    cache: TileCache, page: str, rendered: list[object], caplog: pytest.LogCaptureFixture
) -> None:
    cache.render_tiles(page, plan_of())
    (path,) = entries(cache)
    path.unlink()
    path.mkdir()
    assert values(cache.render_tiles(page, plan_of())) == values(render_tiles(page, plan_of()))
    assert len(rendered) == 2
    assert len(warnings_of(caplog)) == 2, "reading it, and writing it anew"


def test_a_writer_that_dies_leaves_no_entry(
    cache: TileCache, page: str, rendered: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(Path, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            cache.render_tiles(page, plan_of())
    assert list(cache.folder.glob("*/*.tiles")) == []
    cache.render_tiles(page, plan_of())
    cache.render_tiles(page, plan_of())
    assert len(rendered) == 2


def test_a_folder_that_cannot_be_made_is_the_users_mistake(page: str) -> None:
    with pytest.raises(UserError, match="tile cache"):
        TileCache(f"{page}/tiles", AMPLE)


# ------------------------------------------------------------ the bound


def started_later(cache: TileCache, max_bytes: int) -> TileCache:
    """The cache of a process for which all that `cache` holds is from before."""
    for path in entries(cache):
        os.utime(path, (1000, 1000))
    return TileCache(cache.folder, max_bytes)


def entry_bytes(folder: Path, page: str) -> int:
    cache = TileCache(folder / "one", AMPLE)
    cache.render_tiles(page, plan_of())
    return num_bytes(cache)


def test_a_full_cache_keeps_what_this_process_uses(page: str, rendered: list[object], tmp_path: Path) -> None:
    """Half of the pages fit, and in each epoch just these are found."""
    cache = TileCache(tmp_path / "tiles", 3 * entry_bytes(tmp_path, page) + 500)
    pages = [write_page(tmp_path, number) for number in range(6)]
    for epoch in range(3):
        rendered.clear()
        for each in pages:
            cache.render_tiles(each, plan_of())
        assert num_bytes(cache) <= cache.max_bytes
        assert rendered == (pages if epoch == 0 else pages[3:])


def test_what_no_one_uses_makes_room_the_oldest_first(page: str, rendered: list[object], tmp_path: Path) -> None:
    old = TileCache(tmp_path / "tiles", AMPLE)
    pages = [write_page(tmp_path, number) for number in range(8)]
    for each in pages[:4]:
        old.render_tiles(each, plan_of())
    size = entry_bytes(tmp_path, page)
    cache = started_later(old, 4 * size + 500)
    cache.render_tiles(pages[0], plan_of())  # used again: not the oldest any more
    for each in pages[4:7]:
        cache.render_tiles(each, plan_of())
        assert num_bytes(cache) <= cache.max_bytes
    rendered.clear()
    for each in [pages[0], *pages[4:7]]:
        cache.render_tiles(each, plan_of())
    assert rendered == []


def test_an_entry_above_the_bound_removes_nothing(page: str, tmp_path: Path) -> None:
    old = TileCache(tmp_path / "tiles", AMPLE)
    old.render_tiles(page, plan_of())
    small = started_later(old, 10)
    small.render_tiles(write_page(tmp_path, 1), plan_of())
    assert len(entries(small)) == 1


@pytest.mark.parametrize("books", ["", "x", "-5", "99999999999999999999"])
def test_damaged_books_are_counted_anew(books: str, cache: TileCache, page: str, tmp_path: Path) -> None:
    cache.render_tiles(page, plan_of())
    (cache.folder / "booked").write_text(books)
    cache.render_tiles(write_page(tmp_path, 1), plan_of())
    assert int((cache.folder / "booked").read_text()) == num_bytes(cache)
    assert len(entries(cache)) == 2


def fill(folder: Path, max_bytes: int, pages: list[str]) -> None:
    cache = TileCache(folder, max_bytes)
    for page in pages:
        cache.render_tiles(page, plan_of())


def test_processes_together_keep_the_bound(page: str, tmp_path: Path) -> None:
    pages = [write_page(tmp_path, number) for number in range(12)]
    max_bytes = 5 * entry_bytes(tmp_path, page) + 500
    folder = tmp_path / "tiles"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fill, args=(folder, max_bytes, pages[k:] + pages[:k])) for k in (0, 4, 8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    cache = TileCache(folder, max_bytes)
    assert num_bytes(cache) <= max_bytes
    assert len(entries(cache)) >= 3
    for each in pages:
        assert values(cache.render_tiles(each, plan_of())) == values(render_tiles(each, plan_of()))


@given(uses=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=25), room=st.integers(0, 4))
@settings(max_examples=15, deadline=None)
def test_any_use_by_any_processes(
    uses: list[tuple[int, bool]], room: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Pages in any order, processes that begin at any time: right tiles, and never too many."""
    folder = tmp_path_factory.mktemp("uses")
    pages = [encoded(noise(SIZE, number), "PNG") for number in range(6)]
    expected = [values(render_tiles(page, plan_of())) for page in pages]
    max_bytes = room * 12_000
    cache = TileCache(folder / "tiles", max_bytes)
    for number, begins in uses:
        if begins:
            cache = started_later(cache, max_bytes)
        assert values(cache.render_tiles(pages[number], plan_of())) == expected[number]
        assert num_bytes(cache) <= max_bytes


def test_a_restart_keeps_what_the_process_before_it_used(page: str, rendered: list[object], tmp_path: Path) -> None:
    """The pages still to come of an interrupted epoch are those used longest ago."""
    room = 3 * entry_bytes(tmp_path, page) + 500
    pages = [write_page(tmp_path, number) for number in range(6)]
    first = TileCache(tmp_path / "tiles", room)
    for each in pages:
        first.render_tiles(each, plan_of())
    kept = entries(first)
    for path in kept:
        os.utime(path, (time.time() - 3600,) * 2)
    second = TileCache(first.folder, room)
    for each in pages:
        second.render_tiles(each, plan_of())
    assert entries(second) == kept


def test_nobody_waits_long_for_someone_who_makes_room(cache: TileCache, page: str, tmp_path: Path) -> None:
    cache.render_tiles(page, plan_of())
    other = write_page(tmp_path, 1)
    with (cache.folder / "booked").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert values(cache.render_tiles(other, plan_of())) == values(render_tiles(other, plan_of()))
        assert len(entries(cache)) == 1
    cache.render_tiles(other, plan_of())
    assert len(entries(cache)) == 2
