"""No sample sees another: a bin gives the logits, the loss and the gradients of its samples alone.

Alone is the reference: the same model on what the real processor makes of one row, with the processor's own masks and
the model's own positions. Packed is mmray's whole way: rows, encoder, packer, render, mask, pixels on the device.
"""

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmray.batch import MicroBatch, Place, mask, render
from mmray.families import Family
from mmray.images import cut_tiles, load_image, plan_tiles
from mmray.masks.labels import IGNORE_INDEX
from mmray.masks.settings import MaskingSettings, label_maker
from mmray.packing_settings import PackingSettings
from mmray.prepared import PreparedDataset
from mmray.synthetic.processors import MODEL_TYPES
from mmray.training.loss import packed_loss_sum
from tests.mmray.families.small_models import VISION, small_model
from tests.mmray.noise import noise
from tests.mmray.preparing import Preparation, write_rows

CPU, FP32 = torch.device("cpu"), torch.float32
TOLERANCE = 1e-5
"""Relative to the largest value."""

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


@dataclass
class Case:
    """Rows of all layouts in one bin, and each alone."""

    model: Any
    family: Family
    folder: Path
    prepared: PreparedDataset

    def micro_batch(self, *bins: int | None) -> MicroBatch:
        chosen = [None if number is None else self.prepared.bin(number) for number in bins]
        rendered = render(chosen, Place(0, 0, 0), self.family, self.prepared.tiling)
        return MicroBatch(mask(rendered, self.family, label_maker(MaskingSettings(), self.family), CPU), self.family)

    def samples(self, bins: list[int]) -> Iterator[tuple[dict[str, Tensor], slice]]:
        """What the processor makes of each row of some bins, in their order, and where its sample is in their row."""
        rows = {row["id"]: row for row in CHATS + PAGES}
        start = 0
        for number in bins:
            packed = self.prepared.bin(number)
            for row_id, length in zip(packed.sample_ids, packed.sample_lengths):
                yield self._alone(rows[row_id]), slice(start, start + int(length))
                start += int(length)

    def _alone(self, row: dict[str, Any]) -> dict[str, Tensor]:
        processor, unit = self.family.processor, self.family.placeholder_unit
        if "messages" in row:
            text = processor.apply_chat_template(row["messages"], tokenize=False)
        else:
            text = row["text"].replace("<image>", unit)
        pages = [load_image(self.folder / name) for name in row["images"]]
        plans = [plan_tiles(page.size, self.prepared.tiling) for page in pages]
        head, *tails = text.split(unit)
        for plan, tail in zip(plans, tails, strict=True):
            head += "".join(f"{label}\n{unit}" if label else unit for label in plan.labels) + tail
        tiles = [tile for page, plan in zip(pages, plans) for tile in cut_tiles(page, plan)]
        return processor(text=[head], images=tiles or None, return_tensors="pt", **self.family.processor_kwargs)


@pytest.fixture(scope="module")
def make_case(processor_folders, processors, tmp_path_factory):
    """Builds a case; kept for the module."""

    @functools.cache
    def make(
        model_type: str, attention: str = "sdpa", *, tiled: bool = False, token_capacity: int = 100_000,
        text_only: bool = False,
    ) -> Case:  # fmt: skip
        folder = tmp_path_factory.mktemp("rows")
        for seed, (name, size) in enumerate(PICTURES.items()):
            noise(size, seed).save(folder / name)
        chats, pages = ([row for row in rows if not (text_only and row["images"])] for rows in (CHATS, PAGES))
        side = 64 if model_type in ("idefics3", "smolvlm") else 56
        tiling = {"preset": "ocr_pages", "tile_size": (side, side), "overview": (side, side), "labels": True}
        preparation = Preparation(
            processors[model_type],
            {"files": write_rows(folder / "chat.jsonl", chats), "kind": "chat"},
            {"files": write_rows(folder / "pages.jsonl", pages), "kind": "pretrain", "add_eos": False},
            tiling=tiling if tiled else {},
            packing=PackingSettings(token_capacity=token_capacity, visual_capacity=100_000),
        )
        model = small_model(model_type, processor_folders[model_type], attention)
        return Case(model, preparation.family, folder, preparation.write(folder / "prepared"))

    return make


# ---- Comparing ----


def logits_of(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **{"use_cache": False, **options}).logits[0]


