"""No sample sees another: a bin gives the logits, the loss and the gradients of its samples alone.

Alone is the reference: the same model on what the real processor makes of one row, with the processor's own masks and
the model's own positions. Packed is mmray's whole way: rows, encoder, packer, render, mask, pixels on the device.

Models that cannot pack refuse with a reason, and are right with one sample a row.
"""

import copy
import functools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmray.batches.micro_batch import MicroBatch, Place, mask, render
from mmray.errors import RowError
from mmray.families import Family, family_of
from mmray.images import cut_tiles, load_image, plan_tiles, render_tiles
from mmray.loss.rules import IGNORE_INDEX
from mmray.loss.sources import label_maker, stop_token_ids
from mmray.packing.settings import PackingSettings
from mmray.prepared import PreparedDataset
from mmray.training.attention_paths import attention_names, plain_attention
from mmray.training.loss import packed_loss_sum
from tests.mmray.families.small_models import small_model
from tests.mmray.families.zoo import ZOO, Member
from tests.mmray.noise import noise
from tests.mmray.preparing import Preparation, write_rows

CPU, FP32 = torch.device("cpu"), torch.float32

IMAGE = {"type": "image"}


def ask(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# ---- Rows of every layout ----

PICTURES = {"wide.png": (150, 90), "tall.png": (60, 170), "small.png": (40, 40)}

CHATS = [
    {"id": "text", "messages": [ask("Who is it for?"), answer("Anna Berg, of course.")], "images": []},
    {
        "id": "two",
        "messages": [
            ask("First: ", IMAGE, " second: ", IMAGE, " What are they?"),
            answer("An invoice and a label."),
            ask("Which is larger?"),
            answer("The first."),
        ],
        "images": ["tall.png", "small.png"],
    },
    {"id": "one", "messages": [ask(IMAGE, "Read it."), answer("Nothing at all.")], "images": ["tall.png"]},
]
PAGES = [
    {"id": "first", "text": "<image>\nTotal 12.50\nPlease pay.", "images": ["wide.png"]},
    {"id": "last", "text": "A label of Station Road 5: <image>", "images": ["small.png"]},
    {"id": "plain", "text": "TIMETABLE from Ashford. All trains run daily.", "images": []},
]


MORE_PAGES = [
    {"id": "both", "text": "Which? <image> and <image>\nAn invoice and a label.", "images": ["tall.png", "small.png"]},
    {"id": "again", "text": "<image>\n\nNothing at all.", "images": ["tall.png"]},
]
"""For models without chats."""


ROWS = {row["id"]: row for row in CHATS + PAGES + MORE_PAGES}


@dataclass
class Case:
    """Rows of all layouts in one bin, and each alone."""

    member: Member
    model: Any
    family: Family
    folder: Path
    prepared: PreparedDataset
    processed: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    """What the processor made of rows, by their ids and lengths."""

    def micro_batch(self, *bins: int | None) -> MicroBatch:
        chosen = [None if number is None else self.prepared.bin(number) for number in bins]
        rendered = render(chosen, Place(0, 0, 0), self.family, self.prepared.tiling)
        return MicroBatch(mask(rendered, self.family, label_maker("sampled", self.family), CPU), self.family)

    def inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """The arguments of the model's forward."""
        return batch.model_inputs(CPU, FP32, self.model.config)

    def samples(self, bins: list[int]) -> Iterator[tuple[dict[str, Any], slice]]:
        """What the processor makes of each row of some bins, in their order, and where its sample is in their row."""
        start = 0
        for number in bins:
            packed = self.prepared.bin(number)
            for row_id, length in zip(packed.sample_ids, packed.sample_lengths):
                key = (row_id, int(length))
                if key not in self.processed:
                    self.processed[key] = self._alone(ROWS[row_id], int(length))
                yield self.processed[key], slice(start, start + int(length))
                start += int(length) + self.family.sample_gap

    def _alone(self, row: dict[str, Any], length: int) -> dict[str, Any]:
        unit = self.family.placeholder_unit
        if "messages" in row:
            text = self.family.processor.apply_chat_template(row["messages"], tokenize=False)
        else:
            text = row["text"].replace("<image>", unit)
        pages = [load_image(self.folder / name) for name in row["images"]]
        plans = [plan_tiles(page.size, self.prepared.tiling) for page in pages]
        head, *tails = text.split(unit)
        for plan, tail in zip(plans, tails, strict=True):
            head += "".join(f"{label}\n{unit}" if label else unit for label in plan.labels) + tail
        tiles = [tile for page, plan in zip(pages, plans) for tile in cut_tiles(page, plan)]
        bos = self.family.tokenizer.bos_token
        special = not (bos and "messages" in row and text.startswith(bos))
        output = self.family.process(head, tiles, return_tensors="pt", add_special_tokens=special)
        if output["input_ids"].shape[1] < length:  # the token by which the model stops, which the template leaves out
            (stop,) = self.family.tokenizer.convert_ids_to_tokens(stop_token_ids(self.family)[:1])
            output = self.family.process(head + stop, tiles, return_tensors="pt", add_special_tokens=special)
        return self.member.alone(dict(output))


@pytest.fixture(scope="module")
def make_case(zoo_folder, zoo_processor, tmp_path_factory):
    """Builds a case, with packed attention where no other is given; kept for the module. Those with another attention
    have the same rows."""

    @functools.cache
    def make(name: str, attention: str = "", **rows: Any) -> Case:
        member = ZOO[name]
        if member.missing_for_model:
            pytest.skip(f"a {name} needs {', '.join(member.missing_for_model)}")
        if attention in ("", "packed"):
            return prepare(name, **rows)
        return replace(prepare(name, **rows), model=small_model(name, zoo_folder(name), attention))

    @functools.cache
    def prepare(
        name: str, *, tiled: bool = False, token_capacity: int = 100_000, text_only: bool = False
    ) -> Case:  # fmt: skip
        member = ZOO[name]
        folder = tmp_path_factory.mktemp("rows")
        for seed, (picture, size) in enumerate(PICTURES.items()):
            noise(size, seed).save(folder / picture)
        family = family_of(zoo_processor(name), tiled=tiled, model_type=member.model_type)
        all_pages = PAGES if member.turns else PAGES + MORE_PAGES
        chats, pages = (rows_for(family, rows, text_only=text_only) for rows in (CHATS, all_pages))
        datasets = [{"files": write_rows(folder / "pages.jsonl", pages), "kind": "pretrain", "add_eos": False}]
        if member.turns:
            datasets.insert(0, {"files": write_rows(folder / "chat.jsonl", chats), "kind": "chat"})
        preparation = Preparation(
            family,
            *datasets,
            tiling={**(member.tiling or {}), "exact_pixels": True} if tiled else {},
            packing=PackingSettings(
                mode="none" if member.refuses else "bins", token_capacity=token_capacity, visual_capacity=100_000
            ),
        )
        model = small_model(name, zoo_folder(name), "packed")
        return Case(member, model, preparation.family, folder, preparation.write(folder / "prepared"))

    return make


def rows_for(family: Family, rows: list[dict[str, Any]], *, text_only: bool) -> list[dict[str, Any]]:
    """Those rows that the family takes."""
    rows = [row for row in rows if not (text_only and row["images"])]
    return [row for row in rows if row["images"] or family.takes_text_only]


# ---- Comparing ----


def logits_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The logits of a row; without the bounds of samples they are computed as by transformers alone."""
    with torch.no_grad(), nullcontext() if "cu_seq_lens_q" in inputs else plain_attention(model):
        return model(**{"use_cache": False} | inputs).logits[0]


def gradients(model: Any, *losses: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_alone(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of the cross-entropies of one sample, from the logits of the sample alone."""
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def gradient_error(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> float:
    """The largest error of any parameter's gradient, relative to that gradient.

    The keys' biases have no gradient but rounding (attention does not change when all scores of a query move alike):
    they are compared with the largest gradient of all.
    """
    largest = max(float(gradient.norm()) for gradient in expected.values() if gradient is not None)
    errors = {}
    for name, gradient in expected.items():
        if gradient is None:  # the vision tower, of samples without an image: at most the added picture ran it
            assert found[name] is None or not found[name].any(), name
            continue
        assert found[name] is not None, name
        errors[name] = float((found[name] - gradient).norm()) / max(float(gradient.norm()), 1e-3 * largest)
    return max(errors.values())


def logits_error(case: Case, batch: MicroBatch, bins: list[int], logits: list[Tensor] | None = None) -> float:
    """The largest error of the logits of any sample of a micro-batch. logits: of each alone, where they are known."""
    packed = logits_of(case.model, case.inputs(batch))
    errors = []
    for number, (inputs, where) in enumerate(case.samples(bins)):
        alone = logits_of(case.model, inputs) if logits is None else logits[number].detach()
        assert alone.abs().max() > 1  # at a smaller scale no error would show
        errors.append(error(packed[where], alone))
    return max(errors)


def alone(case: Case, batch: MicroBatch, bins: list[int]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The summed loss of the samples alone, and its gradients. Labels are those of the micro-batch."""
    loss, gradients_alone, _ = alone_with_logits(case, batch, bins)
    return loss, gradients_alone


def alone_with_logits(
    case: Case, batch: MicroBatch, bins: list[int]
) -> tuple[Tensor, dict[str, Tensor | None], list[Tensor]]:
    """The summed loss of the samples alone, its gradients, and the logits of each."""
    with plain_attention(case.model):
        logits = [case.model(**inputs, use_cache=False).logits[0] for inputs, _ in case.samples(bins)]
    losses = [loss_alone(found, batch.labels[0, where]) for found, (_, where) in zip(logits, case.samples(bins))]
    return torch.stack(losses).detach().sum(), copy.deepcopy(gradients(case.model, *losses)), logits


# ---- Packed equals unpacked ----


@pytest.mark.proves("packing")
def test_a_bin_equals_its_samples(make_case, packing):
    for attention in (*(["packed"] if packing.by_sample else []), *packing.attentions):
        case = make_case(packing.name, attention)
        assert len(case.prepared) == 1
        check_equal(case, 0)


def test_the_parts_that_compute_samples_apart(make_case, member):
    """What transformers gives the layers of each part decides; sdpa, or eager, is what computed them before."""
    found = attention_names(make_case(member.name).model)
    expected = {part: "packed" if part in member.by_sample else member.attentions[0] for part in ("text", "vision")}
    if member.attentions[0] == "eager":
        expected["vision"] = "sdpa"
    assert found == expected


@pytest.mark.proves("packing")
def test_a_bin_of_tiled_pages_equals_its_samples(make_case, packing_tiles):
    check_equal(make_case(packing_tiles.name, tiled=True), 0)


@pytest.mark.proves("packing")
def test_a_micro_batch_of_two_bins_equals_the_bins_apart(make_case, packing):
    lengths = make_case(packing.name).prepared.bin(0).sample_lengths
    case = make_case(packing.name, token_capacity=int(max(lengths.max(), lengths.sum() * 2 // 3)))
    assert len(case.prepared) >= 2
    both = check_equal(case, 0, 1)
    apart = [case.micro_batch(number) for number in (0, 1)]
    losses = [packed_loss_sum(case.model, case.inputs(each), each.labels) for each in apart]
    together = packed_loss_sum(case.model, case.inputs(both), both.labels)
    assert together.item() == pytest.approx(sum(loss.item() for loss in losses), rel=case.member.tolerance)


@pytest.mark.proves("packing")
def test_what_cannot_pack_says_so_and_is_right_apart(make_case, refusing):
    case = make_case(refusing.name)
    problem = case.family.packing_problem(case.model.config, sample_tokens=100_000, row_tokens=100_000)
    assert problem is not None
    assert refusing.refuses in problem
    assert len(case.prepared) > 1
    for number in range(len(case.prepared)):
        assert len(case.prepared.bin(number).sample_ids) == 1
        check_equal(case, number)


def check_equal(case: Case, *bins: int) -> MicroBatch:
    """Tokens, logits, summed loss and gradients of a micro-batch of some bins are those of the samples alone."""
    batch = case.micro_batch(*bins)
    inputs = case.inputs(batch)
    assert {row_id for number in bins for row_id in case.prepared.bin(number).sample_ids} <= ROWS.keys()
    for expected, where in case.samples(list(bins)):
        assert torch.equal(expected["input_ids"][0], inputs["input_ids"][0, where])
    expected_loss, expected_gradients, logits = alone_with_logits(case, batch, list(bins))
    assert logits_error(case, batch, list(bins), logits) < case.member.tolerance
    loss = packed_loss_sum(case.model, inputs, batch.labels)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=case.member.tolerance)
    assert gradient_error(gradients(case.model, loss), expected_gradients) < case.member.tolerance
    return batch


# ---- Samples whose picture cannot be used ----


def broken_page(source, plan, *, max_pixels):
    """`render_tiles` where the small picture is truncated."""
    if str(source).endswith("small.png"):
        raise RowError("image_corrupt", f"{source}: image file is truncated")
    return render_tiles(source, plan, max_pixels=max_pixels)


@pytest.mark.proves("packing")
def test_a_skipped_sample_changes_nothing_for_the_others(make_case, member):
    """Loss and gradients are those of the same row, its picture sound and its labels masked."""
    case = make_case(member.name)
    numbers = range(len(case.prepared))
    chosen = next(n for n in numbers if "small.png" in str(case.prepared.bin(n).images))
    packed = case.prepared.bin(chosen)
    sound = case.micro_batch(chosen)
    rendered = render([packed], Place(0, 0, 0), case.family, case.prepared.tiling, broken_page, on_bad_row="reject")
    skipped = MicroBatch(mask(rendered, case.family, label_maker("sampled", case.family), CPU), case.family)

    broken = {row_id for row_id in packed.sample_ids if "small.png" in ROWS[row_id]["images"]}
    assert {each.id for each in skipped.skipped} == broken
    assert all(each.reason == "image_corrupt" and "truncated" in each.message for each in skipped.skipped)
    masked = sound.labels.clone()
    for row_id, (_, where) in zip(packed.sample_ids, case.samples([chosen]), strict=True):
        if row_id in broken:
            masked[0, where] = IGNORE_INDEX
    assert torch.equal(skipped.labels, masked)
    changed = {"labels", "skipped", "problems", "pixels"}
    for name in (masked_field.name for masked_field in fields(skipped.masked)):
        ours, theirs = (getattr(each.masked, name) for each in (skipped, sound))
        assert name in changed or np.array_equal(ours, theirs), name
    assert not np.array_equal(skipped.masked.pixels, sound.masked.pixels)
    if len(packed.sample_ids) > len(broken):
        loss = packed_loss_sum(case.model, case.inputs(skipped), skipped.labels)
        found = copy.deepcopy(gradients(case.model, loss))
        expected = packed_loss_sum(case.model, case.inputs(sound), masked)
        assert loss.item() == pytest.approx(expected.item(), rel=case.member.tolerance)
        assert gradient_error(found, gradients(case.model, expected)) < case.member.tolerance


# ---- Controls: the comparison sees what it is there for ----


def test_packed_naively_samples_see_each_other(make_case, packing):
    for attention in packing.attentions:
        case = make_case(packing.name, attention)
        inputs = packing.naive(case.inputs(case.micro_batch(0)))
        packed = logits_of(case.model, inputs)
        errors = [error(packed[where], logits_of(case.model, alone)) for alone, where in case.samples([0])]
        assert max(errors) > 0.1


@pytest.mark.parametrize(
    "name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe", "glm_ocr", "paddleocr_vl"]
)
def test_without_the_text_s_positions_samples_see_each_other(make_case, name):
    """M-RoPE: with the three rows of time, height and width alone."""
    case = make_case(name, "sdpa")
    batch = case.micro_batch(0)
    inputs = case.inputs(batch)
    packed = logits_of(case.model, {**inputs, "position_ids": inputs["position_ids"][1:]})
    errors = [error(packed[where], logits_of(case.model, inputs)) for inputs, where in case.samples([0])]
    assert max(errors) > 0.1


def test_parameters_called_unused_are(make_case, member):
    if not member.unused:
        pytest.skip(f"{member.name} uses all its parameters")
    case = make_case(member.name)
    unused = {name: parameter for name, parameter in case.model.named_parameters() if not parameter.requires_grad}
    assert all(any(part in name for name in unused) for part in member.unused)
    for parameter in unused.values():
        parameter.requires_grad_(True)
    batch = case.micro_batch(0)
    try:
        found = gradients(case.model, packed_loss_sum(case.model, case.inputs(batch), batch.labels))
    finally:
        for parameter in unused.values():
            parameter.requires_grad_(False)
    assert [name for name in unused if found[name] is not None] == []


def test_with_first_tokens_trained_gradients_are_others(make_case, packing):
    case = make_case(packing.name)
    batch = case.micro_batch(0)
    expected_loss, expected_gradients = alone(case, batch, [0])
    inputs = case.inputs(batch)
    labels = batch.labels.clone()
    for _, where in case.samples([0]):
        labels[0, where.start] = inputs["input_ids"][0, where.start]
    loss = packed_loss_sum(case.model, inputs, labels)
    assert loss.item() != pytest.approx(expected_loss.item(), rel=1e-2)
    assert gradient_error(gradients(case.model, loss), expected_gradients) > 1e-2


# ---- The added picture of micro-batches without one ----


def test_the_added_picture_changes_nothing_and_runs_the_vision_tower(make_case, member, member_family):
    if not member_family().takes_text_only:
        pytest.skip(f"{member.name} takes no row without an image")
    case = make_case(member.name, text_only=True)
    number = 0
    batch = case.micro_batch(None, number)
    inputs = case.inputs(batch)
    length = max(where.stop for _, where in case.samples([number]))
    assert inputs["pixel_values"].numel() > 0
    assert inputs["input_ids"].shape[1] > length
    assert (batch.labels[0, length:] == IGNORE_INDEX).all()
    expected_loss, expected, logits = alone_with_logits(case, batch, [number])
    assert logits_error(case, batch, [number], logits) < case.member.tolerance

    loss = packed_loss_sum(case.model, inputs, batch.labels)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=case.member.tolerance)
    found = gradients(case.model, loss)
    seen = {name for name in found if any(part in name for part in member.vision)}
    assert seen
    for name in seen:
        assert expected.pop(name) is None
        assert found[name] is not None, name
        assert not found[name].any(), name
    assert gradient_error(found, expected) < case.member.tolerance


def test_an_empty_micro_batch_weighs_nothing_and_runs_everything(make_case, member):
    case = make_case(member.name)
    batch = case.micro_batch(None, None)
    assert batch.bins == []
    loss = packed_loss_sum(case.model, case.inputs(batch), batch.labels)
    assert loss.item() == 0
    for name, gradient in gradients(case.model, loss).items():
        assert gradient is not None, name
        assert not gradient.any(), name
