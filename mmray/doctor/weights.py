"""Checks the model's weights: that its files hold all of them, and the loss that they give on the first rows.

The loss is computed only when the machine has memory for the weights.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from mmray.base.words import counted
from mmray.batches.micro_batch import MicroBatch, Place, Rendered, mask, render
from mmray.config.job import Job
from mmray.doctor.findings import Finding, failed, not_applicable, passed
from mmray.doctor.rows import FirstRows
from mmray.errors import UserError
from mmray.loss.sources import label_maker
from mmray.prepared import Bin
from mmray.prepared.dataset import window_bins
from mmray.prepared.window import pack_window, samples_table
from mmray.training.loss import packed_loss_sum
from mmray.training.model import build_model, check_weights
from mmray.training.weights import UnknownWeights

NAMES, CHECK = "weights", "loss of the weights"
USUAL_LOSS = (0.5, 2.0)
PLAUSIBLE_LOSS = (0.05, 4.0)
"""Range of a plausible loss, in nats a token.

Below it, the question contains the answer, or the model was trained on the rows. Above it, template, processor or
weights are another model's: random weights with a vocabulary of 150,000 give 11.9.
"""
MAX_TOKENS = 4096
MEMORY_SHARE = 0.7
DECODING_REMEDY = "mend or leave out the pictures: training would stop at them"
MEMORY_INFO = Path("/proc/meminfo")


def examine_names(job: Job) -> Finding:
    """Check that the model's files hold every weight in its shape, and no other weight; loads none."""
    if job.model.path is None:
        return not_applicable(NAMES, "the model starts from random weights")
    try:
        exempt = check_weights(job.model)
    except UnknownWeights as reason:
        return not_applicable(NAMES, f"{reason}; workers judge them before they load them")
    held = f"the files of {job.model.path} hold every weight of the model, in its shape, and no other"
    return passed(NAMES, f"{held}, but as model.allow_missing says: {exempt}" if exempt else held)


def examine_weights(job: Job, rows: FirstRows) -> Finding:
    """Check the mean loss of the first rows, up to MAX_TOKENS tokens, on the CPU."""
    if job.model.path is None:
        return not_applicable(CHECK, "the model starts from random weights")
    folder = Path(job.model.path)
    if not folder.is_dir():
        return not_applicable(CHECK, f"the weights of {job.model.path} are not a folder of this machine")
    size, free = _weights_bytes(folder), _free_bytes()
    if size > MEMORY_SHARE * free:
        return not_applicable(CHECK, f"the weights take {size / 1e9:.1f} GB, this machine has {free / 1e9:.1f} GB free")
    bins, unreadable = _rendered(rows, _bins(job, rows))
    if not bins and not unreadable:
        return not_applicable(CHECK, f"no row of at most {MAX_TOKENS:,} tokens")
    if not bins:
        return failed(CHECK, f"no row can be decoded: {unreadable[0]}", DECODING_REMEDY)
    loss, tokens = _loss(job, rows, bins)
    detail = (
        f"{loss:.2f} over {tokens:,} trained tokens of {counted(len(bins), 'row')}; "
        f"{USUAL_LOSS[0]} to {USUAL_LOSS[1]} is usual"
    )
    if unreadable:
        return failed(CHECK, f"{detail}; {len(unreadable)} more cannot be decoded: {unreadable[0]}", DECODING_REMEDY)
    if PLAUSIBLE_LOSS[0] <= loss <= PLAUSIBLE_LOSS[1]:
        return passed(CHECK, detail)
    lower = "the answer may stand in the question, or the model may have seen these rows"
    higher = "template, processor or weights may be another model's"
    return failed(CHECK, detail, lower if loss < PLAUSIBLE_LOSS[0] else higher)


def _bins(job: Job, rows: FirstRows) -> list[Bin]:
    """Bins of one sample, at most MAX_TOKENS tokens in all."""
    packing = job.packing.model_copy(update={"mode": "none"})
    labels = label_maker(job.loss, rows.family)
    bins, tokens = [], 0
    for sample_bin in window_bins(pack_window(samples_table(rows.samples()), packing, labels)):
        if tokens + len(sample_bin.input_ids) <= MAX_TOKENS:
            bins.append(sample_bin)
            tokens += len(sample_bin.input_ids)
    return bins


def _rendered(rows: FirstRows, bins: Sequence[Bin]) -> tuple[list[Rendered], list[str]]:
    """Render the bins that can be decoded; returns them, and the error messages of the others."""
    rendered, unreadable = [], []
    for sample_bin in bins:
        try:
            rendered.append(render([sample_bin], Place(0, 0, 0), rows.family, rows.policy))
        except UserError as error:
            unreadable.append(str(error))
    return rendered, unreadable


def _loss(job: Job, rows: FirstRows, bins: Sequence[Rendered]) -> tuple[float, int]:
    cpu, labels = torch.device("cpu"), label_maker(job.loss, rows.family)
    attention = "sdpa" if job.model.attention == "flash_attention_2" else job.model.attention
    model = build_model(job.model.model_copy(update={"attention": attention, "gradient_checkpointing": False})).eval()
    total, tokens = 0.0, 0
    for rendered in bins:
        batch = MicroBatch(mask(rendered, rows.family, labels, cpu), rows.family)
        with torch.no_grad():
            total += float(packed_loss_sum(model, batch.model_inputs(cpu, model.dtype, model.config), batch.labels))
        tokens += int(rendered.trained_tokens[0])
    return (total / tokens if tokens else math.nan), tokens


def _weights_bytes(folder: Path) -> int:
    """Size of the weights that are loaded, in bytes; a folder may hold them in two formats."""
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sum(file.stat().st_size for file in files)


def _free_bytes() -> int:
    """Available memory in bytes, including the page cache where the system reports it."""
    if MEMORY_INFO.exists():
        for line in MEMORY_INFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
