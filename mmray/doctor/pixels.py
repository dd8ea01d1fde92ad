"""Checks that the model gets the pictures of the first rows as its own processor would give them."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mmray.base.words import counted
from mmray.batches.micro_batch import MicroBatch, Place, mask, render
from mmray.batches.render import render_pages
from mmray.doctor.findings import Finding, failed, not_applicable, passed
from mmray.doctor.rows import FirstRows
from mmray.errors import UserError
from mmray.images import render_tiles
from mmray.loss.sources import label_maker
from mmray.prepared import Bin
from mmray.prepared.dataset import window_bins
from mmray.prepared.window import pack_window, samples_table

CHECK = "pixels"
ROWS = 4
LARGEST, MEAN = 0.05, 0.003
"""Largest and mean difference that ways of resizing make, as parts of the values' range: 13 and 0.8 of 255 levels."""


def examine_pixels(rows: FirstRows, config: PretrainedConfig) -> Finding:
    """Compare the pixel inputs of some rows, made as in training, with the processor's for the same tiles.

    The comparison finds patches or tiles in another order, and values with another normalisation.
    """
    compared, largest = 0, 0.0
    for sample_bin in _with_pictures(rows):
        try:
            pages = render_pages(sample_bin, rows.policy, render_tiles, "error")
        except UserError:  # the check "exact lengths" reports it
            continue
        tiles = [tile for image in pages.tiles for tile in image]
        theirs = rows.family.process(" ".join([rows.family.placeholder_unit] * len(tiles)), tiles, return_tensors="pt")
        for name, actual, expected in _pairs(_ours(sample_bin, rows, config), theirs):
            place = f"{name} of row {sample_bin.sample_ids[0]!r} ({sample_bin.sample_sources[0]})"
            if actual.shape != expected.shape:
                return _differs(f"{place}: shape {list(actual.shape)}, the processor's is {list(expected.shape)}")
            span = float(expected.max() - expected.min()) or 1.0
            differences = (actual.to(expected.dtype) - expected).abs().double() / span
            largest = max(largest, float(differences.max()))
            if float(differences.max()) > LARGEST or float(differences.mean()) > MEAN:
                return _differs(
                    f"{place} differs from the processor's by {float(differences.max()):.1%} of its range, by "
                    f"{float(differences.mean()):.1%} on average"
                )
        compared += len(tiles)
    if not compared:
        return not_applicable(CHECK, f"none of the first rows of data.{rows.split} has a picture")
    name = type(rows.family.processor).__name__
    pictures = counted(compared, "picture")
    return passed(CHECK, f"{pictures} compared with those of {name}; largest difference {largest:.0e} of the range")


def _differs(what: str) -> Finding:
    return failed(CHECK, what, "the model would see other pictures than it was made for; please report the processor")


def _with_pictures(rows: FirstRows) -> list[Bin]:
    """The first rows with pictures, the smallest of them, as bins of one sample."""
    samples = sorted((sample for sample in rows.samples() if sample.images), key=lambda sample: sample.visual_tokens)[
        :ROWS
    ]
    packing = rows.job.packing.model_copy(update={"mode": "none"})
    labels = label_maker(rows.job.loss, rows.family)
    return list(window_bins(pack_window(samples_table(samples), packing, labels, allow_empty=True))) if samples else []


def _ours(sample_bin: Bin, rows: FirstRows, config: PretrainedConfig) -> dict[str, Tensor]:
    cpu = torch.device("cpu")
    labels = label_maker(rows.job.loss, rows.family)
    masked = mask(render([sample_bin], Place(0, 0, 0), rows.family, rows.policy), rows.family, labels, cpu)
    return MicroBatch(masked, rows.family).model_inputs(cpu, torch.float32, config)


def _pairs(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, ours, the processor's) of each tensor of pixels or of places of patches that both have."""
    for name in sorted(theirs):
        if name in ours and ("pixel_values" in name or "grid" in name or "position" in name or "aspect" in name):
            yield name, ours[name], torch.as_tensor(theirs[name])
