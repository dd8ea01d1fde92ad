"""What dealing rows evenly costs: preparing 64 Parquet sets dealt against one after another, and how full bins get.

Both ways read, encode and pack the same rows in one process; nothing is written. CPU time, window by window in turn, so
that what else the machine does slows both.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.common import Result
from mmray.families import family_of, load_processor
from mmray.images import TilingPolicy
from mmray.packing.settings import PackingSettings
from mmray.prepared.stages import ChunkEncoder, PrepareContext, WindowPacker
from mmray.rows.files import Chunk, source_files
from mmray.rows.plan import Plan, indexed_files
from mmray.rows.settings import DatasetSettings, DataSettings
from mmray.synthetic.documents import make_document
from mmray.synthetic.processors import write_processor

SETS, SET_ROWS, WINDOW_ROWS = 64, 256, 4096
GOAL_RATE, GOAL_FILL = 0.95, 1.0
PACKING = PackingSettings(token_capacity=2048, visual_capacity=1024, window_rows=WINDOW_ROWS)


def run() -> list[Result]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return [rate(folder, f"{SETS} sets of texts", text_sets(folder)), fill(folder)]


def context_of(folder: Path, sets: list[dict[str, Any]]) -> PrepareContext:
    processor = load_processor(write_processor(folder / "processor", "qwen2_vl"))
    data = DataSettings(train=tuple(DatasetSettings.model_validate({"kind": "pretrain", **each}) for each in sets))
    family = family_of(processor)
    policy = family.resolve_tiling(TilingPolicy())
    return PrepareContext("train", "", data.train, data, PACKING, "sampled", family, policy)


def text_sets(folder: Path) -> list[dict[str, Any]]:
    """Parquet files in row groups of 64, as writers of data sets make them."""
    texts = [make_document(0, number).text for number in range(400)]
    for number in range(SETS):
        rows = [{"id": f"{number}-{n}", "text": texts[(37 * number + n) % 400]} for n in range(SET_ROWS)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"set-{number:02d}.parquet", row_group_size=64)
    return [{"files": str(folder / f"set-{number:02d}.parquet")} for number in range(SETS)]


def windows_of(context: PrepareContext, dealing: int) -> list[list[Chunk]]:
    indexed = indexed_files(source_files(context.datasets))
    plan = Plan(indexed, window_rows=WINDOW_ROWS, chunk_rows=PACKING.chunk_rows, dealing=dealing)
    return [plan.window(number) for number in range(plan.num_windows)]


def packed(context: PrepareContext, dealing: int) -> Iterator[dict[str, Any]]:
    """The statistics of each window, made when asked for."""
    encode, pack = ChunkEncoder(context), WindowPacker(replace(context, dealing=dealing), "")
    for window in windows_of(context, dealing):
        yield pack.pack(pa.concat_tables([encode(chunk) for chunk in window])).statistics


def rate(folder: Path, name: str, sets: list[dict[str, Any]]) -> Result:
    context = context_of(folder, sets)
    ways = {dealing: packed(context, dealing) for dealing in (1, 2)}
    seconds, rows = {1: np.inf, 2: np.inf}, 0
    for _ in range(SETS * SET_ROWS // WINDOW_ROWS):
        for dealing, windows in ways.items():
            started = time.process_time()
            rows = next(windows)["rows_read"]
            seconds[dealing] = min(seconds[dealing], time.process_time() - started)
    return Result(
        name=f"rows a second prepared, dealt evenly against one set after another: {name}",
        ratio=float(seconds[1] / seconds[2]),
        explanation=f"{1000 * seconds[2] / rows:.3f} ms of CPU a row against {1000 * seconds[1] / rows:.3f}; the best "
        f"windows of {WINDOW_ROWS:,} rows, in turn",
        goal=GOAL_RATE,
    )


def fill(folder: Path) -> Result:
    """Texts without images, and pages of few words: bins of one kind alone leave one capacity empty."""
    texts = [make_document(0, number).text for number in range(200)]
    Image.new("L", (168, 224), 200).save(folder / "page.png")
    kinds = {
        "texts": [{"id": f"t-{n}", "text": texts[n % 200] * 2} for n in range(2 * WINDOW_ROWS)],
        "pages": [{"id": f"p-{n}", "text": "<image>\npage", "images": ["page.png"]} for n in range(2 * WINDOW_ROWS)],
    }
    for name, rows in kinds.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=512)
    context = context_of(folder, [{"files": str(folder / f"{name}.parquet")} for name in kinds])
    bins, tokens = {}, {}
    for dealing in (1, 2):
        statistics = list(packed(context, dealing))
        bins[dealing] = sum(each["bins"] for each in statistics)
        tokens[dealing] = sum(each["tokens"] for each in statistics)
    capacity = PACKING.token_capacity
    return Result(
        name="fill of bins, dealt evenly against one set after another: texts, then pages",
        ratio=bins[1] / bins[2],
        explanation=f"{bins[2]:,} bins against {bins[1]:,}, {tokens[2] / bins[2] / capacity:.1%} of tokens against "
        f"{tokens[1] / bins[1] / capacity:.1%}: dealt, a window holds texts and pages, which share bins",
        goal=GOAL_FILL,
    )