def gradients(model: Any, *losses: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def loss_alone(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The sum of the cross-entropies of one sample, from the logits of the sample alone."""
    logits = model(**inputs, use_cache=False).logits[0]
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
        assert gradient is not None, name
        assert found[name] is not None, name
        errors[name] = float((found[name] - gradient).norm()) / max(float(gradient.norm()), 1e-3 * largest)
    return max(errors.values())


def logits_error(case: Case, batch: MicroBatch, bins: list[int], **options: Any) -> float:
    """The largest error of the logits of any sample of a micro-batch."""
    packed = logits_of(case.model, batch.model_inputs(CPU, FP32), **options)
    errors = []
    for inputs, where in case.samples(bins):
        alone = logits_of(case.model, inputs)
        assert alone.abs().max() > 1  # at a smaller scale no error would show
        errors.append(error(packed[where], alone))
    return max(errors)


def alone(case: Case, batch: MicroBatch, bins: list[int]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The summed loss of the samples alone, and its gradients. Labels are those of the micro-batch."""
    losses = [loss_alone(case.model, inputs, batch.labels[0, where]) for inputs, where in case.samples(bins)]
    return torch.stack(losses).detach().sum(), copy.deepcopy(gradients(case.model, *losses))


# ---- Packed equals unpacked ----


@pytest.mark.parametrize(("attention", "tiled"), [("sdpa", False), ("eager", False), ("sdpa", True)])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_bin_equals_its_samples(make_case, model_type, attention, tiled):
    case = make_case(model_type, attention, tiled=tiled)
    assert len(case.prepared) == 1
    assert set(case.prepared.bin(0).sample_ids) == {row["id"] for row in CHATS + PAGES}
    check_equal(case, 0)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_micro_batch_of_two_bins_equals_the_bins_apart(make_case, model_type):
    case = make_case(model_type, token_capacity=130)
    assert len(case.prepared) >= 2
    both = check_equal(case, 0, 1)
    apart = [case.micro_batch(number) for number in (0, 1)]
    losses = [packed_loss_sum(case.model, each.model_inputs(CPU, FP32), each.labels) for each in apart]
    together = packed_loss_sum(case.model, both.model_inputs(CPU, FP32), both.labels)
    assert together.item() == pytest.approx(sum(loss.item() for loss in losses), rel=TOLERANCE)


def check_equal(case: Case, *bins: int) -> MicroBatch:
    """Tokens, logits, summed loss and gradients of a micro-batch of some bins are those of the samples alone."""
    batch = case.micro_batch(*bins)
    inputs = batch.model_inputs(CPU, FP32)
    for expected, where in case.samples(list(bins)):
        assert torch.equal(expected["input_ids"][0], inputs["input_ids"][0, where])
    assert logits_error(case, batch, list(bins)) < TOLERANCE
    expected_loss, expected_gradients = alone(case, batch, list(bins))
    loss = packed_loss_sum(case.model, inputs, batch.labels)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=TOLERANCE)
    assert gradient_error(gradients(case.model, loss), expected_gradients) < TOLERANCE
    return batch


# ---- Controls: the comparison sees what it is there for ----


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_with_the_cache_on_samples_see_each_other(make_case, model_type, attention):
    case = make_case(model_type, attention)
    assert logits_error(case, case.micro_batch(0), [0], use_cache=True) > 0.1


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_with_one_row_of_positions_samples_see_each_other(make_case, model_type):
    case = make_case(model_type)
    batch = case.micro_batch(0)
    inputs = batch.model_inputs(CPU, FP32)
    packed = logits_of(case.model, {**inputs, "position_ids": inputs["position_ids"][1:]})
    errors = [error(packed[where], logits_of(case.model, inputs)) for inputs, where in case.samples([0])]
    assert max(errors) > 0.1


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_with_first_tokens_trained_gradients_are_others(make_case, model_type):
    case = make_case(model_type)
    batch = case.micro_batch(0)
    expected_loss, expected_gradients = alone(case, batch, [0])
    inputs = batch.model_inputs(CPU, FP32)
    labels = batch.labels.clone()
    for _, where in case.samples([0]):
        labels[0, where.start] = inputs["input_ids"][0, where.start]
    loss = packed_loss_sum(case.model, inputs, labels)
    assert loss.item() != pytest.approx(expected_loss.item(), rel=1e-2)
    assert gradient_error(gradients(case.model, loss), expected_gradients) > 1e-2


# ---- The added picture of micro-batches without one ----


def is_vision(model_type: str, parameter: str) -> bool:
    return VISION[model_type] in parameter or "connector" in parameter


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_added_picture_changes_nothing_and_runs_the_vision_tower(make_case, model_type):
    case = make_case(model_type, text_only=True)
    (number,) = range(len(case.prepared))
    batch = case.micro_batch(None, number)
    inputs = batch.model_inputs(CPU, FP32)
    length = len(case.prepared.bin(number).input_ids)
    assert inputs["pixel_values"].numel() > 0
    assert inputs["input_ids"].shape[1] > length
    assert (batch.labels[0, length:] == IGNORE_INDEX).all()
    assert logits_error(case, batch, [number]) < TOLERANCE

    expected_loss, expected = alone(case, batch, [number])
    loss = packed_loss_sum(case.model, inputs, batch.labels)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=TOLERANCE)
    found = gradients(case.model, loss)
    seen = {name for name in found if is_vision(model_type, name)}
    assert seen
    for name in seen:
        assert expected.pop(name) is None
        assert found[name] is not None, name
        assert not found[name].any(), name
    assert gradient_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_empty_micro_batch_weighs_nothing_and_runs_everything(make_case, model_type):
    case = make_case(model_type)
    batch = case.micro_batch(None, None)
    assert batch.bins == []
    loss = packed_loss_sum(case.model, batch.model_inputs(CPU, FP32), batch.labels)
    assert loss.item() == 0
    for name, gradient in gradients(case.model, loss).items():
        assert gradient is not None, name
        assert not gradient.any(), name
