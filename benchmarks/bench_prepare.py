"""Preparing on Ray against a plain pool of processes, the memory of it, and reading large Parquet row groups.

Both ways run the same functions on the same pages, repeated. The pool's processes take whole windows, so nothing is
sent between them. Two encoding processes each; Ray packs in a third.

When both have made their first rows they take turns: the processes of the one are suspended while the other's go on,
and a way's clock runs in its turns only. So the starting of processes counts for neither, and what else slows the
machine down for a while slows both. Of Ray all processes are suspended but its driver, which is this one. After
RATED_ROWS of the pool Ray goes on alone, for its memory.

    python -m benchmarks.bench_prepare 100000     # another number of rows on Ray
"""

import gc
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import Result, best_seconds
from benchmarks.page_jobs import Pages, local_ray
from mmray.config.job import Job
from mmray.prepared import driver
from mmray.prepared.stages import PrepareContext, WindowMaker
from mmray.rows.files import Chunk, Piece, by_window
from mmray.rows.read import RowReader
from pipelines.prepare import prepare

FIRST_ROWS, RATED_ROWS, ROWS = 5_000, 20_000, 50_000
POOL_ROWS = 40_000
"""More than it makes: its processes never wait for rows."""
WINDOW_ROWS = 1_024
"""Few, as windows count when they are whole."""
POOL_SIZE = 2
TURN_SECONDS = 1.0
GOAL_RATE, GOAL_MEMORY = 0.9, 1.15
SAMPLE_SECONDS = 0.1
ACTORS = {"EncodeChunk": "encode actor", "PackWindow": "pack actor"}
NUM_ACTORS = 3

_make: WindowMaker


def run(rows: int = ROWS) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        pages = Pages(Path(folder))
        pool_job = pages.job("pool", pages.rows, POOL_ROWS, window_rows=WINDOW_ROWS)
        ray_job = pages.job("ray", pages.rows, rows, window_rows=WINDOW_ROWS)
        pool, ray = Way(pool_job, through_pool, pool_processes), Way(ray_job, through_ray, ray_processes)
        with heap_at_rest(), local_ray(), PeakMemory() as memory, pool, ray:
            for way in (pool, ray):
                way.wait()
            if len(pool.processes) != POOL_SIZE or len(list(ray_actors())) != NUM_ACTORS:
                raise AssertionError(
                    f"{POOL_SIZE} and {NUM_ACTORS} processes expected: {pool.processes}, {list(ray_actors())}"
                )
            first_peaks = memory.megabytes.copy()
            while pool.rated < RATED_ROWS:
                ray.turn()
                pool.turn()
        rates = of_rates(pool, ray, pages.name)
        return [of_row_groups(Path(folder)), rates, *of_memory(first_peaks, memory.megabytes, rows)]


@contextmanager
def heap_at_rest() -> Iterator[None]:
    """Else Ray's driver, and it alone, would look again and again through what earlier benchmarks left here."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Way:
    """A way of preparing, at work in a thread from the beginning of its block, suspended when its first rows are done.

    Its clock runs in its turns only. At the end of the block it goes on until it ends by itself.
    """

    def __init__(self, job: Job, work: Callable[[Job, "Way"], None], find: Callable[[], list[psutil.Process]]) -> None:
        """find: gives the processes that do the work at the moment."""
        self.job, self._work, self._find = job, work, find
        self.done = 0
        self.is_left = False
        """There are no more turns."""
        self.processes: list[psutil.Process] = []
        """The suspended ones."""
        self.commits: list[tuple[int, float]] = []
        """Rows done since the start and the clock's seconds, each time that rows are committed in a turn."""
        self._failed = False
        self._seconds = 0.0
        self._origin: float | None = None
        """The time at which the clock would have begun to make it right; None: it stands."""

    def __enter__(self) -> "Way":
        self._running = ThreadPoolExecutor(1).submit(self._work, self.job, self)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.is_left, self._failed = True, kind is not None
        self._resume()
        wait([self._running])
        if kind is None:
            self._running.result()

    def note(self, done: int) -> None:
        """Called in the thread when rows are committed."""
        if self._failed:
            raise RuntimeError("the benchmark was given up")
        origin = self._origin
        if origin is not None:
            self.commits.append((done, time.perf_counter() - origin))
        elif self.done < FIRST_ROWS <= done:
            self.suspend()
        self.done = done

    def wait(self) -> None:
        """Until it is suspended for the first time. Raises what ended it."""
        while self.done < FIRST_ROWS:
            time.sleep(0.1)
            self._check()

    def _check(self) -> None:
        if self._running.done():
            self._running.result()
            raise AssertionError(f"{self.done:,} rows are all, too few to take turns with the other way")

    def turn(self) -> None:
        self._check()
        self._resume()
        self._origin = time.perf_counter() - self._seconds
        time.sleep(TURN_SECONDS)
        self.suspend()
        self._seconds = time.perf_counter() - self._origin
        self._origin = None

    def suspend(self) -> None:
        self.processes = self._find()
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):  # it has just ended
                process.suspend()

    def _resume(self) -> None:
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()

    @property
    def rated(self) -> int:
        """Rows from the first commit of its turns to the last."""
        return self.commits[-1][0] - self.commits[0][0] if self.commits else 0

    @property
    def rate(self) -> float:
        """Rows a second of its turns: the slope of a straight line through the commits."""
        rows, seconds = zip(*self.commits)
        return float(np.polyfit(seconds, rows, 1)[0])


