"""Exact lengths from headers against running the processor, and what share of encoding a row is tokenising.

Both ways start from the page's file and end with the number of tokens it becomes, and the numbers are equal. One
thread. The processors are the real ones of ../shared/data; where they are absent, small synthetic ones, whose
pictures are small too and which have no goal therefore.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from benchmarks.common import Result, best_seconds
from mmray.families import Family, family_of, load_processor
from mmray.images import TilingPolicy, image_size, plan_tiles
from mmray.images.size_cache import SizeCache, merge_sizes, read_sizes
from mmray.packing.settings import PackingSettings
from mmray.rows.encode import Encoder
from mmray.rows.read import RawRow
from mmray.rows.sample import Sample
from mmray.rows.settings import DatasetSettings, DataSettings
from mmray.synthetic.pages import write_pages
from mmray.synthetic.processors import write_processor

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
GOAL = 300.0
NUM_PAGES = 4
"""Pages that the processors see: they take a tenth of a second each."""
WHOLE = TilingPolicy()


@dataclass(frozen=True)
class Inputs:
    """Rows with a page each, and processors. is_real: those of ../shared/data."""

    folder: Path
    rows: list[dict[str, Any]]
    processors: dict[str, Any]
    is_real: bool

    @property
    def pages(self) -> list[Path]:
        return [self.folder / row["images"][0] for row in self.rows]


@contextmanager
def inputs() -> Iterator[Inputs]:
    if SHARED.is_dir():
        names = ("qwen2-vl", "granite-docling")
        yield Inputs(
            SHARED, rows_of(SHARED / "pages.jsonl"), {n: load_processor(SHARED / "processors" / n) for n in names}, True
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        pages = write_pages(folder, 40)
        names = ("qwen2_vl", "idefics3")
        processors = {name: load_processor(write_processor(Path(folder, name), name)) for name in names}
        yield Inputs(pages.folder, rows_of(pages.pages.path), processors, False)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows that have one page, which is there."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if len(row["images"]) == row["text"].count("<image>") == 1 and "broken" not in row["images"][0]:
            rows.append(row)
    return [row for row in rows if (path.parent / row["images"][0]).exists() and len(row["text"]) < 50_000]


@contextmanager
def one_thread() -> Iterator[None]:
    threads, parallel = torch.get_num_threads(), os.environ.get("TOKENIZERS_PARALLELISM")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if parallel is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = parallel


def run() -> list[Result]:
    with one_thread(), inputs() as found:
        results = [result for name in found.processors for result in against_processor(found, name)]
        return [*results, sizes_kept(found), *(tokenising(found, name) for name in found.processors)]


# -------------------------------------------------------------------- lengths


def own_length(family: Family, page: Path) -> int:
    """Tokens of a page, by its header and arithmetic."""
    plan = plan_tiles(image_size(page), WHOLE)
    return sum(len(family.span(size).token_ids) for size in plan.tile_sizes)


def processors_length(family: Family, page: Path, num_around: int) -> int:
    """Tokens of a page, by the processor. num_around: tokens of the text around it."""
    image = ImageOps.exif_transpose(Image.open(page)).convert("RGB")
    output = family.processor(text=[family.placeholder_unit], images=[image], add_special_tokens=False)
    return len(output["input_ids"][0]) - num_around


def against_processor(found: Inputs, name: str) -> list[Result]:
    family = family_of(found.processors[name])
    pages = found.pages
    num_around = len(family.tokenizer(family.placeholder_unit, add_special_tokens=False)["input_ids"]) - 1
    for page in pages[:NUM_PAGES]:
        own, processors = own_length(family, page), processors_length(family, page, num_around)
        if own != processors:
            raise AssertionError(f"{page}: {own} tokens by its header, {processors} by {name}")

    def each(length: Callable[..., int], of: list[Path], *options: Any) -> Callable[[], None]:
        return lambda: [length(family, page, *options) for page in of]  # type: ignore[return-value]

    own = best_seconds(each(own_length, pages), 6) / len(pages)
    processors = best_seconds(each(processors_length, pages[:NUM_PAGES], num_around), 2) / NUM_PAGES
    by_size = list({image_size(page): page for page in pages}.values())
    family = family_of(found.processors[name])  # which has seen no size yet
    unseen = best_seconds(each(own_length, by_size), 1) / len(by_size)
    which = f"{name}, pages of ../shared/data" if found.is_real else f"synthetic {name} (../shared/data is absent)"
    return [
        Result(
            name=f"header and arithmetic against decoding and the processor: {which}",
            ratio=processors / own,
            explanation=f"{1e3 * own:.3f} ms a page against {1e3 * processors:.1f}; equal tokens",
            goal=GOAL if found.is_real else None,
        ),
        Result(
            name=f"the same where every page has a size of its own: {which}",
            ratio=processors / unseen,
            explanation=f"{1e3 * unseen:.3f} ms a page, of {len(by_size)} sizes seen for the first time",
        ),
    ]


def sizes_kept(found: Inputs) -> Result:
    """A local file's header, in memory, is little more than its state; of remote ones it saves a request."""
    with tempfile.TemporaryDirectory() as folder:
        first = SizeCache(read_sizes(folder))
        sizes = [first.image_size(page) for page in found.pages]
        merge_sizes(folder, [first.take_new()])
        cache = SizeCache(read_sizes(folder))
        if [cache.image_size(page) for page in found.pages] != sizes or len(cache.take_new()):
            raise AssertionError("the size cache does not know the pages it was given")
        cached = best_seconds(lambda: [cache.image_size(page) for page in found.pages]) / len(sizes)
        headers = best_seconds(lambda: [image_size(page) for page in found.pages]) / len(sizes)
    return Result(
        name="sizes by the size cache against headers, local files",
        ratio=headers / cached,
        explanation=f"{1e6 * cached:.0f} µs a page against {1e6 * headers:.0f}",
    )


