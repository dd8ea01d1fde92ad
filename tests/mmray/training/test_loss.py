"""The summed loss against transformers' own logits, and at its edges."""

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2VLForConditionalGeneration

from mmray.loss.rules import IGNORE_INDEX
from mmray.training import head_loss
from mmray.training.loss import count_trained_tokens, packed_loss, packed_loss_sum
from mmray.training.model import build_model
from mmray.training.token_losses import Objective
from tests.mmray.training import tiny

CPU = torch.device("cpu")
SCALE = 1 / 41


@pytest.fixture(scope="module")
def model():
    return build_model(tiny.model_settings())


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven tokens at a time take the head, three the loss."""
    monkeypatch.setattr(head_loss, "HEAD_BYTES", 4 * 7 * 160)
    monkeypatch.setitem(head_loss.LOSS_BYTES, "cpu", 4 * 3 * 160)


def inputs_of(model: Any, packed: tiny.TinyBin) -> dict[str, torch.Tensor]:
    return packed.model_inputs(CPU, model.dtype, model.config)


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def ours(model: Any, packed: tiny.TinyBin) -> tuple[torch.Tensor, list[torch.Tensor]]:
    total = packed_loss(model, inputs_of(model, packed), packed.labels, scale=SCALE).loss
    return total.detach(), gradients(model, total * SCALE)


def plain(model: Any, packed: tiny.TinyBin, **options: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """By the model's own logits of all trained tokens at once. options: of torch's cross-entropy."""
    targets = packed.labels[0, 1:]
    places = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    logits = model(**inputs_of(model, packed), use_cache=False, logits_to_keep=places).logits[0]
    total = F.cross_entropy(logits.float(), targets[places], reduction="sum", **options)
    return total.detach(), gradients(model, total * SCALE)


def test_a_single_sample_has_the_loss_of_transformers(model) -> None:
    sample = tiny.make_sample(torch.Generator().manual_seed(0), before=6, grid=(8, 12), after=20, trained=15)
    packed = tiny.TinyBin((sample,))
    inputs = inputs_of(model, packed)
    del inputs["position_ids"]  # transformers works them out
    image_tokens = (inputs["input_ids"] == tiny.IMAGE_TOKEN).int()
    reference = model(**inputs, mm_token_type_ids=image_tokens, labels=packed.labels).loss
    total = packed_loss_sum(model, inputs_of(model, packed), packed.labels)
    assert total.dtype == torch.float32
    assert count_trained_tokens(packed.labels) == 15
    torch.testing.assert_close(total / 15, reference, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_row_of_one_chunk_has_the_loss_of_its_logits_to_the_bit(dtype: str) -> None:
    model, packed = build_model(tiny.model_settings(dtype=dtype)), tiny.global_batch(0)[0]
    expected, expected_gradients = plain(model, packed)
    total, found = ours(model, packed)
    assert total == expected
    assert all(torch.equal(gradient, other) for gradient, other in zip(found, expected_gradients, strict=True))


@pytest.mark.usefixtures("small_chunks")
def test_chunks_change_nothing(model) -> None:
    packed = tiny.global_batch(0)[0]
    expected, expected_gradients = plain(model, packed)
    total, found = ours(model, packed)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(found, expected_gradients)


@pytest.mark.usefixtures("small_chunks")
def test_logits_of_one_chunk_at_most_exist_at_once(model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, linear = [], F.linear

    def recorded(rows: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        result = linear(rows, weight, bias)
        if result.shape[-1] == 160:
            sizes.append(len(result))
        return result

    monkeypatch.setattr(F, "linear", recorded)
    packed = tiny.global_batch(0)[0]
    ours(model, packed)
    assert sum(sizes) == count_trained_tokens(packed.labels)
    assert max(sizes) == 7


def test_another_factor_than_the_announced_one_is_right(model) -> None:
    packed = tiny.global_batch(0)[0]
    _, expected = plain(model, packed)
    total = packed_loss(model, inputs_of(model, packed), packed.labels, scale=3.0).loss
    torch.testing.assert_close(gradients(model, total * SCALE), expected)


def test_gradients_are_handed_out_once(model) -> None:
    packed = tiny.global_batch(0)[0]
    total = packed_loss_sum(model, inputs_of(model, packed), packed.labels)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        total.backward()


def test_without_trained_tokens_every_gradient_is_there_and_zero(model) -> None:
    total, found = ours(model, tiny.empty_bin())
    assert total == 0
    assert all(gradient is not None and not gradient.any() for gradient in found)


def test_the_first_position_of_a_row_is_never_trained(model) -> None:
    packed = tiny.global_batch(1)[1]
    labels = packed.labels.clone()
    labels[0, 0] = packed.samples[0].input_ids[0]
    inputs = inputs_of(model, packed)
    assert (packed.labels[0, 0], count_trained_tokens(labels)) == (IGNORE_INDEX, count_trained_tokens(packed.labels))
    torch.testing.assert_close(
        packed_loss_sum(model, inputs, labels), packed_loss_sum(model, inputs, packed.labels), rtol=0, atol=0
    )


# ---- What a model's class does with its logits ----


class Scaled(Qwen2VLForConditionalGeneration):
    """Divides its logits, as Granite, and caps them, as Gemma."""

    def forward(self, **inputs):  # type: ignore[override]
        outputs = super().forward(**inputs)
        outputs.logits = 30 * torch.tanh((outputs.logits * 40).float() / 30)
        return outputs


class Normalised(Qwen2VLForConditionalGeneration):
    """Subtracts the mean of its logits, which no logit knows by itself."""

    def forward(self, logits_to_keep=0, **inputs):  # type: ignore[override]
        outputs = super().forward(logits_to_keep=logits_to_keep, **inputs)
        logits = outputs.logits * 40
        outputs.logits = logits - logits.mean(-1, keepdim=True)
        return outputs


class InPlace(Qwen2VLForConditionalGeneration):
    """Changes its logits in place, which leaves the variable as it is."""

    def forward(self, logits_to_keep=0, **inputs):  # type: ignore[override]
        outputs = super().forward(logits_to_keep=logits_to_keep, **inputs)
        outputs.logits.mul_(40)
        return outputs


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("kind", "told"), [(Scaled, ""), (Normalised, "mean"), (InPlace, "mul_")])
def test_what_the_class_does_with_logits_is_done(model, kind: Any, told: str, caplog: pytest.LogCaptureFixture) -> None:
    other, packed = copy.deepcopy(model), tiny.global_batch(0)[0]
    unscaled, _ = ours(other, packed)
    other.__class__ = kind
    expected, expected_gradients = plain(other, packed)
    with caplog.at_level(logging.WARNING, logger="mmray"):
        total, found = ours(other, packed)
        ours(other, packed)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, expected_gradients)
    assert abs(total - unscaled) > 1
    assert len(caplog.messages) == bool(told)  # once, and not at all where the head runs in chunks
    assert all(f"{kind.__name__} does `{told}` with them" in message for message in caplog.messages)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kept", [False, True])
def test_a_head_with_an_adapter_runs_in_chunks(model, kept: bool, caplog: pytest.LogCaptureFixture) -> None:
    """By peft: beside the head's matrix, or in its place."""
    peft = pytest.importorskip("peft")
    other, packed = copy.deepcopy(model), tiny.global_batch(0)[0]
    names = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]} if kept else {"target_modules": ["lm_head"]}
    adapted = peft.get_peft_model(other, peft.LoraConfig(r=2, init_lora_weights=False, **names))
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    targets = packed.labels[0, 1:]
    places = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    logits = adapted(**inputs_of(model, packed), use_cache=False, logits_to_keep=places).logits[0]
    expected = F.cross_entropy(logits, targets[places], reduction="sum")
    expected_gradients = torch.autograd.grad(expected, trained)
    total = packed_loss_sum(adapted, inputs_of(model, packed), packed.labels)
    assert len(trained) > 1
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.autograd.grad(total, trained), expected_gradients)
    assert not [record for record in caplog.records if record.name == "mmray"]


