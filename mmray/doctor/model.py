"""Checks packing and losses on a small random copy of the job's model.

The copy has the classes, kinds of layers and attention of the configured model (`shrink`). It gets a few samples of
different layouts, made by the job's processor, tiling, packer and masks. Its weights are enlarged for the comparison of
packed with unpacked samples: as initialised, attention is nearly even, and no mistake would show.
"""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig

from mmray.base.words import counted, one_line
from mmray.batches.micro_batch import Masked, MicroBatch, Place, mask, packed_row, render
from mmray.config.job import Job
from mmray.doctor.findings import Finding, failed, failed_by, guarded, not_applicable, passed
from mmray.doctor.shrink import shrunken
from mmray.families import Family
from mmray.images import TilingPolicy
from mmray.loss.labels import LabelMaker
from mmray.loss.rules import IGNORE_INDEX
from mmray.packing.settings import PackingSettings
from mmray.prepared import Bin
from mmray.prepared.dataset import window_bins
from mmray.prepared.window import pack_window, samples_table
from mmray.rows.encode import Encoder
from mmray.rows.read import RawRow
from mmray.rows.sample import Sample
from mmray.rows.settings import DatasetSettings, DataSettings
from mmray.training.loss import count_trained_tokens, packed_loss_sum
from mmray.training.model import build_model

FRESH, CACHE, PICTURES_SEEN, LABELS = "loss at step 0", "cache", "pictures are seen", "labels"
PACKED, ACCUMULATION = "packed = unpacked", "accumulation steps"

CPU = torch.device("cpu")
ENLARGED = 6.0
OPEN_GATE, OPEN_WEIGHTS = 0.5, 0.1
"""Replacement of scalars that start at zero, and standard deviation of matrices that do."""
TOLERANCE = 1e-4
"""Tolerance of logits, relative to the largest."""
SPLIT_TOLERANCE = 1e-3
"""Relative tolerance of the mean loss and the gradient's norm between splits of a batch."""
FRESH_LOSS = 0.15
"""Largest relative distance of the loss of random weights from ln(vocabulary)."""
PICTURES = ((160, 220), (220, 120), (60, 60))
TEXTS = (
    "<image>\nTotal 12.50\nPlease pay by the end of the month.",
    "TIMETABLE from Ashford. All trains run daily.",
    "First <image> and then <image>, of another size.",
    "<image> A label of Station Road 5.",
)


MISFIT = (
    "values of the model's configuration fit neither one another nor the processor: compare model.config (or "
    "config.json in model.path) and the processor's files with the model's own"
)


def examine_model(job: Job, family: Family, policy: TilingPolicy, config: PretrainedConfig) -> Iterator[Finding]:
    """Yield the findings of the checks that run the small copy."""
    try:
        copy = _SmallCopy.of(job, family, policy, config)
    except Exception as error:  # noqa: BLE001 (a configuration of any class is taken apart)
        yield failed_by("small copy", error)
        return
    if problem := copy.forward_problem():
        yield failed("small copy", problem, MISFIT)
        return
    yield guarded(FRESH, copy.fresh_loss)
    copy.enlarge()
    yield guarded(CACHE, copy.cache)
    yield guarded(PICTURES_SEEN, copy.pictures_seen)
    yield guarded(LABELS, copy.labels_and_loss)
    yield guarded(PACKED, copy.packed_equals_unpacked)
    yield guarded(ACCUMULATION, copy.accumulation)


