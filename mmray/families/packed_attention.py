"""Attention that computes each sample of a packed row apart, given where the samples begin and end.

With a mask, attention goes over all pairs of tokens of a row, most of which belong to different samples. This function
is told the bounds of the samples (`mmray.families.base.sample_bounds`) and makes no mask and no pair of two samples: on
one CPU thread a step on rows of two samples takes 0.7 of the time, on rows of seven samples half.

transformers decides by the word "flash" in an implementation's name that a layer gets the bounds, in the text model as
in vision towers whose layers attend within pictures and windows (Qwen, GLM, Pixtral); these make one call a layer then,
instead of one for each window.

- On the CPU, neighbours of equal length are one call of torch's `scaled_dot_product_attention`.
- On CUDA, all samples are one call of torch's `varlen_attn`, in bf16 or fp16 on devices that its kernels run on, for
  heads of up to 256 numbers, without dropout. Anything else is computed as on the CPU.
- Scores that torch's functions cannot change (soft caps, attention sinks) are computed step by step, sample by sample.

A layer without bounds is an error: samples would see each other without a word. Generation, which has none, runs
another implementation (`mmray.training.attention_paths.plain_attention`).
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

PACKED_FLASH = "packed_flash"
"""Name under which transformers knows the function: one that holds "flash", and no version of flash attention."""
MAX_HEAD_SIZE = 256
"""Largest head dimension that the kernels of `varlen_attn` take."""
CALLS_PER_LENGTH = 4
"""Most calls for each length that samples of a row have, before the tokens are moved to save calls."""
LARGE_HEAD_SIZE = 192
"""Largest head dimension whose gradients all devices of `varlen_attn` compute."""
LARGE_HEAD_DEVICES = ((8, 0), (9, 0))
"""Compute capabilities that also compute the gradients of larger heads (A100, H100)."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How the tokens of a sample see each other, and how scores become weights."""

    causal: bool
    """Tokens see only themselves and those before them."""
    window: int | None
    """Number of tokens that a token sees to each side, itself counted; None: no limit."""
    scale: float | None
    """Factor of the scores; None: one over the root of the head dimension."""
    dropout: float
    """Share of the weights that is set to zero."""
    soft_cap: float | None
    """Bound of the scores, which approach it by the hyperbolic tangent; None: no bound."""
    sinks: Tensor | None
    """For each head a score that takes its part of the weights and gives no value, [heads]; None for none."""


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes the attention of one packed row in the form that transformers' layers call.

    Args:
        query: [1, heads, L, size]. key, value: [1, key heads, L, size]; each key head serves as many query heads.
        is_causal: None: as the module says.
        cu_seq_lens_q: the samples' beginnings and the row's end, int32 [samples + 1]. max_length_q: the longest sample.

    Returns the attended values, [1, L, heads, size], and no weights. Raises RuntimeError for a call without bounds, or
    with what would be ignored.
    """
    if cu_seq_lens_q is None:
        raise RuntimeError(
            f"{type(module).__name__} is not told where samples begin, and model.attention: packed would let them see "
            "each other; give the model's forward cu_seq_lens_q, as MicroBatch.model_inputs does, or set "
            "model.attention: sdpa"
        )
    if attention_mask is not None or position_bias is not None or len(query) != 1 or query.shape[2] != key.shape[2]:
        raise RuntimeError(
            f"{type(module).__name__} calls packed attention with a mask, a bias, a key cache or several rows, which "
            "it does not take; set model.attention: sdpa"
        )
    rules = Rules(
        causal=bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal,
        window=sliding_window, scale=scaling, dropout=dropout, soft_cap=softcap, sinks=s_aux,
    )  # fmt: skip
    # Layers give [1, heads, L, size]; samples are cut out of [L, heads, size].
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if max_length_q is not None and takes_varlen(query, value, rules):
        attended = _varlen(query, key, value, cu_seq_lens_q, max_length_q, rules)
    else:
        attended = by_sample(query, key, value, cu_seq_lens_q.diff().tolist(), rules)
    return attended[None], None


def takes_varlen(query: Tensor, value: Tensor, rules: Rules) -> bool:
    """True if torch's `varlen_attn` computes attention of these tensors. query, value: [..., size]."""
    size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and value.shape[-1] == size
        and size % 8 == 0
        and size <= _largest_head(query.device.index)
        and not rules.dropout
        and rules.soft_cap is None
        and rules.sinks is None
    )


