"""Preparing on Ray against a plain pool of processes, the memory of it, and reading large Parquet row groups.

Both ways run the same functions on the same pages, repeated: the pool as often as its rate needs, Ray further, for its
memory. The pool's processes take whole windows, so nothing is sent between them. Two encoding processes each; Ray packs
in a third. Rates and memory are those of the rows after the first: from when FIRST_ROWS are committed to the end of the
same run. So the starting of processes counts for neither way.

    python -m benchmarks.bench_prepare 20480     # at another number of rows on Ray, more than FIRST_ROWS
"""

import multiprocessing
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import Result, best_seconds
from benchmarks.page_jobs import Pages, Stages, local_ray, windows
from mmray.config import Job
from mmray.prepared import PreparedWriter
from mmray.rows.files import Chunk, Piece, source_files
from mmray.rows.read import RowReader
from pipelines.prepare import PrepareContext, prepare

FIRST_ROWS, ROWS = 5_000, 50_000
POOL_ROWS = 27_000
"""20,000 after the first; the last window is a small one, so that neither process works alone for long at the end."""
WINDOW_ROWS = 2_048
POOL_SIZE = 2
GOAL_RATE, GOAL_MEMORY = 0.9, 1.15
SAMPLE_SECONDS = 0.1

_stages: Stages


def run(rows: int = ROWS) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        pages = Pages(Path(folder))
        pool, ray = Course(), Course()
        through_pool(pages.job("pool", pages.rows, POOL_ROWS, window_rows=WINDOW_ROWS), pool)
        job = pages.job("ray", pages.rows, rows, window_rows=WINDOW_ROWS)
        with local_ray(), ray.peaks:
            prepare(job, "train", on_progress=lambda done, _: ray.note(done))
        return [of_row_groups(Path(folder)), of_rates(pool, ray, pages.name), *of_memory(ray)]


class Course:
    """How rows were committed: the times of it in seconds, and the peaks of memory in MB when the first were there."""

    def __init__(self) -> None:
        self.times: list[tuple[int, float]] = []
        """Rows done since the start and the time, from when the first rows were done."""
        self.peaks = PeakMemory()
        self.first_peaks: dict[str, float] = {}

    def note(self, done: int) -> None:
        if done >= FIRST_ROWS:
            self.times.append((done, time.perf_counter()))
            self.first_peaks = self.first_peaks or dict(self.peaks.megabytes)

    @property
    def rate(self) -> float:
        """Rows a second, after the first."""
        (few, began), (many, ended) = self.times[0], self.times[-1]
        return (many - few) / (ended - began)


def through_pool(job: Job, course: Course) -> None:
    writer = PreparedWriter(job.prepared_path("train"))
    writer.begin(PrepareContext(job, "train").record(source_files(job.data.train)))
    done = 0
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(POOL_SIZE, mp_context=spawn, initializer=_start, initargs=(job, writer.token)) as pool:
        for window in as_completed([pool.submit(_window, chunks) for chunks in windows(job)]):
            done += window.result()
            course.note(done)


def _start(job: Job, token: str) -> None:
    global _stages
    _stages = Stages(job, token)


def _window(chunks: list[Chunk]) -> int:
    return _stages.window(chunks)


def of_rates(pool: Course, ray: Course, data: str) -> Result:
    shown = [f"{way.rate:,.0f} rows a second from {way.times[0][0]:,} to {way.times[-1][0]:,}" for way in (ray, pool)]
    return Result(
        name=f"prepare on Ray against {POOL_SIZE} plain processes, {data}", ratio=ray.rate / pool.rate, goal=GOAL_RATE,
        explanation=" against ".join(shown),
    )  # fmt: skip


# ---------------------------------------------------------------- memory


class PeakMemory:
    """The most memory that this process, and any encode and pack actor, holds of its own while a block runs, in MB.

    What is mapped from the object store belongs to the store and does not count.
    """

    def __init__(self) -> None:
        self.megabytes: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        this = psutil.Process()
        while not self._ended.wait(SAMPLE_SECONDS):
            self._note("driver", this)
            for process in this.children(recursive=True):
                try:
                    title = " ".join(process.cmdline())
                    for name, actor in (("encode actor", "EncodeChunk"), ("pack actor", "PackWindow")):
                        if actor in title:
                            self._note(name, process)
                except psutil.Error:  # it has just ended
                    continue

    def _note(self, name: str, process: psutil.Process) -> None:
        memory = process.memory_info()
        own = (memory.rss - memory.shared) / 1e6
        self.megabytes[name] = max(self.megabytes.get(name, 0.0), own)


def of_memory(course: Course) -> list[Result]:
    few, many = course.times[0][0], course.times[-1][0]
    return [
        Result(
            name=f"peak memory of the {name}, after {many:,} rows against {few:,}", ratio=peak / first,
            explanation=f"{peak:,.0f} MB against {first:,.0f} MB", goal=GOAL_MEMORY, lower_is_better=True,
        )
        for name, first in course.first_peaks.items()
        for peak in [course.peaks.megabytes[name]]
    ]  # fmt: skip


# ---------------------------------------------------------------- Parquet


def of_row_groups(folder: Path, rows: int = 8_192, image_bytes: int = 4_096, chunk_rows: int = 512) -> Result:
    """Each second chunk of a file of one row group, as one of two actors reads it."""
    path = str(folder / "images.parquet")
    images = np.random.default_rng(0).integers(0, 256, (rows, image_bytes), dtype=np.uint8)
    table = pa.table({"text": ["A line of text. " * 50] * rows, "images": [[row.tobytes()] for row in images]})
    pq.write_table(table, path, row_group_size=rows)
    firsts = range(0, rows, 2 * chunk_rows)

    def remembering() -> int:
        reader = RowReader()
        pieces = (Piece(0, path, "parquet", first, chunk_rows) for first in firsts)
        return sum(len(list(reader.read(piece))) for piece in pieces)

    def whole_group() -> int:
        groups: Any = (pq.ParquetFile(path).read_row_group(0).slice(first, chunk_rows) for first in firsts)
        return sum(len(group.to_pylist()) for group in groups)

    if remembering() != whole_group():
        raise AssertionError("the two ways give different rows")
    seconds = [best_seconds(work, 3) for work in (remembering, whole_group)]
    return Result(
        name=f"reading a row group of {rows:,} rows in chunks, going on against reading it for each",
        ratio=seconds[1] / seconds[0],
        explanation=f"{seconds[0]:.2f} s against {seconds[1]:.2f} s, {len(firsts)} chunks of {chunk_rows} rows",
    )


if __name__ == "__main__":
    from benchmarks.__main__ import as_table

    print(as_table(run(int(sys.argv[1]))))
