"""What the order of bins does to learning: the same model, rows and steps, and the evaluation loss of each order.

    python -m benchmarks.learning                            # every arm, one seed: half an hour of one core
    python -m benchmarks.learning --arms default --seeds 1 --seeds 2

Not part of `make bench`, which is to end in minutes. Every change of the order of bins, or of how bins are packed, is
to be judged by it: what equal work saves in seconds must not be lost in what a step teaches.

A small Qwen2-VL (two layers of width 64, `initializer_range` 0.1: with 0.02 it learns nothing in these steps) is
trained from random weights on 8,000 pictures of four digits and 8,000 series of numbers, in bins of 512 tokens, two
thirds of them text alone; the loss is that of 400 unseen pictures. A guess of the digits is 4 ln(10) / 9 = 1.02 a
token, since of a picture's nine trained tokens four are digits and five are always the same.
"""

import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from PIL import Image, ImageDraw, ImageFont

from mmray.batches.micro_batch import MicroBatch, Place, mask, render
from mmray.families import family_of, load_processor
from mmray.images import TilingPolicy
from mmray.loss.sources import label_maker
from mmray.packing.settings import PackingSettings
from mmray.prepared.dataset import window_bins
from mmray.prepared.window import Window, pack_window, samples_table
from mmray.rows.encode import Encoder
from mmray.rows.read import RawRow
from mmray.rows.sample import Sample
from mmray.rows.settings import DataSettings
from mmray.schedule.balance import BalanceSettings
from mmray.schedule.balanced import BalancedSchedule, BoundSchedule
from mmray.schedule.loads import Loads
from mmray.schedule.schedule import Schedule
from mmray.synthetic.models import small_config
from mmray.synthetic.processors import write_processor
from mmray.training.loss import count_trained_tokens, packed_loss_sum
from mmray.training.model import build_model
from mmray.training.optim import learning_rate, optimizer_groups
from mmray.training.settings import ModelSettings, TrainingSettings
from mmray.training.treatments import stages_of, weight_groups

CELL = 28
"""Pixels of a side of a digit's cell, and of what becomes one visual token."""
CHANCE = 4 * math.log(10) / 9
GLOBAL_BATCH_BINS = 8
WHOLE = TilingPolicy()
CPU = torch.device("cpu")
BALANCE: dict[str, BalanceSettings | None] = {
    "default": BalanceSettings(),
    "null": None,
    "across_batches": BalanceSettings(across_batches=True),
}


@dataclass(frozen=True)
class Size:
    """How much is trained on."""

    pictures: int = 8000
    series: int = 8000
    eval_pictures: int = 400
    steps: int = 450


