"""Every kind of model in the zoo: its head runs a few tokens at a time, and the loss is that of its own logits."""

import functools
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmray.training import head_loss
from mmray.training.loss import packed_loss
from mmray.training.model import build_model
from mmray.training.settings import ModelSettings
from tests.mmray.families.zoo import ZOO

LENGTH, ROWS_OF_HEAD, ROWS_OF_LOSS = 40, 7, 3
CAPPED = ("paligemma2", "gemma3n", "gemma4")
"""Members of families whose forward may cap its logits."""


@functools.cache
def model_of(name: str, folder: Any, **text: Any) -> Any:
    """The member's small model in evaluation mode, fp32. text: changes of its text configuration."""
    member = ZOO[name]
    config = member.config(folder).to_dict()
    config["text_config"] |= text
    model = build_model(ModelSettings(config=config, dtype="fp32", attention=member.attentions[0], seed=7))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(member.scale)
        member.prepare_model(model)
    return model.eval()


def compare(model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> torch.Tensor:
    """Compares loss and gradients with those of the model's own logits, which are returned."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 9, (1, LENGTH), generator=generator)
    labels = torch.where(torch.rand(1, LENGTH, generator=generator) < 0.6, ids, -100)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    logits = model(**inputs, use_cache=False).logits
    expected = F.cross_entropy(logits[0, :-1].float(), labels[0, 1:], ignore_index=-100, reduction="sum")
    gradients = torch.autograd.grad(expected, trained, allow_unused=True)
    monkeypatch.setattr(head_loss, "HEAD_BYTES", 4 * ROWS_OF_HEAD * logits.shape[-1])
    monkeypatch.setitem(head_loss.LOSS_BYTES, "cpu", 4 * ROWS_OF_LOSS * logits.shape[-1])
    with caplog.at_level(logging.WARNING, logger="mmray"):
        found = packed_loss(model, inputs, labels)
    told = [record.message for record in caplog.records if record.name == "mmray"]
    assert not told, "the head runs on all tokens at once"
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=0)
    for gradient, other in zip(torch.autograd.grad(found.loss, trained, allow_unused=True), gradients, strict=True):
        if other is None:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, other, rtol=0, atol=1e-6 * float(other.abs().max()))
    return logits


@pytest.mark.parametrize("name", list(ZOO))
def test_the_loss_is_that_of_the_model_s_own_logits(name, zoo_folder, monkeypatch, caplog):
    """Text alone, which needs no processor."""
    if ZOO[name].missing_for_model:
        pytest.skip(f"{name} needs {', '.join(ZOO[name].missing_for_model)}")
    compare(model_of(name, zoo_folder(name)), monkeypatch, caplog)


@pytest.mark.parametrize("name", CAPPED)
def test_logits_that_are_capped(name, zoo_folder, monkeypatch, caplog):
    """With a cap that the logits reach."""
    if ZOO[name].missing_for_model:
        pytest.skip(f"{name} needs {', '.join(ZOO[name].missing_for_model)}")
    model = model_of(name, zoo_folder(name), final_logit_softcapping=0.5)
    assert compare(model, monkeypatch, caplog).abs().max() <= 0.5