# -------------------------------------------------------------------- tokenising


def tokenising(found: Inputs, name: str) -> Result:
    """Rows of a page and its text, encoded in one chunk; then their texts alone, tokenised in one batch.

    The Rust back end leaves little: of 572 µs a text (720 tokens, Qwen2-VL), making arrays of its ids takes 3 %,
    and a call for a chunk is 16 % faster than one for each text. Splitting text into words by the tokenizer's regular
    expression alone takes as long as the whole call, when its words come to Python; so the limit is the back end's own
    0.8 µs a token, and more encode actors are what makes preparing faster.
    """
    family = family_of(found.processors[name])
    dataset = DatasetSettings(files=("rows.jsonl",), kind="pretrain", image_root=str(found.folder))
    packing = PackingSettings(token_capacity=1 << 20, visual_capacity=1 << 20)
    encoder = Encoder(DataSettings(train=(dataset,)), (dataset,), family, WHOLE, packing)
    raw = [RawRow(f"rows.jsonl:{number}", 0, row) for number, row in enumerate(found.rows)]
    texts = [row["text"].replace("<image>", family.placeholder_unit) for row in found.rows]
    samples = encoder.encode(raw)
    bad = [sample for sample in samples if not isinstance(sample, Sample)]
    if bad:
        raise AssertionError(f"{len(bad)} rows were rejected, the first: {bad[0]}")
    tokens = sum(len(sample.input_ids) for sample in samples if isinstance(sample, Sample))
    backend = family.tokenizer.backend_tokenizer
    whole = best_seconds(lambda: encoder.encode(raw), 6) / len(raw)
    alone = best_seconds(lambda: backend.encode_batch_fast(texts, add_special_tokens=True), 6) / len(raw)
    return Result(
        name=f"share of tokenising in encoding a row: {name}",
        ratio=alone / whole,
        explanation=f"{1e3 * alone:.2f} of {1e3 * whole:.2f} ms a row of {tokens / len(raw):,.0f} tokens on average",
    )
