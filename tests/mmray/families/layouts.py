"""Micro-batches with different numbers, sizes and orders of pictures."""

import torch
from PIL import Image

from mmray.batches.micro_batch import MicroBatch, Place, mask, render
from mmray.families import Family
from mmray.packing.settings import PackingSettings
from mmray.prepared import Bin
from mmray.prepared.dataset import window_bins
from mmray.prepared.window import pack_window, samples_table
from tests.mmray.noise import noise
from tests.mmray.preparing import Preparation, png

CPU = torch.device("cpu")
PICTURES = [noise(size, seed) for seed, size in enumerate([(150, 90), (60, 170), (40, 40), (90, 90), (170, 60)])]
LARGE = PackingSettings(mode="none", token_capacity=2**20, visual_capacity=2**20)

Layout = list[Image.Image] | None
LAYOUTS: dict[str, Layout] = {
    "none but the dummy": None,
    "one": PICTURES[:1],
    "two": PICTURES[:2],
    "two in the other order": PICTURES[1::-1],
    "five": PICTURES,
    "one of another size": PICTURES[4:],
}


def micro_batch(family: Family, pictures: Layout) -> MicroBatch:
    """A sample with these pictures; without any an empty one."""
    preparation = Preparation(family, {"files": "rows.jsonl", "kind": "pretrain", "add_eos": False}, packing=LARGE)
    bins: list[Bin | None] = [None]
    if pictures:
        text = "".join(f"Page {number}: <image>\n" for number in range(len(pictures))) + "Total 12.50. " * len(pictures)
        sample = preparation.sample({"text": text, "images": [png(picture) for picture in pictures]}, verify=False)
        window = pack_window(samples_table([sample]), LARGE, preparation.labels, family.sample_gap)
        bins = list(window_bins(window))
    return MicroBatch(
        mask(render(bins, Place(0, 0, 0), family, preparation.policy), family, preparation.labels, CPU), family
    )
