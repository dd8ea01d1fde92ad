"""Encoding rows whose pictures lie far away, and finishing many windows in flat memory.

The store is one in memory that takes 20 ms to open something, and texts are short: what is left is waiting. Both ways
give equal rows. Finishing reads commits of 8,192 samples each, as a prepare writes them, in a process of its own for
each size.
"""

import base64
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from benchmarks.common import Result
from mmray.families import family_of, load_processor
from mmray.images import TilingPolicy, measure_ahead
from mmray.packing.settings import PackingSettings
from mmray.prepared import PreparedWriter
from mmray.prepared.schema import REJECTED
from mmray.rows.duplicates import HASH_BYTES
from mmray.rows.encode import Encoder
from mmray.rows.read import RawRow
from mmray.rows.settings import DatasetSettings, DataSettings
from mmray.synthetic.processors import write_processor

DELAY = 0.02
NUM_ROWS = 512
WINDOW_ROWS = 8192
NUM_WINDOWS = (122, 1221)
"""10^6 and 10^7 samples."""


class FarAway(MemoryFileSystem):
    """An object store in memory, which takes DELAY seconds to open something."""

    cachable = False

    def _open(self, path: str, mode: str = "rb", **options: object) -> object:
        time.sleep(DELAY if mode == "rb" else 0)
        return super()._open(path, mode, **options)


def run() -> list[Result]:
    return [far_pictures(), finish()]


def far_pictures() -> Result:
    fsspec.register_implementation("memory", FarAway, clobber=True)
    system, sink = FarAway(), io.BytesIO()
    Image.new("RGB", (850, 1100), "white").save(sink, "PNG")
    rows = []
    for number in range(NUM_ROWS):
        system.pipe_file(f"/pages/{number}.png", sink.getvalue())
        value = {"id": str(number), "text": "<image> One line of text.", "images": [f"memory://pages/{number}.png"]}
        rows.append(RawRow(f"/rows.jsonl:{number}", 0, value))
    dataset = DatasetSettings(files="rows.jsonl", kind="pretrain")
    with tempfile.TemporaryDirectory() as folder:
        family = family_of(load_processor(write_processor(Path(folder), "qwen2_vl")), tiled=False)
    packing = PackingSettings(token_capacity=8192, visual_capacity=8192)
    encoder = Encoder(DataSettings(train=(dataset,)), (dataset,), family, TilingPolicy(), packing)
    encoder.encode(rows[:1])
    seconds, results, ahead = [], [], measure_ahead.AHEAD
    for measure_ahead.AHEAD in (1, ahead):
        started = time.perf_counter()
        results.append(encoder.encode(rows))
        seconds.append(time.perf_counter() - started)
    if repr(results[0]) != repr(results[1]):
        raise AssertionError("asking ahead gave other rows")
    one, many = (1000 * each / NUM_ROWS for each in seconds)
    return Result(
        name="encode: pictures 20 ms away, one request after another / 32 ahead", ratio=one / many, goal=15,
        explanation=f"{one:.1f} ms a row / {many:.2f} ms, equal rows",
    )  # fmt: skip


def finish() -> Result:
    few, many = (json.loads(subprocess.check_output([sys.executable, "-m", __name__, str(n)])) for n in NUM_WINDOWS)
    rows = [windows * WINDOW_ROWS / 1e6 for windows in NUM_WINDOWS]
    return Result(
        name="finish: memory that ten times as many samples take / that of 10^6", ratio=many["mib"] / few["mib"],
        goal=2.0, lower_is_better=True,
        explanation=(
            f"{rows[0]:.0f} M samples {few['mib']:.0f} MiB and {few['seconds']:.1f} s, "
            f"{rows[1]:.0f} M {many['mib']:.0f} MiB and {many['seconds']:.1f} s"
        ),
    )  # fmt: skip


def _finish_windows(count: int) -> dict[str, float]:
    """Seconds and MiB, beyond what the process had before, of finishing so many windows."""
    with tempfile.TemporaryDirectory() as folder:
        writer = PreparedWriter(folder)
        writer.begin({"rows": count})
        sink = io.BytesIO()
        pq.write_table(REJECTED.empty_table(), sink)
        Path(folder, "rejected.part").write_bytes(sink.getvalue())
        facts = dict.fromkeys(
            ("rows_rejected", "bins_at_least", "tokens", "visual_tokens", "trained_tokens", "images"), 0
        ) | {"rows_read": WINDOW_ROWS, "rows_packed": WINDOW_ROWS, "bins": 500, "content": "0" * 32}
        facts |= {"rejected_by_reason": {}, "image_notes": {}, "examples": {}, "sets": {}}
        for number in range(count):
            ids = base64.b64encode(os.urandom(WINDOW_ROWS * HASH_BYTES)).decode()
            commit = {"bins_file": f"bins-{number:05d}-01234567.parquet", "rejected_file": "rejected.part",
                      "statistics": facts, "id_hashes": ids}  # fmt: skip
            Path(folder, f"window-{number:05d}-{writer.token}.json").write_text(json.dumps(commit))
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        writer.finish({"rows": count}, count, tiling=TilingPolicy(), capacities=(8192, 8192), facts={})
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


if __name__ == "__main__":
    print(json.dumps(_finish_windows(int(sys.argv[1]))))
