"""Every part of every kind of model, frozen: a step moves what is trained and nothing else, and recomputes no tower."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from mmray.families import family_of, load_processor, model_parts
from mmray.training.loss import packed_loss_sum
from mmray.training.model import checkpoint_activations
from mmray.training.optim import optimizer_groups
from mmray.training.settings import TrainingSettings
from mmray.training.treatments import freeze, stages_of, weight_groups
from tests.mmray.families.layouts import CPU, PICTURES, micro_batch
from tests.mmray.families.small_models import small_model
from tests.mmray.families.zoo import MODELS, ZOO

PARTS = ("vision", "projector", "language", "embeddings")
MEMBERS = [name for name in MODELS if not ZOO[name].missing and not ZOO[name].missing_for_model]


def frozen_model(name: str, folder: Any, part: str) -> tuple[Any, list[Any]]:
    """A copy of a member's model with a part frozen, and the groups of its optimizer."""
    model = copy.deepcopy(small_model(name, folder, ZOO[name].attentions[0])).requires_grad_(True)
    training = TrainingSettings(steps=1, parts={part: "frozen"}, weight_decay=0.1)
    stages = stages_of(training, 1)
    groups = weight_groups(model, training, stages, stages[0])
    freeze(model, groups)
    return model, groups


@pytest.mark.parametrize("name", MEMBERS)
def test_a_step_moves_what_is_trained_and_nothing_else(name: str, zoo_folder: Any) -> None:
    member, folder = ZOO[name], zoo_folder(name)
    family = family_of(load_processor(folder), model_type=member.model_type)
    batch = micro_batch(family, PICTURES[:1])
    for part in PARTS:
        model, groups = frozen_model(name, folder, part)
        checkpoint_activations(model)
        forwards = _counted(model)
        before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
        optimizer = torch.optim.AdamW(optimizer_groups(model, groups), lr=1e-2)
        packed_loss_sum(model, batch.model_inputs(CPU, torch.float32, model.config), batch.labels).backward()
        frozen = set(model_parts(model).parameters(model)[part])
        assert frozen
        for key, weight in model.named_parameters():
            assert (weight.grad is not None) == (key not in frozen) or any(word in key for word in member.unused), key
        optimizer.step()
        moved = {key for key, weight in model.named_parameters() if not torch.equal(weight, before[key])}
        wanted = {key for key, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
        assert wanted <= moved
        assert not moved & frozen
        calls = {kind: {n for layer, n in forwards.items() if _is_of(model, layer, kind)} for kind in PARTS}
        if part == "vision":
            assert calls["vision"] <= {1}, "a tower without trained weights is computed once"
        assert calls["language"] <= {2}, "and what a gradient passes is recomputed, frozen or not"
        assert len({id(state) for state in optimizer.state.values()}) <= len(before) - len(frozen)


def _counted(model: Any) -> Counter[str]:
    """How often each layer of a model is computed from now on, recomputed too: counted at its first module, because
    transformers checkpoints what is below the layer's own hooks."""
    forwards = Counter[str]()
    for name, layer in model.named_modules():
        if isinstance(layer, GradientCheckpointingLayer):
            first = next(layer.children())
            first.register_forward_pre_hook(lambda *_, name=name: forwards.update([name]))
    return forwards


def _is_of(model: Any, layer: str, part: str) -> bool:
    """Whether a layer's weights are all of a part."""
    names = {key for key, _ in model.named_parameters() if key.startswith(f"{layer}.")}
    return bool(names) and names <= set(model_parts(model).parameters(model)[part])
