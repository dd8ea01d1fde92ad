"""Images in object storage are measured by many requests at a time: the same rows, in their order, and soon."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mmray.batches import render
from mmray.images import measure_ahead, render_tiles
from mmray.images.header import measured
from mmray.images.measure_ahead import AHEAD, MeasureAhead
from mmray.rows.image_refs import remote_images
from mmray.rows.read import RawRow
from mmray.rows.settings import DatasetSettings
from tests.mmray.pdfs import pdf_of
from tests.mmray.preparing import PACKING, Preparation, write_rows

DELAY = 0.02


class FarAway(MemoryFileSystem):
    """An object store in memory, which takes DELAY to open something. most: opened at a time."""

    protocol = "far"
    cachable = False
    lock = threading.Lock()
    now = most = 0

    def _open(self, path: str, mode: str = "rb", **options: object) -> object:
        if mode == "rb":
            with FarAway.lock:
                FarAway.now += 1
                FarAway.most = max(FarAway.most, FarAway.now)
            time.sleep(DELAY)
            with FarAway.lock:
                FarAway.now -= 1
        return super()._open(path, mode, **options)


@pytest.fixture
def store(pictures: Path) -> Iterator[str]:
    """The folder of 400 pictures far away, of four sizes, some of them missing or broken."""
    fsspec.register_implementation("memory", FarAway, clobber=True)
    try:
        system, names = FarAway(), ("page.png", "wide.png", "small.png")
        for number in range(400):
            if number % 10 == 3:
                continue
            content = b"no picture" if number % 10 == 7 else (pictures / names[number % 3]).read_bytes()
            system.pipe_file(f"/far-pages/{number}.png", content)
        FarAway.now = FarAway.most = 0
        yield "memory://far-pages"
    finally:
        fsspec.register_implementation("memory", MemoryFileSystem, clobber=True)
        MemoryFileSystem().rm("/far-pages", recursive=True)


def test_rows_are_those_of_asking_one_after_another(store: str, processors, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"id": str(number), "text": "<image> a page", "images": [f"{number}.png"]} for number in range(400)]
    rows = [RawRow(f"/rows.jsonl:{number}", 0, value) for number, value in enumerate(values)]
    rows[5] = RawRow("/rows.jsonl:5", 0, {"id": "5", "text": "<image><image>", "images": ["5.png", "6.png"]})
    job = Preparation(processors["qwen2_vl"], {"files": "x", "kind": "pretrain", "image_root": store})
    job.encoder.encode(rows[:2])
    results = {}
    for ahead in (AHEAD, 1):
        monkeypatch.setattr(measure_ahead, "AHEAD", ahead)
        results[ahead] = job.encoder.encode(rows)
    assert list(map(repr, results[AHEAD])) == list(map(repr, results[1]))
    assert {row.reason for row in results[1] if hasattr(row, "reason")} == {"image_missing", "image_unreadable"}
    assert FarAway.most == AHEAD  # requests at once; what that saves: benchmarks/bench_latency.py


def test_an_error_comes_at_its_images_turn_and_no_more_are_asked_for_than_the_window(store: str) -> None:
    asked = []

    def measure(source: str, **options: object):
        asked.append(source)
        if source.endswith("/5.png"):
            raise ConnectionError("the store is away")
        return measured(source, **options)

    sizes = MeasureAhead(measure, max_pixels=10**9, one_frame=False)
    uris = [f"{store}/{number}.png" for number in range(0, 400, 5)]
    sizes.expect([*uris, *uris])
    assert sizes(uris[0]).size == (170, 220)
    with pytest.raises(ConnectionError, match="away"):
        sizes(uris[1])
    assert sizes(uris[2]).size == sizes(uris[2]).size == (220, 170)
    assert len(asked) == len(set(asked)) <= AHEAD + 2
    sizes.expect([])
    assert sizes(uris[2]).size == (220, 170), "asked for when it is named"
    assert asked.count(uris[2]) == 2


def test_what_is_local_is_not_asked_for_early(tmp_path: Path) -> None:
    dataset = DatasetSettings(files="x", kind="pretrain")
    row = {"images": ["a.png", {"path": "b.png"}, b"bytes", 7]}
    assert remote_images(row, f"{tmp_path}/rows.jsonl:1", dataset) == []
    row["images"] = ["a.png", "s3://bucket/b.png"]
    assert remote_images(row, f"{tmp_path}/rows.jsonl:1", dataset) == ["s3://bucket/b.png"]
    assert remote_images({"images": ["a.png"]}, "s3://bucket/rows.jsonl:1", dataset) == ["s3://bucket/a.png"]
    assert remote_images({"images": ["../../a.png", "s3://x/b.png"]}, "/data/rows.jsonl:1", dataset) == []


def test_pages_of_far_pdfs_are_measured_and_rendered_by_many_requests(
    store: str, processors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what training gets is what one request after another gives, an image that is gone among them."""
    uris = []
    for number in range(40):
        content = Path(pdf_of(tmp_path / "one.pdf", [{"points": (90, 60 + number)}, {"points": (60, 60)}])).read_bytes()
        FarAway().pipe_file(f"/far-pages/{number}.pdf", content)
        uris.append(f"{number}.pdf#page={1 + number % 2}")
    row = {"id": "a", "text": "<image>" * 60, "images": [*uris, *(f"{n}.png" for n in range(0, 200, 10))]}
    packing = PACKING.model_copy(update={"token_capacity": 4096, "visual_capacity": 4096})
    rows = {"files": write_rows(tmp_path / "rows.jsonl", [row]), "kind": "pretrain", "image_root": store}
    job = Preparation(processors["qwen2_vl"], rows, packing=packing, tiling={"pdf_dpi": 72})
    prepared = job.write(tmp_path / "prepared")
    assert [(image["width"], image["height"]) for image in prepared.bin(0).images[:3]] == [(90, 60), (60, 60), (90, 62)]
    assert FarAway.most > 8
    FarAway().rm_file("/far-pages/10.png")
    FarAway.most = 0
    rendered = {}
    for threads in (render.THREADS, 1):
        monkeypatch.setattr(render, "THREADS", threads)
        pages = render.render_pages(prepared.bin(0), job.policy, render_tiles, "reject")
        rendered[threads] = [[tile.tobytes() for tile in tiles] for tiles in pages.tiles], pages.skipped
    assert FarAway.most > 8
    assert rendered[1] == rendered[16]
    assert [skipped.reason for skipped in rendered[1][1].values()] == ["image_missing"]
