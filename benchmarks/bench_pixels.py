"""Pictures as uint8 and arithmetic on the training device, against tiles through the Hugging Face processor.

A letter page of 150 dpi in 2 x 3 tiles, of 512 x 512 or the nearest size that the processor leaves as it is. The
processor runs as it would on a CPU actor: its image part alone, on all tiles of the page at once, told to resize
nothing; what it returns are the model's `pixel_values` in fp32. mmray's part after cutting is everything that a render
actor does with the tiles: frames, tokens and sizes into one Arrow table, which goes through the object store. CPU time
is that of the whole process, with torch on one thread.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig

from benchmarks.bench_lengths import inputs, one_thread
from benchmarks.bench_tiles import letter_size, pages
from benchmarks.common import Result, best_seconds
from mmray.batches.micro_batch import Masked, MicroBatch, Place, RenderPage, from_table, mask, render, to_table
from mmray.families import Family, family_of
from mmray.images import TilePlan, TilingPolicy, plan_tiles, render_tiles
from mmray.loss.labels import LabelMaker
from mmray.packing.settings import PackingSettings
from mmray.prepared import Bin
from mmray.prepared.dataset import window_bins
from mmray.prepared.window import pack_window, samples_table
from mmray.rows.encode import Encoder
from mmray.rows.read import RawRow
from mmray.rows.sample import Sample
from mmray.rows.settings import DatasetSettings, DataSettings
from mmray.synthetic.documents import make_document

DPI = 150
GOAL_TIME, GOAL_BYTES = 3.0, 3.5
MAX_DIFFERENCE = 1e-5
"""Of pixel_values, which are about -2 to 2."""
CPU = torch.device("cpu")


def run() -> list[Result]:
    with one_thread(), inputs() as found:
        synthetic = "" if found.is_real else "synthetic "
        return [
            result
            for name, processor in found.processors.items()
            for result in of_processor(family_of(processor, tiled=True), f"{synthetic}{name}")
        ]


class Page:
    """A page, its plan and its row, packed alone into a bin."""

    def __init__(self, data: bytes, family: Family, policy: TilingPolicy) -> None:
        self.data, self.family, self.policy = data, family, policy
        self.plan: TilePlan = plan_tiles(letter_size(DPI), policy)
        self.tiles = render_tiles(data, self.plan)
        self.labels = LabelMaker((), (), "turn", family.media_token_ids)
        self.bin = self._bin()

    def _bin(self) -> Bin:
        dataset = DatasetSettings(files=("page",), kind="pretrain")
        packing = PackingSettings(token_capacity=1 << 20, visual_capacity=1 << 20)
        encoder = Encoder(DataSettings(train=(dataset,)), (dataset,), self.family, self.policy, packing)
        row = {"id": "page", "text": f"<image>\n{make_document(0, 0, 'train').text}", "images": [self.data]}
        (sample,) = encoder.encode([RawRow("page:1", 0, row)])
        if not isinstance(sample, Sample):
            raise AssertionError(f"the page was rejected: {sample}")
        (packed,) = window_bins(pack_window(samples_table([sample]), packing, self.labels))
        return packed

    def already_cut(self, source: Any, plan: TilePlan, *, max_pixels: int) -> list[Image.Image]:
        return self.tiles

    def table(self, render_page: RenderPage) -> Any:
        """What a render actor puts into the object store."""
        return to_table(render([self.bin], Place(0, 0, 0), self.family, self.policy, render_page))

    def processors_pixels(self, tiles: list[Image.Image]) -> torch.Tensor:
        images = self.family.processor.image_processor
        pixels: torch.Tensor = images(tiles, return_tensors="pt", **self.family.processor_kwargs)["pixel_values"]
        return pixels

    def cut_and_processed(self) -> torch.Tensor:
        return self.processors_pixels(render_tiles(self.data, self.plan))

    def micro_batch(self) -> MicroBatch:
        """The page as the training process gets it."""
        rendered = render([self.bin], Place(0, 0, 0), self.family, self.policy, self.already_cut)
        masked = to_table(mask(rendered, self.family, self.labels, CPU))
        return MicroBatch(from_table(Masked, masked), self.family)


def of_processor(family: Family, name: str) -> list[Result]:
    policy = family.resolve_tiling(TilingPolicy(grid=(2, 3), tile_size=(512, 512)))
    each = [Page(data, family, policy) for data in pages(DPI)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = AutoConfig.for_model(family.model_types[0])
    batches = [page.micro_batch() for page in each]

    def on_device(number: int) -> torch.Tensor:
        pixels = batches[number].model_inputs(device, torch.float32, config)["pixel_values"]
        if device.type == "cuda":
            torch.cuda.synchronize()
        return pixels

    processors = [page.processors_pixels(page.tiles) for page in each]
    differences = [float((on_device(n).cpu() - pixels).abs().max()) for n, pixels in enumerate(processors)]
    if max(differences) > MAX_DIFFERENCE:
        raise AssertionError(f"pixel_values differ from those of {name} by {max(differences):.1e}")
    theirs = mean_seconds([partial(page.processors_pixels, page.tiles) for page in each])
    own = mean_seconds([partial(page.table, page.already_cut) for page in each])
    whole_theirs = mean_seconds([page.cut_and_processed for page in each])
    whole_own = mean_seconds([partial(page.table, render_tiles) for page in each])
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    arithmetic = mean_seconds([partial(on_device, n) for n in range(len(each))], clock)
    own_bytes = sum(page.table(page.already_cut).nbytes for page in each) / len(each) / 1e6
    their_bytes = sum(pixels.nbytes for pixels in processors) / len(each) / 1e6
    width, height = each[0].tiles[0].size
    data = f"{name}, {len(each[0].tiles)} tiles of {width} x {height}"
    where = torch.cuda.get_device_name() if device.type == "cuda" else "one CPU thread"
    return [
        Result(
            name=f"CPU time after cutting, the processor against frames: {data}", ratio=theirs / own,
            explanation=f"{1e3 * own:.2f} ms a page against {1e3 * theirs:.1f}", goal=GOAL_TIME,
        ),
        Result(
            name=f"the same with decoding and cutting in both: {data}", ratio=whole_theirs / whole_own,
            explanation=f"{1e3 * whole_own:.1f} ms a page against {1e3 * whole_theirs:.1f}",
        ),
        Result(
            name=f"bytes of a page, fp32 pixel_values against its table: {data}", ratio=their_bytes / own_bytes,
            explanation=f"{own_bytes:.2f} MB against {their_bytes:.2f}; tokens and sizes are in the table, too",
            goal=GOAL_BYTES,
        ),
        Result(
            name=f"the arithmetic on the training device, the processor against it: {data}",
            ratio=theirs / arithmetic,
            explanation=f"{1e3 * arithmetic:.2f} ms a page on {where}; pixel_values differ by at most "
            f"{max(differences):.0e}",
        ),
    ]  # fmt: skip


def mean_seconds(work: list[Callable[[], object]], clock: Callable[[], float] = time.process_time) -> float:
    """For one of some pieces of work, on average, each the best of several runs."""
    return sum(best_seconds(each, clock=clock) for each in work) / len(work)
