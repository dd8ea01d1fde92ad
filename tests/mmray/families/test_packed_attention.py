"""The attention that computes each sample apart, against plain arithmetic with an explicit mask."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as eager_with_sinks

from mmray.families.packed_attention import (
    PACKED_FLASH,
    Rules,
    packed_attention,
    takes_varlen,
    varlen_window,
)
from mmray.schedule.balance import BalanceSettings
from mmray.training.attention_paths import attention_names, attention_paths, plain_attention
from mmray.training.model import build_model, empty_model, text_attention
from mmray.training.settings import ModelSettings
from tests.mmray.families.zoo import ZOO
from tests.mmray.training import tiny

CPU = torch.device("cpu")


class Layer(torch.nn.Module):
    """What an attention function asks of its layer."""

    def __init__(self, causal: bool, groups: int = 1) -> None:
        super().__init__()
        self.is_causal, self.num_key_value_groups = causal, groups


def expected(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], *, causal: bool, window: int | None,
    scale: float | None, cap: float | None = None,
) -> Tensor:  # fmt: skip
    """All pairs of a row's tokens, of which a mask leaves those that see each other: [1, L, heads, size]."""
    number = torch.cat([torch.full((length,), index) for index, length in enumerate(lengths)])
    place = torch.arange(len(number))
    seen = number[:, None] == number
    if causal:
        seen &= place[:, None] >= place
    if window is not None:
        seen &= (place[:, None] - place).abs() < window
    groups = query.shape[1] // key.shape[1]
    key, value = (torch.stack([tensor[0, head // groups] for head in range(query.shape[1])]) for tensor in (key, value))
    scores = torch.einsum("hqd,hkd->hqk", query[0], key) * (scale or 1 / math.sqrt(query.shape[-1]))
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * seen
    return torch.einsum("hqk,hkd->qhd", weights / weights.sum(-1, keepdim=True), value)[None]


def tensors(seed: int, heads: int, key_heads: int, length: int, size: int, device: torch.device = CPU) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, number, length, size) for number in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]


def bounds(lengths: list[int], device: torch.device = CPU) -> dict[str, object]:
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    return {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=8), repeated=st.integers(1, 3),
    key_heads=st.integers(1, 3), groups=st.integers(1, 3), size=st.sampled_from([2, 8, 24]),
    causal=st.booleans(), window=st.none() | st.integers(1, 30), scale=st.none() | st.floats(0.05, 2.0),
    cap=st.none() | st.floats(0.5, 20.0), seed=st.integers(0, 1000),
)  # fmt: skip
@example([5, 2] * 6, 1, 2, 2, 8, False, None, None, None, 0)  # the windows of a tower's pictures
@example([1, 7, 3] * 5, 1, 1, 3, 8, True, 4, 0.5, None, 1)
def test_it_equals_all_pairs_with_a_mask(lengths, repeated, key_heads, groups, size, causal, window, scale, cap, seed):
    """Values and gradients, of samples of any lengths, those of equal length together or in turn."""
    lengths = [length for length in lengths for _ in range(repeated)]
    ours = tensors(seed, key_heads * groups, key_heads, sum(lengths), size)
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    wanted = expected(*theirs, lengths, causal=causal, window=window, scale=scale, cap=cap)
    found, weights = packed_attention(
        Layer(causal), *ours, None, scaling=scale, sliding_window=window, softcap=cap, **bounds(lengths)
    )
    assert weights is None
    assert found.is_contiguous()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    slope = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(seed))
    wanted.backward(slope)
    found.backward(slope)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_sinks_are_those_of_gpt_oss():
    """Each sample as its own eager layer computes it."""
    lengths, sinks = [5, 9, 9], torch.randn(4, generator=torch.Generator().manual_seed(3))
    query, key, value = tensors(1, 4, 2, sum(lengths), 8)
    layer = Layer(True, groups=2)
    layer.sinks = sinks
    found, _ = packed_attention(layer, query, key, value, None, scaling=0.3, s_aux=sinks, **bounds(lengths))
    start = 0
    for length in lengths:
        piece = slice(start, start + length)
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        alone, _ = eager_with_sinks(layer, *(each[:, :, piece] for each in (query, key, value)), mask, 0.3)
        torch.testing.assert_close(found[:, piece], alone, rtol=1e-4, atol=1e-5)
        start += length