class Trial:
    """Rows, bins and batches of one seed."""

    def __init__(self, folder: Path, size: Size, seed: int) -> None:
        self.size, self.seed, self.random = size, seed, random.Random(seed)
        self.processor = write_processor(folder / "processor", "qwen2_vl")
        self.family = family_of(load_processor(self.processor))
        self.labels = label_maker("sampled", self.family)
        self.packing = PackingSettings(token_capacity=512, visual_capacity=512)
        self.pictures = folder / "pictures"
        self.pictures.mkdir()
        eval_rows = [self._picture(f"eval-{number}") for number in range(size.eval_pictures)]
        rows = [self._picture(f"train-{number}") for number in range(size.pictures)]
        rows += [self._series() for _ in range(size.series)]
        self.random.shuffle(rows)
        self.windows = [self._window(rows[start : start + 8192]) for start in range(0, len(rows), 8192)]
        self.eval = self._batches([self._window(eval_rows)])
        self.train = self._batches(self.windows)

    def _picture(self, name: str) -> dict[str, Any]:
        """Four digits, each somewhere in its cell, and their transcript."""
        digits = [str(self.random.randrange(10)) for _ in range(4)]
        image = Image.new("L", (4 * CELL, CELL), 255)
        for place, digit in enumerate(digits):
            corner = (place * CELL + self.random.randint(5, 9), self.random.randint(-4, 0))
            ImageDraw.Draw(image).text(corner, digit, fill=0, font=ImageFont.load_default(CELL))
        path = self.pictures / f"{name}.png"
        image.save(path)
        return {"id": name, "text": f"<image>\n{' '.join(digits)}", "images": [str(path)]}

    def _series(self) -> dict[str, Any]:
        start, step = self.random.randint(0, 400), self.random.randint(1, 40)
        return {"text": " ".join(str(start + step * number) for number in range(self.random.randint(6, 10)))}

    @cached_property
    def _encoder(self) -> Encoder:
        dataset = {"files": "rows.jsonl", "kind": "pretrain", "image_root": str(self.pictures)}
        data = DataSettings.model_validate({"train": [dataset]})
        return Encoder(data, data.train, self.family, WHOLE, self.packing)

    def _window(self, rows: Sequence[dict[str, Any]]) -> Window:
        raw = [RawRow(f"rows.jsonl:{line}", 0, row) for line, row in enumerate(rows, start=1)]
        samples = self._encoder.encode(raw)
        assert all(isinstance(sample, Sample) for sample in samples)
        return pack_window(samples_table(samples), self.packing, self.labels)

    def _batches(self, windows: Sequence[Window]) -> list[MicroBatch]:
        bins = [each for window in windows for each in window_bins(window)]
        rendered = (render([each], Place(0, 0, 0), self.family, WHOLE) for each in bins)
        return [MicroBatch(mask(each, self.family, self.labels, CPU), self.family) for each in rendered]

    @cached_property
    def loads(self) -> Loads:
        files = (pq.ParquetFile(pa.BufferReader(window.bins)) for window in self.windows)
        return Loads.joined([Loads.from_footer(file) for file in files])

    def order(self, balance: BalanceSettings | None) -> Schedule | BoundSchedule:
        plain = Schedule(len(self.train), GLOBAL_BATCH_BINS, self.seed, "learning")
        if balance is None:
            return plain
        return BalancedSchedule(plain, balance.for_attention("sdpa")).bound_to(self.loads.take)

    def learned(self, arm: str) -> dict[str, Any]:
        """Train one arm; what came of it."""
        steps = self.size.steps
        settings = TrainingSettings(
            steps=steps, global_batch_bins=GLOBAL_BATCH_BINS, learning_rate=3e-3, warmup_ratio=0.02, seed=self.seed
        )
        config = small_config("qwen2_vl", self.processor, text_config={"initializer_range": 0.1},
                              vision_config={"initializer_range": 0.1}, initializer_range=0.1)  # fmt: skip
        torch.manual_seed(self.seed)
        model = build_model(ModelSettings(config=config.to_dict(), dtype="fp32", attention="sdpa"), device=CPU)
        (stage,) = stages = stages_of(settings, steps)
        groups = weight_groups(model, settings, stages, stage)
        optimizer = torch.optim.AdamW(optimizer_groups(model, groups))
        order, visual = self.order(BALANCE[arm]), []
        began = time.monotonic()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, stage, settings, settings.learning_rate)
            bins = [number for number in order.bins(step) if number is not None]
            visual.append(int(self.loads.visual_tokens[bins].sum()))
            batches = [self.train[number] for number in bins]
            trained = int(sum(count_trained_tokens(batch.labels) for batch in batches))
            for batch in batches:
                (loss_sum(model, batch) / trained).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - began
        return {
            "arm": arm,
            "seed": self.seed,
            "steps": steps,
            "bins": len(self.train),
            "text_bins": round(float((self.loads.visual_tokens == 0).mean()), 3),
            "eval_loss": round(evaluated(model, self.eval), 4),
            "chance": round(CHANCE, 4),
            "visual_tokens_a_step": round(float(np.mean(visual)), 1),
            "their_deviation": round(float(np.std(visual)), 1),
            "seconds": round(seconds),
        }


def loss_sum(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    return packed_loss_sum(model, batch.model_inputs(CPU, torch.float32, model.config), batch.labels)


@torch.no_grad()
def evaluated(model: torch.nn.Module, batches: Sequence[MicroBatch]) -> float:
    """Mean loss of the trained tokens."""
    model.eval()
    total = sum(float(loss_sum(model, batch)) for batch in batches)
    model.train()
    return total / int(sum(count_trained_tokens(batch.labels) for batch in batches))


def main(
    arms: Annotated[list[str], typer.Option(help=f"Of {', '.join(BALANCE)}.")] = list(BALANCE),  # noqa: B006
    seeds: Annotated[list[int], typer.Option(help="Of rows, order and weights.")] = [0],  # noqa: B006
    steps: Annotated[int, typer.Option()] = Size.steps,
    pictures: Annotated[int, typer.Option(help="And as many series.")] = Size.pictures,
) -> None:
    """Print a line of JSON for each arm and seed."""
    torch.set_num_threads(1)
    for seed in seeds:
        with TemporaryDirectory() as folder:
            trial = Trial(Path(folder), Size(pictures=pictures, series=pictures, steps=steps), seed)
            for arm in arms:
                print(json.dumps(trial.learned(arm)), flush=True)


if __name__ == "__main__":
    typer.run(main)
