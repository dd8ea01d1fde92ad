"""Adapters on every kind of model: what they touch, what moves, packed rows, merged and apart."""

import copy
import functools

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from mmray.run.export.adapter import merged_model, write_adapter
from mmray.training.adapter import Adapter, is_adapter, plain_name
from mmray.training.adapter_settings import AdapterSettings
from mmray.training.base_weights import BaseFiles
from mmray.training.loss import packed_loss_sum
from mmray.training.model import build_model
from mmray.training.settings import ModelSettings
from tests.mmray.families.test_packed_equals_unpacked import (
    Case,
    alone,
    error,
    gradient_error,
    gradients,
    logits_of,
    make_case,  # noqa: F401  a fixture
)
from tests.mmray.families.zoo import MODELS, ZOO

PARTS = ("vision", "projector", "language", "embeddings")


class InMemory:
    """Weights of a checkpoint, by name."""

    def __init__(self, state):
        self.state = state

    def read(self, name, dtype):
        return self.state[name].detach().to(dtype).clone()


class Adapted:
    """A member's case, its model adapted in every part: what shares its weight, or has no linear layer, is trained
    whole instead."""

    def __init__(self, case: Case, folder):
        base = case.model
        self.base, self.folder, self.member = base, folder, case.member
        base.save_pretrained(folder)
        tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
        self.settings = AdapterSettings(
            rank=2, alpha=4, parts=PARTS[:3] if tied else PARTS, save_whole=("embeddings",) if tied else ("*norm*",)
        )
        self.model_settings = ModelSettings(path=str(folder), dtype="fp32", attention=case.member.attentions[0])
        self.adapter = Adapter.of(self.model_settings, self.settings, BaseFiles.of(str(folder)))
        self.model = build_model(self.model_settings)
        self.adapter.put_into(self.model, seed=3)
        self.case = Case(case.member, self.model, case.family, case.folder, case.prepared)
        self.trained = {name for name, weight in self.model.named_parameters() if weight.requires_grad}

    def randomise(self):
        """Gives the adapter an effect: as it begins, one of its two matrices is zero."""
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if is_adapter(name):
                    weight.normal_(std=0.1, generator=generator)
                elif weight.requires_grad:
                    weight.mul_(1.1)


@pytest.fixture(scope="module")
def make_adapted(make_case, tmp_path_factory):  # noqa: F811
    @functools.cache
    def make(name):
        return Adapted(make_case(name, ZOO[name].attentions[0]), tmp_path_factory.mktemp("base") / "model")

    return make


@pytest.fixture(params=MODELS)
def adapted(request, make_adapted):
    if missing := ZOO[request.param].missing:
        pytest.skip(f"{request.param} needs {', '.join(missing)}")
    return make_adapted(request.param)


def test_an_adapter_on_every_part(adapted, tmp_path):
    """One test for each member, because a model is built and run for it: it begins as the base, a step moves exactly
    what is trained, packed equals unpacked, and both forms of its export have its logits."""
    case, model = adapted.case, adapted.model
    numbers = range(len(case.prepared))
    number = next(number for number in numbers if case.prepared.bin(number).images)
    batch = case.micro_batch(number)
    inputs = case.inputs(batch)
    assert error(logits_of(model, inputs), logits_of(adapted.base, inputs)) < 1e-6
    adapted.randomise()
    check_packed(adapted, number, batch, inputs)
    check_step(adapted, batch, inputs)
    check_export(adapted, inputs, tmp_path)


def check_packed(adapted, number, batch, inputs):
    case = adapted.case
    expected_loss, expected = alone(case, batch, [number])
    loss = packed_loss_sum(case.model, inputs, batch.labels)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=case.member.tolerance)
    found = gradients(case.model, loss)
    assert found.keys() == adapted.trained
    assert gradient_error(found, expected) < case.member.tolerance


def check_step(adapted, batch, inputs):
    """No frozen weight has a gradient, and of those trained all move whose module has one in the base, which is trained
    whole for that."""
    model = adapted.model
    in_base = gradients(adapted.base, packed_loss_sum(adapted.base, inputs, batch.labels))
    reached = [name for name, gradient in in_base.items() if gradient is not None and gradient.any()]
    before = copy.deepcopy(model.state_dict())
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    model.zero_grad()
    packed_loss_sum(model, inputs, batch.labels).backward()
    assert all(weight.grad is None for weight in model.parameters() if not weight.requires_grad)
    optimizer.step()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved <= adapted.trained
    modules = {name: plain_name(name.split(".lora_")[0]) for name in adapted.trained}
    used = {name for name, module in modules.items() if any(held.startswith(module) for held in reached)}
    assert sorted(used - moved) == []
    assert len(used) > 0.7 * len(modules)
    assert any(part in name for name in moved for part in adapted.member.vision)


def check_export(adapted, inputs, folder):
    model, weights = adapted.model.eval(), InMemory(dict(adapted.model.named_parameters()))
    logits = logits_of(model, inputs)
    assert error(logits, logits_of(adapted.base, inputs)) > 1e-2
    merged = merged_model(adapted.adapter, adapted.model_settings, weights, torch.float32).eval()
    assert merged.state_dict().keys() == adapted.base.state_dict().keys()
    assert error(logits_of(merged, inputs), logits) < adapted.member.tolerance
    write_adapter(adapted.adapter, adapted.model_settings, weights, torch.float32, folder)
    base = AutoModelForImageTextToText.from_pretrained(
        adapted.folder, dtype="auto", attn_implementation=adapted.member.attentions[0]
    )
    loaded = PeftModel.from_pretrained(base, folder).eval()
    assert error(logits_of(loaded, inputs), logits) < adapted.member.tolerance