def test_dropout_is_of_the_weights():
    """Some weights are set to zero, the others grow: the mean over many draws is that without."""
    query, key, value = (tensor.detach() for tensor in tensors(2, 2, 2, 12, 8))
    plain, _ = packed_attention(Layer(False), query, key, value, None, **bounds([7, 5]))
    torch.manual_seed(0)
    drawn = [packed_attention(Layer(False), query, key, value, None, 1.0, 0.5, **bounds([7, 5]))[0] for _ in range(2)]
    assert not torch.equal(*drawn)
    torch.manual_seed(0)
    draws = [
        packed_attention(Layer(False), query, key, value, None, None, 0.3, **bounds([7, 5]))[0] for _ in range(2000)
    ]
    torch.testing.assert_close(torch.stack(draws).mean(0), plain, rtol=0, atol=0.15)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cu_seq_lens_q": None}, "not told where samples begin.*cu_seq_lens_q.*attention: sdpa"),
        ({"attention_mask": torch.ones(1, 1, 12, 12)}, "with a mask.*attention: sdpa"),
        ({"position_bias": torch.ones(1, 1, 12, 12)}, "a bias"),
        ({"cu_seq_lens_q": torch.tensor([0, 7, 11], dtype=torch.int32)}, "have 11 tokens, the row has 12"),
    ],
)  # fmt: skip
def test_what_it_would_ignore_is_an_error(change, words):
    inputs = dict(zip(("query", "key", "value"), tensors(2, 2, 2, 12, 8))) | {"attention_mask": None} | bounds([7, 5])
    with pytest.raises(RuntimeError, match=words):
        packed_attention(Layer(True), **inputs | change)


def test_several_rows_and_a_key_cache_are_errors():
    query, key, value = tensors(2, 2, 2, 12, 8)
    with pytest.raises(RuntimeError, match="several rows"):
        packed_attention(Layer(True), *(torch.cat([each, each]) for each in (query, key, value)), None, **bounds([12]))
    with pytest.raises(RuntimeError, match="key cache"):
        packed_attention(Layer(True), query[:, :, -1:], key, value, None, **bounds([12]))


# ---- On a GPU ----


def rules(**changes) -> Rules:
    usual = {"causal": True, "window": None, "scale": None, "dropout": 0.0, "soft_cap": None, "sinks": None}
    return Rules(**usual | changes)


@pytest.mark.parametrize(
    ("causal", "window", "told"),
    [(True, None, (-1, 0)), (True, 4, (3, 0)), (False, None, (-1, -1)), (False, 4, (3, 3))],
)
def test_windows_of_the_kernels_leave_out_the_token_itself(causal, window, told):
    assert varlen_window(rules(causal=causal, window=window)) == told


