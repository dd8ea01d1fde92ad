"""The loss by liger-kernel: where it is refused, and on a GPU beside mmray's own."""

import importlib.util
from typing import Any

import pytest
import torch

from mmray.errors import UserError
from mmray.training.deferred_logits import DeferredLogits, Step, deferred_head
from mmray.training.head_loss import HeadLoss
from mmray.training.liger import LigerLoss, check_fused_loss, soft_cap
from mmray.training.model import build_model
from mmray.training.token_losses import Objective, TrainedTokens
from tests.mmray.training import tiny

ON_A_GPU = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None


def test_without_a_gpu_it_is_refused() -> None:
    settings = tiny.training_settings(fused_loss="liger")
    with pytest.raises(
        UserError, match=r"^training.fused_loss: liger runs on CUDA, and this worker trains on cpu; set"
    ):
        check_fused_loss(settings, torch.device("cpu"))
    check_fused_loss(tiny.training_settings(), torch.device("cpu"))


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_without_its_package_it_is_refused() -> None:
    with pytest.raises(UserError, match=r"needs the package liger-kernel: pip install 'mmray\[liger\]'"):
        check_fused_loss(tiny.training_settings(fused_loss="liger"), torch.device("cuda"))


def steps_of(change: Any) -> tuple[Step, ...]:
    """What is written down of a change of logits."""
    model = build_model(tiny.model_settings())
    with deferred_head(model):
        logits = change(model(input_ids=torch.arange(5)[None], use_cache=False).logits)
    assert isinstance(logits, DeferredLogits)
    return logits.steps


def test_it_takes_caps_and_nothing_else() -> None:
    assert soft_cap(steps_of(lambda logits: logits)) is None
    assert soft_cap(steps_of(lambda logits: logits.float())) is None
    assert soft_cap(steps_of(lambda logits: torch.tanh(logits / 30.0) * 30.0)) == 30
    assert soft_cap(steps_of(lambda logits: 30 * (logits.float() / 30).tanh())) == 30
    for change in (lambda logits: logits / 8, lambda logits: torch.tanh(logits / 30) * 20, lambda logits: logits * 2.0):
        with pytest.raises(UserError, match="which liger cannot; set it to null"):
            soft_cap(steps_of(change))


def test_a_head_that_is_no_matrix_is_refused() -> None:
    class Other(torch.nn.Linear):
        pass

    tokens = TrainedTokens(torch.arange(3))
    with pytest.raises(UserError, match="head is no plain matrix"):
        LigerLoss(tokens, Objective()).of_hidden(torch.randn(3, 4, requires_grad=True), Other(4, 9))


@pytest.mark.skipif(not ON_A_GPU, reason="liger-kernel runs on a GPU alone, where it is installed")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("capped", [False, True])
def test_on_a_gpu_it_gives_the_same(dtype: torch.dtype, tolerance: float, capped: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(256, 5_000, bias=False, device="cuda", dtype=dtype)
    rows = (torch.randn(700, 256, generator=generator) * 3).to("cuda", dtype).requires_grad_()
    sets = torch.arange(700, device="cuda") % 3
    tokens = TrainedTokens(torch.randint(5_000, (700,), generator=generator).cuda(), sets, 3)
    steps = steps_of(lambda logits: torch.tanh(logits / 2.0) * 2.0) if capped else ()
    results = []
    for kind in (HeadLoss, LigerLoss):
        work = kind(tokens, Objective(), scale=1 / 700, steps=steps)
        rows.grad = head.weight.grad = None
        loss = work.of_hidden(rows, head)
        (loss / 700).backward()
        results.append((loss.detach(), rows.grad, head.weight.grad, work.measures.set_sums, work.measures.correct))
    (ours, *gradients, sums, correct), (theirs, *others, other_sums, other_correct) = results
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=0)
    torch.testing.assert_close(other_sums, sums, rtol=1e-3, atol=0)
    assert abs(float(other_correct) - float(correct)) <= 2
    for gradient, other in zip(gradients, others, strict=True):
        assert float((gradient - other).norm()) <= tolerance * float(gradient.norm())