class Left(Exception):
    """The way is left."""


def through_pool(job: Job, way: Way) -> None:
    """Until the way is left."""
    with suppress(Left):
        driver.prepare(job, on_progress=lambda done, _: way.note(done), run_windows=partial(pool_windows, job, way))


def pool_windows(
    job: Job, way: Way, context: PrepareContext, token: str, chunks: Sequence[Chunk], _sizes: Any
) -> Iterator[int]:
    """The `driver.RunWindows` of a plain pool of processes."""
    spawn, start = multiprocessing.get_context("spawn"), (job, token, context.dealing)
    with ProcessPoolExecutor(POOL_SIZE, mp_context=spawn, initializer=_start, initargs=start) as pool:
        for window in as_completed([pool.submit(_window, window) for window in by_window(chunks)]):
            if way.is_left:
                pool.shutdown(wait=False, cancel_futures=True)
                raise Left
            yield window.result()


def pool_processes() -> list[psutil.Process]:
    return [psutil.Process(process.pid) for process in multiprocessing.active_children()]


def _start(job: Job, token: str, dealing: int) -> None:
    global _make
    _make = WindowMaker(PrepareContext.of(job, "train").dealt(dealing), token)


def _window(chunks: list[Chunk]) -> int:
    return _make(chunks)


def through_ray(job: Job, way: Way) -> None:
    prepare(job, "train", on_progress=lambda done, _: way.note(done))


def ray_processes() -> list[psutil.Process]:
    """All below this process but the pool's."""
    pool = pool_processes()
    return [process for process in psutil.Process().children(recursive=True) if process not in pool]


def ray_actors() -> Iterator[tuple[psutil.Process, str]]:
    """The processes of encode and pack actors, and which of them each is."""
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:  # it has just ended
            continue
        for name, actor in ACTORS.items():
            if name in title:
                yield process, actor


def of_rates(pool: Way, ray: Way, data: str) -> Result:
    shown = [f"{way.rate:,.0f} rows a second, {way.rated:,} rows" for way in (ray, pool)]
    return Result(
        name=f"prepare on Ray against {POOL_SIZE} plain processes, {data}", ratio=ray.rate / pool.rate, goal=GOAL_RATE,
        explanation=f"{' against '.join(shown)}, in turns of {TURN_SECONDS:.0f} s",
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
        found = [(psutil.Process(), "driver")]
        while not self._ended.wait(SAMPLE_SECONDS):
            if len(found) <= NUM_ACTORS:  # looking for them takes much longer than asking them
                found = [found[0], *ray_actors()]
            for process, name in found:
                with suppress(psutil.Error):  # it has just ended
                    memory = process.memory_info()
                    own = (memory.rss - memory.shared) / 1e6
                    self.megabytes[name] = max(self.megabytes.get(name, 0.0), own)


def of_memory(first: dict[str, float], peaks: dict[str, float], rows: int) -> list[Result]:
    return [
        Result(
            name=f"peak memory of the {name}, after {rows:,} rows against the first {FIRST_ROWS:,}",
            ratio=peaks[name] / first[name], explanation=f"{peaks[name]:,.0f} MB against {first[name]:,.0f} MB",
            goal=GOAL_MEMORY, lower_is_better=True,
        )
        for name in first
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