@functools.cache
def _largest_head(device: int) -> int:
    """The largest head dimension whose attention and gradients `varlen_attn` computes on a CUDA device; 0 for none."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability < (8, 0):
        return 0
    return MAX_HEAD_SIZE if capability in LARGE_HEAD_DEVICES else LARGE_HEAD_SIZE


def varlen_window(rules: Rules) -> tuple[int, int]:
    """`window_size` of `varlen_attn`: how many tokens before and after itself a token sees, -1 for all."""
    before = -1 if rules.window is None else rules.window - 1
    return before, 0 if rules.causal else before


def _varlen(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, rules: Rules) -> Tensor:
    """All samples in one call on CUDA. query, key, value: [L, heads, size]; returns [L, heads, size]."""
    attended = varlen_attn(
        query, key, value, bounds, bounds, longest, longest,
        scale=rules.scale, window_size=varlen_window(rules), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(attended, Tensor)
    return attended


# ---------------------------------------------------------------- sample by sample


def by_sample(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], rules: Rules) -> Tensor:
    """Computes samples one after another, neighbours of equal length at once.

    query: [L, heads, size]. key, value: [L, key heads, size]. lengths: numbers of tokens of the samples, whose sum is
    L. Returns [L, heads, size]. Many samples of few lengths, such as the windows of a vision tower, are first moved
    beside those of equal length.
    """
    if sum(lengths) != len(query):
        raise RuntimeError(f"the samples of a row have {sum(lengths)} tokens, the row has {len(query)}")
    runs = _runs(lengths)
    if len(runs) <= CALLS_PER_LENGTH * len(set(lengths)):
        return _by_runs(query, key, value, runs, rules)
    order, back = _by_length(tuple(lengths), query.device)
    query, key, value = (tensor.index_select(0, order) for tensor in (query, key, value))
    return _by_runs(query, key, value, _runs(sorted(lengths)), rules).index_select(0, back)


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours of equal length: how many they are, and their length."""
    return [(len(list(samples)), length) for length, samples in groupby(length for length in lengths if length)]


@functools.lru_cache(maxsize=4)
def _by_length(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The tokens of samples in the order of the samples' lengths, and the places of all tokens in that order; int64 [L]
    each. All layers of a forward pass ask for the same."""
    by_length = sorted(zip(lengths, itertools.accumulate(lengths, initial=0)), key=lambda sample: sample[0])
    with torch.inference_mode(False):  # the backward pass of a later call may need them
        order = torch.cat([torch.arange(start, start + length) for length, start in by_length])
        return order.to(device), order.argsort().to(device)


def _by_runs(query: Tensor, key: Tensor, value: Tensor, runs: Sequence[tuple[int, int]], rules: Rules) -> Tensor:
    """Computes the samples of each run at once. Tensors as for `by_sample`."""
    attend = _step_by_step if rules.soft_cap is not None or rules.sinks is not None else _by_torch
    # Cut all at once: the gradient of each slice alone would be a tensor as long as the row.
    cut = (tensor.split([count * length for count, length in runs]) for tensor in (query, key, value))
    parts = []
    for run, pieces in zip(runs, zip(*cut, strict=True), strict=True):
        heads = [piece.unflatten(0, run).transpose(1, 2) for piece in pieces]
        parts.append(attend(heads[0], heads[1], heads[2], rules).transpose(1, 2).flatten(0, 1))
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _by_torch(query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
    """torch's attention of n samples of equal length. query, key, value: [n, heads, length, size]."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.is_cuda:  # with grouped heads only its slow kernel would run where varlen_attn does not
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        groups = 1
    seen = _seen(query.shape[2], rules, query.device)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, dropout_p=rules.dropout, scale=rules.scale,
        is_causal=rules.causal and seen is None, enable_gqa=groups > 1,
    )  # fmt: skip


def _seen(length: int, rules: Rules, device: torch.device) -> Tensor | None:
    """True where a token (row) sees another (column), bool [length, length]; None where no window cuts a sample."""
    if rules.window is None or length <= rules.window:
        return None
    places = torch.arange(length, device=device)
    back = places[:, None] - places
    seen = back < rules.window
    return seen & (back >= 0) if rules.causal else seen & (back > -rules.window)


def _step_by_step(query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
    """Attention as transformers' eager layers compute it, weights in fp32. Shapes as for `_by_torch`."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if rules.scale is None else rules.scale
    scores = query @ key.transpose(2, 3) * scale
    if rules.soft_cap is not None:
        scores = torch.tanh(scores / rules.soft_cap) * rules.soft_cap
    seen = _seen(length, rules, query.device)
    if seen is None and rules.causal:
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    if rules.sinks is not None:
        sinks = rules.sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(len(scores), -1, length, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)[..., :length]
    return F.dropout(weights, rules.dropout) @ value


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Makes no mask: the function is told the bounds of the samples."""


AttentionInterface.register(PACKED_FLASH, packed_attention)
AttentionMaskInterface.register(PACKED_FLASH, _no_mask)
