"""Experts train with their router's balancing loss: transformers' own of each sample, as a mean over a global batch."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmray.batches.micro_batch import MicroBatch
from mmray.errors import UserError
from mmray.families import family_of
from mmray.training.loss import count_trained_tokens, packed_loss_sum
from mmray.training.router_loss import Routers, router_coefficient
from tests.mmray.families.layouts import CPU, PICTURES, micro_batch
from tests.mmray.families.small_models import small_model

EXPERTS = ("qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe")
COEFFICIENT = 5.0

Case = tuple[Any, list[MicroBatch]]


@pytest.fixture(params=EXPERTS)
def case(
    request: pytest.FixtureRequest, zoo_folder: Callable[[str], Path], zoo_processor: Callable[[str], Any]
) -> Case:
    """A model of experts, and micro-batches of one sample, and of none."""
    name = request.param
    model = small_model(name, zoo_folder(name), "eager")
    family = family_of(zoo_processor(name), model_type=model.config.model_type)
    return model, [micro_batch(family, pictures) for pictures in (PICTURES[:1], PICTURES[1:4], None)]


def inputs(model: Any, batch: MicroBatch) -> dict[str, Any]:
    return batch.model_inputs(CPU, torch.float32, model.config)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_a_sample_s_loss_and_gradient_are_transformers_own(case: Case) -> None:
    model, (one, three, none) = case
    routers = Routers(model)
    for batch in (one, three):
        with routers.recording():
            loss_sum = packed_loss_sum(model, inputs(model, batch), batch.labels)
        tokens, trained = batch.num_tokens, count_trained_tokens(batch.labels)
        balancing = routers.balancing_sum(batch.trained_segments) / tokens
        model.config.get_text_config().router_aux_loss_coef = COEFFICIENT
        theirs = model(**inputs(model, batch), labels=batch.labels, use_cache=False, output_router_logits=True)
        assert balancing.item() == pytest.approx(theirs.aux_loss.item(), rel=1e-5)
        expected = gradients(model, theirs.loss)
        found = gradients(model, loss_sum / trained + COEFFICIENT * balancing)
        plain = gradients(model, packed_loss_sum(model, inputs(model, batch), batch.labels) / trained)
        (gate, *_) = [name for name in found if "gate.weight" in name and "shared" not in name]
        torch.testing.assert_close(found[gate], expected[gate], rtol=1e-3, atol=1e-5)
        assert (found[gate] - plain[gate]).norm() > 0.01 * plain[gate].norm()
    with routers.recording():
        model(**inputs(model, none), use_cache=False)
    assert routers.balancing_sum(none.trained_segments).item() == 0


def test_samples_of_a_row_count_by_their_tokens_and_skipped_ones_do_not(case: Case) -> None:
    model, (one, *_) = case
    routers, length = Routers(model), one.num_tokens
    logits = [torch.randn(2 * length + 7, 4, generator=torch.Generator().manual_seed(layer)) for layer in range(3)]

    def summed(segments: list[int], rows: slice) -> float:
        routers._logits = [layer[rows] for layer in logits]
        return routers.balancing_sum(torch.tensor(segments)).item()

    first, second = slice(0, length), slice(length, 2 * length)
    whole = [0] * length + [1] * length + [-1] * 7
    alone = summed([0] * length, first), summed([0] * length, second)
    assert summed(whole, slice(None)) == pytest.approx(sum(alone), rel=1e-6)
    assert summed([-1] * length + [1] * length + [-1] * 7, slice(None)) == pytest.approx(alone[1], rel=1e-6)
    assert alone[0] != pytest.approx(alone[1], rel=1e-3)
    skipped = MicroBatch(replace(one.masked, skipped=np.ones_like(one.masked.skipped)), one.family)
    assert set(skipped.trained_segments.tolist()) == {-1}
    assert set(one.trained_segments.tolist()) == {0}


def test_the_factor_is_the_model_s_the_job_s_or_the_checkpoint_s(case: Case) -> None:
    model, _ = case
    model.config.get_text_config().router_aux_loss_coef = 0.25
    assert router_coefficient("model", model, None, resumes=False) == 0.25
    assert router_coefficient(0.5, model, None, resumes=False) == 0.5
    assert router_coefficient(None, model, 0.25, resumes=True) is None
    assert router_coefficient("model", model, None, resumes=True) is None  # a run of an earlier version
    assert router_coefficient("model", model, 0.125, resumes=True) == 0.125
    assert router_coefficient(0.5, model, None, resumes=True) == 0.5


def test_a_model_without_experts_has_none(zoo_folder: Callable[[str], Path]) -> None:
    model = small_model("qwen2_vl", zoo_folder("qwen2_vl"))
    assert router_coefficient("model", model, None, resumes=False) is None
    with pytest.raises(UserError, match=r"training\.router_loss is 0\.1, but a qwen2_vl has no balancing loss"):
        router_coefficient(0.1, model, None, resumes=False)