def test_a_frozen_head_gets_no_gradient(model) -> None:
    other, packed = copy.deepcopy(model), tiny.global_batch(0)[0]
    _, expected = plain(other, packed)
    other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.detach().clone(), requires_grad=False)
    names = [name for name, _ in other.named_parameters()]
    _, found = ours(other, packed)
    by_name = dict(zip(names, found, strict=True))
    assert by_name["lm_head.weight"] is None
    layer = next(name for name in names if name.endswith("down_proj.weight"))
    before = dict(zip([name for name, _ in model.named_parameters()], expected, strict=True))
    torch.testing.assert_close(by_name[layer], before[layer])


# ---- Losses of sets, label smoothing, z-loss, accuracy ----


@pytest.mark.parametrize("chunk", [4 * 3 * 160, head_loss.LOSS_BYTES["cpu"]])
def test_losses_of_sets_are_those_of_their_samples_alone(model, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """By the cross-entropy of every token, computed here; the gradients are those of the whole loss, also in chunks."""
    monkeypatch.setitem(head_loss.LOSS_BYTES, "cpu", chunk)
    packed = tiny.global_batch(0)[0]
    inputs = inputs_of(model, packed)
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
    _, expected_gradients = plain(model, packed)
    packed_sets = packed_loss(model, inputs, packed.labels, sets=sets, num_sets=3)
    torch.testing.assert_close(packed_sets.measures.set_sums, expected, rtol=1e-5, atol=1e-5)
    assert packed_sets.measures.set_counts.tolist() == numbers.tolist()
    torch.testing.assert_close(gradients(model, packed_sets.loss * SCALE), expected_gradients)


def test_sets_without_trained_tokens_have_sums_of_zero_and_every_gradient(model) -> None:
    packed = tiny.empty_bin()
    sets = torch.full((packed.labels.shape[1],), -1)
    done = packed_loss(model, inputs_of(model, packed), packed.labels, sets=sets, num_sets=2)
    assert (done.measures.set_sums.tolist(), done.measures.set_counts.tolist()) == ([0, 0], [0, 0])
    assert all(gradient is not None and not gradient.any() for gradient in gradients(model, done.loss))


@pytest.mark.usefixtures("small_chunks")
def test_label_smoothing_is_torch_s(model) -> None:
    packed = tiny.global_batch(0)[0]
    cross_entropy, _ = plain(model, packed)
    expected, expected_gradients = plain(model, packed, label_smoothing=0.1)
    done = packed_loss(model, inputs_of(model, packed), packed.labels, objective=Objective(label_smoothing=0.1))
    torch.testing.assert_close(done.loss.detach(), expected)
    torch.testing.assert_close(done.measures.smoothed, expected)
    torch.testing.assert_close(done.measures.cross_entropy, cross_entropy)
    torch.testing.assert_close(gradients(model, done.loss * SCALE), expected_gradients)


@pytest.mark.usefixtures("small_chunks")
def test_z_loss_is_the_squared_logarithm_of_the_denominator(model) -> None:
    packed, objective = tiny.global_batch(0)[0], Objective(z_loss=0.01, label_smoothing=0.2)
    targets = packed.labels[0, 1:]
    places = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    logits = model(**inputs_of(model, packed), use_cache=False).logits[0, places]
    squares = logits.exp().sum(-1).log().pow(2).sum()
    smoothed = F.cross_entropy(logits, targets[places], reduction="sum", label_smoothing=0.2)
    expected = smoothed + 0.01 * squares
    expected_gradients = gradients(model, expected * SCALE)
    done = packed_loss(model, inputs_of(model, packed), packed.labels, objective=objective)
    torch.testing.assert_close(done.loss, expected)
    torch.testing.assert_close(done.measures.squared_normaliser, squares)
    torch.testing.assert_close(gradients(model, done.loss * SCALE), expected_gradients)


@pytest.mark.usefixtures("small_chunks")
def test_tokens_are_correct_where_the_model_would_write_them(model) -> None:
    packed = tiny.global_batch(0)[0]
    inputs, labels = inputs_of(model, packed), packed.labels.clone()
    with torch.no_grad():
        likeliest = model(**inputs, use_cache=False).logits[0, :-1].argmax(-1)
    places = (labels[0, 1:] != IGNORE_INDEX).nonzero().squeeze(1)[::3]
    labels[0, 1:][places] = likeliest[places]
    expected = int((labels[0, 1:] == likeliest).sum())
    assert expected >= len(places) > 3
    sets = torch.arange(labels.shape[1]) % 2
    right = (labels[0, 1:] == likeliest).nonzero().squeeze(1) + 1
    measures = packed_loss(model, inputs, labels, sets=sets, num_sets=3).measures
    assert measures.correct == expected
    assert measures.set_correct.tolist() == [int((right % 2 == number).sum()) for number in range(2)] + [0]