@dataclass
class _SmallCopy:
    """The small model, and samples for it in bins of one and in one packed bin."""

    model: Any
    family: Family
    policy: TilingPolicy
    labels: LabelMaker
    single_bins: list[Bin]
    packed_bin: Bin
    described: str
    packing_problem: str | None
    """The reason why the model cannot pack; None when it can."""

    @classmethod
    def of(cls, job: Job, family: Family, policy: TilingPolicy, config: PretrainedConfig) -> "_SmallCopy":
        small = shrunken(config)
        attention = "sdpa" if job.model.attention == "flash_attention_2" else job.model.attention or "packed"
        model = build_model(
            job.model.model_copy(
                update={
                    "path": None, "allow_missing": (), "quantize": None, "config": small.to_dict(), "dtype": "fp32",
                    "attention": attention, "gradient_checkpointing": False, "processor": job.model.processor_source,
                }
            )
        )  # fmt: skip
        labels = LabelMaker((), (), "turn", family.media_token_ids)
        samples = _samples(family, policy)
        layers = model.config.get_text_config().num_hidden_layers
        return cls(
            model=model,
            family=family,
            policy=policy,
            labels=labels,
            single_bins=_bins(samples, family, labels, "none"),
            packed_bin=_bins(samples, family, labels, "bins")[0],
            described=f"a copy with {layers} text layers and random weights, {attention} attention on the CPU in fp32",
            packing_problem=family.packing_problem(
                model.config,
                sample_tokens=job.packing.token_capacity,
                row_tokens=job.packing.token_capacity * job.training.micro_batch_bins,
            ),
        )

    def enlarge(self) -> None:
        """Enlarge the weights, so that mistakes show.

        As initialised, attention is nearly even, and some models ignore images (the projector of Gemma 3, the gates of
        Llama 3.2).
        """
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                closed = not parameter.any()
                if closed and parameter.numel() == 1:
                    parameter.fill_(OPEN_GATE)
                elif closed and parameter.dim() > 1:
                    parameter.normal_(std=OPEN_WEIGHTS, generator=generator)
                elif parameter.dim() > 1:
                    parameter.mul_(ENLARGED)

    def batch(self, *bins: Bin) -> MicroBatch:
        rendered = render(bins, Place(0, 0, 0), self.family, self.policy)
        return MicroBatch(mask(rendered, self.family, self.labels, CPU), self.family)

    def inputs(self, batch: MicroBatch) -> dict[str, Any]:
        return batch.model_inputs(CPU, torch.float32, self.model.config)

    def logits(self, inputs: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            return self.model(**inputs, use_cache=False).logits[0]

    def step(self, split: Sequence[Sequence[Bin]]) -> tuple[float, float]:
        """The mean loss of a global batch and the norm of its gradient, as a training step computes them.

        split: the bins of each micro-batch. The sum of each micro-batch is scaled by the trained tokens of all
        (`TrainingEngine.step`). The gradient is that of vectors alone (gains, biases): all layers have some, and they
        take little memory.
        """
        batches = [self.batch(*bins) for bins in split]
        scale = 1 / max(1, sum(int(count_trained_tokens(batch.labels)) for batch in batches))
        vectors = [parameter for parameter in self.model.parameters() if parameter.dim() == 1]
        gradients = [torch.zeros_like(vector) for vector in vectors]
        loss = 0.0
        for batch in batches:
            part = packed_loss_sum(self.model, self.inputs(batch), batch.labels) * scale
            loss += float(part.detach())
            for total, gradient in zip(gradients, torch.autograd.grad(part, vectors, allow_unused=True), strict=True):
                if gradient is not None:
                    total += gradient
        return loss, float(torch.nn.utils.get_total_norm(gradients))

    # ---------------------------------------------------------------- checks

    def fresh_loss(self) -> Finding:
        batch = self.batch(self.single_bins[0])
        with torch.no_grad():
            total = packed_loss_sum(self.model, self.inputs(batch), batch.labels)
        loss = float(total) / int(count_trained_tokens(batch.labels))
        expected = math.log(self.model.config.get_text_config().vocab_size)
        detail = f"{loss:.2f} with random weights; ln(vocabulary) is {expected:.2f} ({self.described})"
        if abs(loss - expected) < FRESH_LOSS * expected:
            return passed(FRESH, detail)
        return failed(FRESH, detail, "the model starts far from even odds: see initializer_range in its configuration")

    def cache(self) -> Finding:
        blind = "with a cache, transformers does not see packed samples"
        parts = {"model": self.model.config, "text model": self.model.config.get_text_config()}
        switched_on = [name for name, part in parts.items() if part.to_dict().get("use_cache")]
        if switched_on:
            return failed(
                CACHE, f"use_cache is on in the configuration of the {' and the '.join(switched_on)}: {blind}"
            )
        with torch.no_grad():
            output = self.model(**self.inputs(self.batch(self.single_bins[0])), use_cache=False)
        if output.get("past_key_values") is not None:
            return failed(CACHE, f"the model returns a cache all the same: {blind}")
        return passed(CACHE, "use_cache is off in the configurations of model and text model; no cache comes back")

    def pictures_seen(self) -> Finding:
        """Check that logits change when a picture changes, and only from the picture on."""
        masked = max((self.batch(single).masked for single in self.single_bins), key=_first_of_last_picture)
        first = _first_of_last_picture(masked)
        before, after = (
            self.logits(self.inputs(MicroBatch(version, self.family))) for version in (masked, _other_last_tile(masked))
        )
        change = (after - before).abs().amax(dim=-1) / before.abs().max()
        earlier, later = float(change[:first].max()), float(change[first:].max())
        detail = (
            f"with another picture at token {first:,} logits change by {later:.0e} of the largest from there on, by "
            f"{earlier:.0e} before it ({self.described})"
        )
        if not later > 10 * TOLERANCE:
            return failed(PICTURES_SEEN, detail, "the model does not see its pictures: please report the model")
        if not (earlier < TOLERANCE or self.family.looks_ahead):
            return failed(PICTURES_SEEN, detail, "tokens see what comes after them: please report the model")
        return passed(PICTURES_SEEN, detail)

    def forward_problem(self) -> str | None:
        """The error that the model raises for a batch of text and pictures; None where it computes logits."""
        try:
            self.logits(self.inputs(self.batch(self.packed_bin if not self.packing_problem else self.single_bins[0])))
        except Exception as error:  # noqa: BLE001 (the code of any model)
            return f"the model stops at its first batch: {type(error).__name__}: {one_line(error)}"
        return None

    def labels_and_loss(self) -> Finding:
        """Check that labels are the tokens themselves, and that the loss is that of the next token."""
        batch = self.batch(self.single_bins[0])
        ids, labels = torch.from_numpy(batch.masked.input_ids.astype(np.int64)), batch.labels[0]
        trained = labels != IGNORE_INDEX
        wrong = int((labels[trained] != ids[trained]).sum())
        if wrong:
            detail = f"{wrong} of {int(trained.sum())} labels are not the token in their place"
            return failed(LABELS, detail, "please report the family and the job file")
        inputs = self.inputs(batch)
        plain = float(cross_entropy(self.logits(inputs)[:-1], labels[1:], ignore_index=IGNORE_INDEX))
        with torch.no_grad():
            packed_loss = float(packed_loss_sum(self.model, inputs, batch.labels)) / int(
                count_trained_tokens(batch.labels)
            )
        detail = f"loss {packed_loss:.4f}, and {plain:.4f} from all logits, each against the next token"
        if _close(packed_loss, plain):
            return passed(LABELS, f"{int(trained.sum())} labels are the tokens in their places; {detail}")
        return failed(LABELS, detail, "labels are shifted against logits: please report the model")

    def packed_equals_unpacked(self) -> Finding:
        if self.packing_problem:
            return not_applicable(PACKED, f"this model takes one sample a row: {self.packing_problem}")
        batch = self.batch(self.packed_bin)
        right, naive = self.error(self.inputs(batch)), self.error(self.naive_inputs(batch))
        detail = (
            f"largest difference of logits {right:.0e} of the largest, {naive:.0e} if packed naively "
            f"({counted(len(self.single_bins), 'sample')} in one row; {self.described})"
        )
        if not right < TOLERANCE:
            return failed(PACKED, detail, "samples of a row see each other: set packing.mode: none")
        if not naive > 100 * TOLERANCE:
            return failed(PACKED, detail, "the comparison cannot tell right from wrong here; please report the model")
        return passed(PACKED, detail)

    def error(self, inputs: dict[str, Any]) -> float:
        """The largest difference of a packed row's logits from those of its samples alone, relative to the largest."""
        packed = self.logits(inputs)
        errors, start = [], 0
        for single in self._order():
            alone = self.logits(self.inputs(self.batch(single)))
            length = int(single.sample_lengths[0])
            packed_logits, expected = packed[start : start + length], alone[:length]
            errors.append(float((packed_logits - expected).abs().max() / expected.abs().max()))
            start += length + self.family.sample_gap
        return max(errors)

    def naive_inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """The inputs of a row as if it were one sample; pictures stay with their samples: some models count them."""
        masked = batch.masked
        whole = replace(
            masked,
            lengths=np.asarray([len(masked.input_ids)], dtype=np.int32),
            padding=np.zeros(1, dtype=bool),
        )
        positions = self.family.position_ids(packed_row(whole, CPU)).numpy()
        return self.inputs(MicroBatch(replace(whole, position_ids=positions), self.family))

    def accumulation(self) -> Finding:
        if self.packing_problem:
            return not_applicable(
                ACCUMULATION, "this model takes one sample a row, so every split of a batch has the same micro-batches"
            )
        first, *others = self.single_bins
        splits = ([[self.packed_bin]], [[first], others], [[single] for single in self.single_bins])
        steps = {len(split): self.step(split) for split in splits}
        (loss, norm), *other_steps = steps.values()
        detail = "; ".join(f"{number}: loss {a:.5f}, gradient {b:.5g}" for number, (a, b) in steps.items())
        detail = f"{counted(len(self.single_bins), 'sample')} in micro-batches, {detail}"
        if all(_close(loss, other) and _close(norm, other_norm) for other, other_norm in other_steps):
            return passed(ACCUMULATION, detail)
        return failed(ACCUMULATION, detail, "the step depends on how a batch is split; please report the model")

    def _order(self) -> list[Bin]:
        """The bins of one sample, in the order of the samples in the packed bin."""
        by_id = {single.sample_ids[0]: single for single in self.single_bins}
        return [by_id[sample_id] for sample_id in self.packed_bin.sample_ids]


def _first_of_last_picture(masked: Masked) -> int:
    """Place of the first token of a row's last picture; -1 without a picture."""
    return int(masked.blocks[-1, 0]) if len(masked.blocks) else -1


def _other_last_tile(masked: Masked) -> Masked:
    """The row with the last tile's pixels inverted."""
    frames = int(masked.tiles[-1, 3])
    values = int(masked.frame_sizes[-frames:].astype(np.int64).prod(axis=1).sum()) * 3
    pixels = masked.pixels.copy()
    pixels[-values:] = 255 - pixels[-values:]
    return replace(masked, pixels=pixels)


def _close(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=SPLIT_TOLERANCE)


def _samples(family: Family, policy: TilingPolicy) -> list[Sample]:
    """Make samples of different layouts, with the job's tiling."""
    dataset = DatasetSettings(files=("doctor",), kind="pretrain", add_eos=False)
    packing = PackingSettings(token_capacity=2**30, visual_capacity=2**30)
    encoder = Encoder(DataSettings(train=(dataset,)), (dataset,), family, policy, packing)
    pictures = [_picture(size, seed) for seed, size in enumerate(PICTURES)]
    rows = []
    for number, text in enumerate(TEXTS):
        count = text.count("<image>")
        if count or family.takes_text_only:
            images = [pictures[(number + k) % len(pictures)] for k in range(count)]
            rows.append(RawRow(f"doctor:{number}", 0, {"id": str(number), "text": text, "images": images}))
    samples = encoder.encode(rows)
    return [sample for sample in samples if isinstance(sample, Sample)]


def _picture(size: tuple[int, int], seed: int) -> bytes:
    """Make a picture of random pixels, as PNG."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "png")
    return buffer.getvalue()


def _bins(samples: list[Sample], family: Family, labels: LabelMaker, mode: Any) -> list[Bin]:
    packing = PackingSettings(mode=mode, token_capacity=2**30, visual_capacity=2**30, bucket_fill=1)
    return window_bins(pack_window(samples_table(samples), packing, labels, family.sample_gap))