def on_gpu(size: int = 64, values: int | None = None, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the kernels would take heads of this size. Nothing is computed."""
    device = SimpleNamespace(index=0)
    query = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 4, 9, size), device=device)
    return takes_varlen(query, SimpleNamespace(shape=(1, 4, 9, values or size)), rules())


def test_the_kernels_take_what_they_can(monkeypatch):
    from mmray.families import packed_attention as module

    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    for size, taken in ((64, True), (80, True), (256, True), (260, False), (264, False), (68, False)):
        module._largest_head.cache_clear()
        assert on_gpu(size) is taken, size
    assert not on_gpu(dtype=torch.float32)
    assert not on_gpu(64, values=32)
    for capability, size, taken in (((8, 6), 192, True), ((8, 6), 256, False), ((7, 5), 64, False)):
        module._largest_head.cache_clear()
        assert on_gpu(size) is taken, (capability, size)
    module._largest_head.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's kernels for samples of various lengths need a GPU")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 4, 64), (4, 2, 80), (6, 2, 128), (4, 1, 256)])
def test_on_a_gpu_one_call_equals_all_pairs_with_a_mask(heads, key_heads, size, causal, window):
    lengths, device = [3, 17, 17, 1, 40], torch.device("cuda")
    wanted_of = tensors(1, heads, key_heads, sum(lengths), size)
    ours = [tensor.detach().to(device, torch.bfloat16).requires_grad_() for tensor in wanted_of]
    wanted = expected(*wanted_of, lengths, causal=causal, window=window, scale=None)
    found, _ = packed_attention(Layer(causal), *ours, None, sliding_window=window, **bounds(lengths, device))
    wanted.sum().backward()
    found.sum().backward()
    torch.testing.assert_close(found.float().cpu(), wanted, rtol=0.05, atol=0.05)
    for one, other in zip(ours, wanted_of, strict=True):
        torch.testing.assert_close(one.grad.float().cpu(), other.grad, rtol=0.1, atol=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 64), (torch.bfloat16, 512)])
def test_on_a_gpu_what_the_kernels_do_not_take_is_computed_all_the_same(dtype, size):
    lengths, device = [3, 17, 40], torch.device("cuda")
    wanted_of = tensors(1, 4, 2, sum(lengths), size)
    wanted = expected(*wanted_of, lengths, causal=True, window=None, scale=None)
    ours = [tensor.detach().to(device, dtype) for tensor in wanted_of]
    found, _ = packed_attention(Layer(True), *ours, None, **bounds(lengths, device))
    torch.testing.assert_close(found.float().cpu(), wanted, rtol=0.05, atol=0.05)


# ---- The switch of a model ----


def test_a_new_model_computes_samples_apart():
    settings = tiny.model_settings(attention=None)
    model = build_model(settings)
    assert attention_names(model) == {"text": "packed", "vision": "packed"}
    assert text_attention(settings) == "packed"
    assert "flash" not in str(model.config.to_dict())
    assert attention_names(build_model(tiny.model_settings(attention="sdpa"))) == {"text": "sdpa", "vision": "sdpa"}


def test_weights_are_those_of_other_attention():
    packed, plain = (build_model(tiny.model_settings(attention=each)).state_dict() for each in ("packed", "sdpa"))
    assert all(torch.equal(packed[name], plain[name]) for name in plain)


def test_bounds_forgotten_are_told():
    (batch, *_) = tiny.global_batch(0)
    inputs = batch.model_inputs(CPU, torch.float32, build_model(tiny.model_settings(attention="sdpa")).config)
    with pytest.raises(RuntimeError, match="Qwen2VLAttention is not told where samples begin"):
        build_model(tiny.model_settings(attention="packed"))(**inputs, use_cache=False)


def test_generation_runs_without_bounds_and_leaves_the_model_as_it_was():
    model = build_model(tiny.model_settings(attention="packed")).eval()
    ids = torch.randint(1, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with plain_attention(model):
        assert attention_names(model) == {"text": "sdpa", "vision": "sdpa"}
        written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    plain = build_model(tiny.model_settings(attention="sdpa")).eval()
    assert torch.equal(written, plain.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False))
    assert attention_names(model) == {"text": "packed", "vision": "packed"}
    assert model.config.get_text_config()._attn_implementation == PACKED_FLASH


def test_what_gpus_compute_sample_by_sample_is_told():
    def told(**text):
        config = {**tiny.TINY_QWEN2_VL, "text_config": {**tiny.TINY_QWEN2_VL["text_config"], **text}}
        return attention_paths(empty_model(tiny.model_settings(config=config, dtype="bf16")))

    assert [str(path) for path in told()] == ["text packed", "vision packed"]
    rope = {"rope_type": "default", "mrope_section": [64, 96, 96], "rope_theta": 10000.0}
    wide = told(hidden_size=1024, num_attention_heads=2, num_key_value_heads=2, rope_parameters=rope)
    assert "heads have 512 numbers" in str(wide[0])
    in_fp32 = attention_paths(empty_model(tiny.model_settings()))
    assert str(in_fp32[0]) == "text packed (on GPUs sample by sample: one call takes bf16)"


@pytest.mark.parametrize(("name", "attention"), [("qwen2_vl", "packed"), ("gemma3", "sdpa"), ("paligemma2", "eager")])
def test_costs_are_those_of_the_text_layers(zoo_folder, name, attention):
    """A model whose layers need masks works through whole rows, whatever the job asks for."""
    settings = ModelSettings(config=ZOO[name].config(zoo_folder(name)).to_dict())
    assert text_attention(settings) == attention
    assert BalanceSettings().for_attention(attention).whole_row_attention is (attention != "packed")
    assert text_attention(settings.model_copy(update={"attention": "eager"})) == "eager"
