"""A training step on packed rows against the same samples in padded batches: tokens per second and peak memory.

Packed rows are computed with packed attention and with sdpa and its mask over all pairs of a row; padded batches with
sdpa, as transformers does it.

The samples are pages to transcribe and chats about pages (../shared/data, else synthetic ones), in random order.
Packed rows are made as for any job; two samples fill one. Padded batches have as many rows as the same number of tokens
holds on average, each row filled up to the longest of its batch, as the processor does it. All ways run forward and
backward of all samples for the sum of their losses, make logits only at positions that some row trains, and find their
inputs on the device. Loss and gradients are the same, or the benchmark fails.

The model is a Qwen2-VL with random weights, small where there is no GPU, and wide for its depth: in a narrow one
attention would outweigh all else. Its vocabulary has only the tokens that occur: of all 150,000 the logits would be
most of a small model's time. Peak memory is what torch holds at most beside weights and inputs, in fp32: on the CPU by
the allocations that its profiler lists, on a GPU by its own count. Time is the best of two steps of each way, which
take turns: CPU time of one thread, on a GPU the clock's, in bf16.
"""

import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import ProfilerActivity, profile
from transformers import PretrainedConfig

from benchmarks.bench_lengths import one_thread
from benchmarks.common import Result, best_seconds
from mmray.batches.micro_batch import MicroBatch, Place, mask, render
from mmray.families import family_of, load_processor
from mmray.families.base import positions_in_sample
from mmray.families.packed_attention import PACKED_FLASH
from mmray.images import TilingPolicy, load_image
from mmray.loss.rules import IGNORE_INDEX
from mmray.loss.settings import RoleLoss
from mmray.loss.sources import label_maker
from mmray.packing.settings import PackingSettings
from mmray.prepared.dataset import window_bins
from mmray.prepared.window import pack_window, samples_table
from mmray.rows.encode import Encoder
from mmray.rows.files import source_files
from mmray.rows.plan import plan_chunks
from mmray.rows.read import read_piece
from mmray.rows.sample import Sample
from mmray.rows.settings import DataSettings
from mmray.synthetic.models import small_config
from mmray.synthetic.pages import write_pages
from mmray.synthetic.processors import write_processor
from mmray.training.attention_paths import plain_attention
from mmray.training.loss import packed_loss_sum
from mmray.training.model import build_model
from mmray.training.settings import ModelSettings

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
LONGEST = 4096
"""Samples with more tokens are left out."""
REPEATS = 2
SEVEN_SAMPLES = (312, 871, 540, 655, 448, 703, 567)
"""Lengths of the samples of a row of 4,096 tokens."""
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
WHOLE = TilingPolicy()
CPU = torch.device("cpu")

