"""The summed loss against transformers' own, and at its edges."""

import pytest
import torch

from mmray.loss.rules import IGNORE_INDEX
from mmray.training import loss
from mmray.training.loss import count_trained_tokens, packed_loss_sum, packed_loss_sums
from mmray.training.model import build_model
from tests.mmray.training import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return build_model(tiny.model_settings())


def loss_and_gradients(model, packed: tiny.TinyBin) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    total = packed_loss_sum(model, packed.model_inputs(CPU, torch.float32, model.config), packed.labels)
    total.backward()
    return total.detach(), [parameter.grad for parameter in model.parameters()]


def test_a_single_sample_has_the_loss_of_transformers(model) -> None:
    sample = tiny.make_sample(torch.Generator().manual_seed(0), before=6, grid=(8, 12), after=20, trained=15)
    packed = tiny.TinyBin((sample,))
    inputs = packed.model_inputs(CPU, torch.float32, model.config)
    del inputs["position_ids"]  # transformers works them out
    image_tokens = (inputs["input_ids"] == tiny.IMAGE_TOKEN).int()
    reference = model(**inputs, mm_token_type_ids=image_tokens, labels=packed.labels).loss
    ours = packed_loss_sum(model, packed.model_inputs(CPU, torch.float32, model.config), packed.labels)
    assert ours.dtype == torch.float32
    assert count_trained_tokens(packed.labels) == 15
    torch.testing.assert_close(ours / 15, reference, rtol=1e-6, atol=0)


def test_chunks_and_full_logits_change_nothing(model, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tiny.global_batch(0)[0]
    expected, expected_gradients = loss_and_gradients(model, packed)
    monkeypatch.setattr(loss, "MAX_CHUNK_ELEMENTS", 7 * 160)
    chunked, chunked_gradients = loss_and_gradients(model, packed)
    monkeypatch.setattr(loss, "_takes_logits_to_keep", lambda model_class: False)
    full, full_gradients = loss_and_gradients(model, packed)
    torch.testing.assert_close(torch.stack([chunked, full]), expected.expand(2))
    for gradients in (chunked_gradients, full_gradients):
        torch.testing.assert_close(gradients, expected_gradients)


def test_without_trained_tokens_every_gradient_is_there_and_zero(model) -> None:
    total, gradients = loss_and_gradients(model, tiny.empty_bin())
    assert total == 0
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_the_first_position_of_a_row_is_never_trained(model) -> None:
    packed = tiny.global_batch(1)[1]
    labels = packed.labels.clone()
    labels[0, 0] = packed.samples[0].input_ids[0]
    inputs = packed.model_inputs(CPU, torch.float32, model.config)
    assert (packed.labels[0, 0], count_trained_tokens(labels)) == (IGNORE_INDEX, count_trained_tokens(packed.labels))
    torch.testing.assert_close(
        packed_loss_sum(model, inputs, labels), packed_loss_sum(model, inputs, packed.labels), rtol=0, atol=0
    )


def test_losses_of_sets_are_those_of_their_samples_alone(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the cross-entropy of every token, computed here; the gradients are those of the whole loss, also in chunks."""
    packed = tiny.global_batch(0)[0]
    inputs = packed.model_inputs(CPU, torch.float32, model.config)
    lengths = [len(sample.input_ids) for sample in packed.samples]
    sets = torch.repeat_interleave(torch.arange(len(lengths)) % 2, torch.tensor(lengths))
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0, :-1]
    targets = packed.labels[0, 1:]
    expected, numbers = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    for place, target in enumerate(targets.tolist()):
        if target != IGNORE_INDEX:
            expected[sets[place + 1]] -= logits[place].log_softmax(0)[target]
            numbers[sets[place + 1]] += 1
    assert len(lengths) > 1
    assert numbers[:2].min() > 0
    _, gradients = loss_and_gradients(model, packed)
    for chunk in (7 * 160, loss.MAX_CHUNK_ELEMENTS):
        monkeypatch.setattr(loss, "MAX_CHUNK_ELEMENTS", chunk)
        model.zero_grad()
        sums, counts = packed_loss_sums(model, inputs, packed.labels, sets, 3)
        sums.sum().backward()
        torch.testing.assert_close(sums.detach(), expected, rtol=1e-5, atol=1e-5)
        assert counts.tolist() == numbers.tolist()
        torch.testing.assert_close([parameter.grad for parameter in model.parameters()], gradients)


def test_sets_without_trained_tokens_have_sums_of_zero_and_every_gradient(model) -> None:
    packed = tiny.empty_bin()
    inputs = packed.model_inputs(CPU, torch.float32, model.config)
    model.zero_grad()
    sets = torch.full((packed.labels.shape[1],), -1)
    sums, counts = packed_loss_sums(model, inputs, packed.labels, sets, 2)
    sums.sum().backward()
    assert (sums.tolist(), counts.tolist()) == ([0, 0], [0, 0])
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
