"""Flash attention, whose kernels need a GPU: transformers' own code around stand-ins of plain torch.

They show what the kernels are told of the borders of samples, which is not what sdpa and eager attention are told, and
not what the kernels make of it.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import modeling_flash_attention_utils as flash

from mmray.errors import UserError
from tests.mmray.families.test_packed_equals_unpacked import error, logits_of, make_case  # noqa: F401

BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """q, k, v: [batch, length, heads, size]; window_size: how far a token sees to each side, -1 for all the way."""
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    before, after = window_size[0], 0 if causal else window_size[1]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if before >= 0:
        seen &= distance <= before
    if after >= 0:
        seen &= distance >= -after
    heads_first = (each.transpose(1, 2) for each in (q, k, v))
    found = F.scaled_dot_product_attention(*heads_first, attn_mask=seen, scale=softmax_scale, enable_gqa=True)
    return found.transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1),
):  # fmt: skip
    """q, k, v: [length, heads, size]. The kernel would read past the end without a word."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.equal(cu_seqlens_k)
    sizes = cu_seqlens_q.diff().tolist()
    assert sum(sizes) == len(q) == len(k)
    assert int(max_seqlen_q) == int(max_seqlen_k) == max(sizes)
    pieces = zip(*(each[None].split(sizes, dim=1) for each in (q, k, v)))
    whole = [flash_attn_func(*piece, dropout_p, softmax_scale, causal, window_size) for piece in pieces]
    return torch.cat(whole, dim=1)[0]


@pytest.fixture
def with_flash(monkeypatch):
    """A function: lets a model run flash attention, as the stand-ins compute it."""
    loaded = {
        "_loaded_implementation": "flash_attention_2",
        "_flash_fn": flash_attn_func,
        "_flash_varlen_fn": flash_attn_varlen_func,
        "_pad_fn": flash._pad_input,
        "_unpad_fn": flash._unpad_input,
        "_process_flash_kwargs_fn": flash._lazy_define_process_function(flash_attn_varlen_func),
        "_process_with_kvcache_kwargs_fn": None,
    }
    for name, value in loaded.items():
        monkeypatch.setattr(flash, name, value)

    def switch(model):
        for config in {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values():
            monkeypatch.setattr(config, "_attn_implementation", "flash_attention_2")

    return switch


def without_bounds(inputs):
    return {name: value for name, value in inputs.items() if name not in BOUNDS}


def bin_error(case, numbers, with_flash, change=lambda inputs: inputs):
    """The largest error of any sample of these bins with flash attention, against it alone with sdpa.

    change: of the arguments of the model's forward. Skips the test for a family that refuses flash attention."""
    expected = [[(logits_of(case.model, inputs), where) for inputs, where in case.samples([n])] for n in numbers]
    with_flash(case.model)
    errors = []
    for number, samples in zip(numbers, expected, strict=True):
        try:
            inputs = case.inputs(case.micro_batch(number))
        except UserError as refusal:
            if "flash_attention_2" not in str(refusal):
                raise
            pytest.skip(str(refusal))
        packed = logits_of(case.model, change(inputs))
        errors += [error(packed[where], alone) for alone, where in samples]
    return max(errors)


def test_a_bin_equals_its_samples(make_case, packing, with_flash):  # noqa: F811
    case = make_case(packing.name, packing.attentions[0])
    assert len(case.prepared.bin(0).sample_ids) > 2
    assert bin_error(case, [0], with_flash) < packing.tolerance


def test_single_samples_are_right(make_case, packing, with_flash):  # noqa: F811
    """With their pictures or, without one, with the added one behind them."""
    longest = int(make_case(packing.name, packing.attentions[0]).prepared.bin(0).sample_lengths.max())
    case = make_case(packing.name, packing.attentions[0], token_capacity=longest)
    bins = range(len(case.prepared))
    assert any(len(case.prepared.bin(number).sample_ids) == 1 for number in bins)
    assert bin_error(case, bins, with_flash) < packing.tolerance


def test_without_bounds_glm_4_5v_reads_past_the_end(make_case, with_flash):  # noqa: F811
    """Why M-RoPE families give them: its layers get the positions of rows and columns, three times the row's length."""
    with pytest.raises(AssertionError):
        bin_error(make_case("glm4v_moe", "sdpa"), [0], with_flash, without_bounds)


def test_without_bounds_and_the_text_s_positions_samples_see_each_other(make_case, with_flash):  # noqa: F811
    def change(inputs):
        return without_bounds(inputs) | {"position_ids": inputs["position_ids"][1:]}

    assert bin_error(make_case("glm4v", "sdpa"), [0], with_flash, change) > 0.1