Inputs = dict[str, Any]
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much a device is given."""

    num_samples: int
    token_capacity: int
    """Of a bin."""
    text: dict[str, int]
    vision: dict[str, int]


CPU_SCALE = Scale(
    num_samples=4,
    token_capacity=4096,
    text={
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    vision={"depth": 1, "embed_dim": 64, "num_heads": 1, "mlp_ratio": 2},
)  # fmt: skip
GPU_SCALE = Scale(
    num_samples=64,
    token_capacity=8192,
    text={
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 8, "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    vision={"depth": 8, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4},
)  # fmt: skip
"""The widths of Qwen2-VL-2B, a quarter of its layers."""


@dataclass(frozen=True)
class Batch:
    """Arguments of one forward pass, with its labels, int64 [rows, L]."""

    inputs: Inputs
    labels: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        inputs = {name: _to(value, device, dtype) for name, value in self.inputs.items()}
        return Batch(inputs, self.labels.to(device))


def _to(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


class Samples:
    """Encoded rows, and both ways to batch them."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        if SHARED.is_dir():
            self.name, root, self.processor = "shared pages and chats", SHARED, SHARED / "processors/qwen2-vl"
            files = SHARED / "pages.jsonl", SHARED / "chat.jsonl"
        else:
            pages = write_pages(folder / "pages", 40)
            self.name, root, self.processor = "synthetic pages and chats", pages.folder, folder / "processor"
            write_processor(self.processor, "qwen2_vl")
            files = pages.pages.path, pages.chat.path
        self.family = family_of(load_processor(self.processor))
        self.labels = label_maker(RoleLoss(), self.family)
        self.packing = PackingSettings(token_capacity=scale.token_capacity, visual_capacity=scale.token_capacity)
        usable = [sample for sample in self._encoded(files, root) if len(sample.input_ids) <= LONGEST]
        self.lengths = shuffled([len(sample.input_ids) for sample in usable])
        self.samples = shuffled(spread(usable, scale.num_samples))

    def _encoded(self, files: Sequence[Path], root: Path) -> list[Sample]:
        data = DataSettings.model_validate({
            "train": [
                {"files": str(file), "kind": kind, "image_root": str(root)}
                for file, kind in zip(files, ("pretrain", "chat"), strict=True)
            ]
        })  # fmt: skip
        chunks = plan_chunks(source_files(data.train), window_rows=512, chunk_rows=512)
        rows = [row for chunk in chunks for piece in chunk.pieces for row in read_piece(piece)]
        encoder = Encoder(data, data.train, self.family, WHOLE, self.packing)
        return [sample for sample in encoder.encode(rows) if isinstance(sample, Sample)]

    @property
    def rows(self) -> int:
        """Of a padded batch."""
        return max(2, self.packing.token_capacity * len(self.lengths) // sum(self.lengths))

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.input_ids) for sample in self.samples)

    def vocabulary(self) -> Tensor:
        """The token ids that occur, and those that a configuration names, ascending: their places are the new ids."""
        named = [*self.family.media_token_ids, *self.family.tokenizer.all_special_ids]
        return torch.from_numpy(np.unique(np.concatenate([*(each.input_ids for each in self.samples), named])))

    def config(self, scale: Scale) -> PretrainedConfig:
        """Of a model of this scale with that vocabulary."""
        vocabulary = self.vocabulary()
        whole = small_config("qwen2_vl", self.processor).to_dict()

        def renumbered(values: dict[str, Any]) -> dict[str, Any]:
            ids = {name: value for name, value in values.items() if name.endswith("_token_id") and value is not None}
            return {name: int(torch.searchsorted(vocabulary, value)) for name, value in ids.items()}

        text = scale.text | renumbered(whole["text_config"]) | {"vocab_size": len(vocabulary)}
        config = small_config(
            "qwen2_vl", self.processor, text_config=text, vision_config=scale.vision, **renumbered(whole)
        )  # fmt: skip
        config._attn_implementation = PACKED_FLASH
        return config

    def packed(self, config: PretrainedConfig) -> list[Batch]:
        bins = window_bins(pack_window(samples_table(self.samples), self.packing, self.labels))
        batches = []
        for number, each in enumerate(bins):
            rendered = render([each], Place(0, 0, number), self.family, WHOLE)
            batch = MicroBatch(mask(rendered, self.family, self.labels, CPU), self.family)
            batches.append(self._renumbered(batch.model_inputs(CPU, torch.float32, config), batch.labels))
        return batches

    def padded(self) -> list[Batch]:
        starts = range(0, len(self.samples), self.rows)
        return [self._padded(self.samples[start : start + self.rows]) for start in starts]

    def _padded(self, samples: Sequence[Sample]) -> Batch:
        """What the processor makes of some samples with `padding=True`."""
        ids = [torch.from_numpy(sample.input_ids).long() for sample in samples]
        labels = [self._labels(sample) for sample in samples]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=self.family.padding_id)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
            "mm_token_type_ids": (input_ids == self.family.image_token_id).int(),
        }
        pictures = [load_image(image.uri) for sample in samples for image in sample.images]
        if pictures:
            inputs |= self.family.processor.image_processor(pictures, return_tensors="pt")
        return self._renumbered(inputs, pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX))

    def _labels(self, sample: Sample) -> Tensor:
        count = len(sample.input_ids)
        given_mask = sample.given_mask if len(sample.given_mask) else np.zeros(count, dtype=bool)
        lengths, rules = np.asarray([count]), np.asarray([sample.rule])
        return torch.from_numpy(self.labels.of_arrays(sample.input_ids, lengths, rules, given_mask, sample.blocks))

    def _renumbered(self, inputs: Inputs, labels: Tensor) -> Batch:
        vocabulary = self.vocabulary()
        numbers = torch.searchsorted(vocabulary, labels).where(labels != IGNORE_INDEX, IGNORE_INDEX)
        return Batch(inputs | {"input_ids": torch.searchsorted(vocabulary, inputs["input_ids"])}, numbers)


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """So many of the samples, of lengths that are spread as those of all."""
    by_length = sorted(samples, key=lambda sample: len(sample.input_ids))
    count = min(count, len(by_length))
    return [by_length[(2 * number + 1) * len(by_length) // (2 * count)] for number in range(count)]


def shuffled(values: Iterable[Value]) -> list[Value]:
    values = list(values)
    random.Random(0).shuffle(values)
    return values


def padded_tokens(lengths: Sequence[int], rows: int) -> int:
    """Tokens of all batches of so many rows, each as long as its longest."""
    batches = [lengths[start : start + rows] for start in range(0, len(lengths), rows)]
    return sum(len(batch) * max(batch) for batch in batches)


# -------------------------------------------------------------------- a step


def loss_sum(model: torch.nn.Module, batch: Batch) -> Tensor:
    """`packed_loss_sum`; for several rows the same, with logits for all rows at the positions that any row trains."""
    if len(batch.labels) == 1:
        return packed_loss_sum(model, batch.inputs, batch.labels)  # bounds of samples are told, whoever reads them
    targets = batch.labels[:, 1:]
    positions = (targets != IGNORE_INDEX).any(0).nonzero().squeeze(1)
    logits = model(**batch.inputs, use_cache=False, logits_to_keep=positions).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets[:, positions].flatten(), reduction="sum")


def step(model: torch.nn.Module, batches: Sequence[Batch]) -> float:
    """Forward and backward of all batches; returns the sum of their losses when all is done."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss = loss_sum(model, batch)
        loss.backward()
        total = total.to(loss.device) + loss.detach().double()
    return float(total)


def gradient(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@dataclass(frozen=True)
class Measured:
    """One step in fp32. peak_bytes: what torch held at most, beside what it held before."""

    loss: float
    gradient: Tensor
    peak_bytes: int

    @classmethod
    def of(cls, model: torch.nn.Module, batches: Sequence[Batch]) -> "Measured":
        losses: list[float] = []
        model.zero_grad(set_to_none=True)
        peak = peak_bytes(lambda: losses.append(step(model, batches)))
        whole = gradient(model)
        model.zero_grad(set_to_none=True)
        return cls(losses[0], whole, peak)

    def differences(self, other: "Measured") -> tuple[float, float]:
        """Of loss and gradients, relative to the other's."""
        slope = (self.gradient - other.gradient).norm() / other.gradient.norm()
        return abs(self.loss / other.loss - 1), float(slope)


def peak_bytes(work: Callable[[], object]) -> int:
    """What torch holds at most during some work, beside what it holds before; this must not be freed by it."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    memory = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    return int(np.cumsum([number for _, number in memory]).max())


# -------------------------------------------------------------------- results


def run() -> list[Result]:
    with one_thread():
        return on_this_machine()


def on_this_machine() -> list[Result]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = GPU_SCALE if device.type == "cuda" else CPU_SCALE
    with tempfile.TemporaryDirectory() as folder:
        samples = Samples(Path(folder), scale)
        config = samples.config(scale)
        ways = {"packed": samples.packed(config), "padded": samples.padded()}
    model = build_model(ModelSettings(config=config.to_dict(), dtype="fp32", attention="packed"), device=device)
    ways = {way: [batch.to(device, torch.float32) for batch in batches] for way, batches in ways.items()}
    step(model, [min(ways["packed"], key=lambda batch: batch.labels.numel())])  # what comes once counts for no way
    measured = {"packed": Measured.of(model, ways["packed"])}
    with plain_attention(model):
        measured |= {"sdpa": Measured.of(model, ways["packed"]), "padded": Measured.of(model, ways["padded"])}
    differences = [measured["packed"].differences(measured[way]) for way in ("sdpa", "padded")]
    loss, slope = (max(numbers) for numbers in zip(*differences))
    equal = f"losses differ by {loss:.0e}, gradients by {slope:.0e}"
    if not (loss < LOSS_TOLERANCE and slope < GRADIENT_TOLERANCE):
        raise AssertionError(f"packed and padded are not the same: {equal}")
    if device.type == "cuda":
        model.to(torch.bfloat16)
        ways = {way: [batch.to(device, torch.bfloat16) for batch in batches] for way, batches in ways.items()}
    seconds = seconds_by_turns(model, ways | {"sdpa": ways["packed"]})
    peaks = {way: each.peak_bytes / 1e6 for way, each in measured.items()}
    return [*results(samples, ways, seconds, peaks, equal), many_samples(model, device)]


def seconds_by_turns(model: torch.nn.Module, ways: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
    """Time of a step by its way, the best of some that take turns: a machine's speed changes while they run."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds = dict.fromkeys(ways, math.inf)
    for _ in range(REPEATS):
        for way, batches in ways.items():
            with nullcontext() if way == "packed" else plain_attention(model):
                seconds[way] = min(seconds[way], best_seconds(partial(step, model, batches), 1, clock=clock))
    return seconds


def many_samples(model: torch.nn.Module, device: torch.device) -> Result:
    """Packed attention against sdpa on one row of 4,096 tokens in seven samples without pictures, at random."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(SEVEN_SAMPLES)
    starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(vocabulary, (1, int(lengths.sum())), generator=generator)
    places = positions_in_sample(lengths).expand(4, 1, -1)
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": places, "cu_seq_lens_q": starts}
    inputs |= {"cu_seq_lens_k": starts, "max_length_q": max(SEVEN_SAMPLES), "max_length_k": max(SEVEN_SAMPLES)}
    labels = ids.where(torch.rand(ids.shape, generator=generator) < 0.1, IGNORE_INDEX)
    labels[0, starts[:-1]] = IGNORE_INDEX
    batch = Batch(inputs, labels).to(device, torch.float32)
    losses = {"packed": step(model, [batch])}
    with plain_attention(model):
        losses["sdpa"] = step(model, [batch])
    seconds = seconds_by_turns(model, {"packed": [batch], "sdpa": [batch]})
    if abs(losses["packed"] / losses["sdpa"] - 1) > LOSS_TOLERANCE:
        raise AssertionError(f"packed attention and sdpa are not the same: {losses}")
    return Result(
        name=f"tokens per second of a step, packed attention against sdpa: {len(lengths)} samples in a row",
        ratio=seconds["sdpa"] / seconds["packed"],
        goal=1.9,
        explanation=f"{ids.numel() / seconds['packed']:,.0f} a second against {ids.numel() / seconds['sdpa']:,.0f}; "
        f"{int(lengths.min())} to {int(lengths.max())} tokens, no pictures",
    )


def results(
    samples: Samples, ways: Mapping[str, Sequence[Batch]], seconds: Mapping[str, float], peaks: Mapping[str, float],
    equal: str,
) -> list[Result]:  # fmt: skip
    speed = {way: samples.num_tokens / each for way, each in seconds.items()}
    computed = {way: sum(batch.labels.numel() for batch in batches) for way, batches in ways.items()}
    padding = {way: 1 - samples.num_tokens / count for way, count in computed.items()}
    where = "the GPU" if torch.cuda.is_available() else "one CPU thread"
    capacity, rows = samples.packing.token_capacity, samples.rows
    data = f"{len(samples.samples)} {samples.name}"
    of_all = padded_tokens(samples.lengths, rows)
    return [
        Result(
            name=f"tokens per second of a step, packed against padded: {data}",
            ratio=speed["packed"] / speed["padded"],
            goal=1.5,
            explanation=f"{speed['packed']:,.0f} a second against {speed['padded']:,.0f} on {where}, padding not "
            f"counted; {equal}",
        ),
        Result(
            name=f"tokens per second of a step, packed attention against sdpa on packed rows: {data}",
            ratio=speed["packed"] / speed["sdpa"],
            goal=1.5,
            explanation=f"{speed['packed']:,.0f} a second against {speed['sdpa']:,.0f} on {where}; "
            f"peak memory {peaks['packed']:,.0f} MB against {peaks['sdpa']:,.0f}",
        ),
        Result(
            name=f"peak memory of a step, padded against packed: {data}",
            ratio=peaks["padded"] / peaks["packed"],
            explanation=f"{peaks['packed']:,.0f} MB in rows of up to {capacity:,} tokens against "
            f"{peaks['padded']:,.0f} in batches of {len(ways['padded'][0].labels)} samples, beside "
            "weights and inputs",
        ),
        Result(
            name=f"tokens computed in a step, padded against packed: {data}",
            ratio=computed["padded"] / computed["packed"],
            explanation=f"{padding['padded']:.1%} of them padding against {padding['packed']:.1%}",
        ),
        Result(
            name=f"tokens computed, padded against packed: all {len(samples.lengths)} {samples.name}",
            ratio=of_all / sum(samples.lengths),
            explanation=f"{1 - sum(samples.lengths) / of_all:.1%} of them padding in batches of {rows} samples, none "
            "in packed rows",
        ),
    ]
