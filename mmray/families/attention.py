"""Attention masks made here and given to the model, where its positions alone would not keep samples apart.

Models that see some tokens both ways (an image's, a prompt's) make their masks from positions and block numbers. In
transformers 5.23 the two do not fit in packed rows: all prompts count as one block, and blocks are looked up at the
place within the sample, where the row's first sample has its own. Nothing fails, samples of other layouts are wrong.

A mask is made once a row, not once a layer, with tensor operations on the training device: a byte for each pair of
tokens, 64 MB for a row of 8,192, and never an integer for each pair on the way.
"""

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mmray.errors import UserError
from mmray.families.base import PackedRow

TAKE_MASKS = ("sdpa", "eager")
"""Implementations of attention that take a mask for each pair of tokens."""


def mask_problem(config: PretrainedConfig) -> str | None:
    """Why a model whose masks are made here cannot train with its attention implementation; None where it can."""
    implementation = config._attn_implementation
    if implementation in TAKE_MASKS:
        return None
    return (
        f"{implementation} takes no mask for each pair of tokens, which a {config.model_type} needs: it sees some "
        "tokens both ways; set model.attention: sdpa"
    )


def sample_numbers(row: PackedRow) -> Tensor:
    """int64 [L]: the place of each token's sample among `lengths`; padding counts like samples."""
    numbers = torch.arange(len(row.lengths), device=row.lengths.device)
    return torch.repeat_interleave(numbers, row.lengths, output_size=len(row.input_ids))


def run_numbers(members: Tensor, samples: Tensor) -> Tensor:
    """int64 [L]: 1, 2, 3, … for the runs of True in `members` (bool [L]), 0 elsewhere. A run ends with its sample."""
    follows = torch.zeros_like(members)
    follows[1:] = members[:-1] & (samples[1:] == samples[:-1])
    return (members & ~follows).cumsum(0) * members


def causal_mask(samples: Tensor) -> Tensor:
    """bool [L, L], True where the token of a row may see that of a column: one of its sample, and none after it."""
    places = torch.arange(len(samples), device=samples.device)
    mask = samples[:, None] == samples
    mask &= places[:, None] >= places
    return mask


def seeing_blocks(mask: Tensor, blocks: Tensor) -> Tensor:
    """`mask`, and tokens of one block see each other. blocks: int64 [L], 0 for tokens of none."""
    return mask | (blocks.masked_fill(blocks == 0, -1)[:, None] == blocks)


def within_window(mask: Tensor, window: int) -> Tensor:
    """`mask` without what lies `window` tokens or more before a token; what comes after it stays."""
    places = torch.arange(len(mask), device=mask.device)
    return mask & (places > places[:, None] - window)


def given_mask(mask: Tensor, config: PretrainedConfig, dtype: torch.dtype) -> Tensor:
    """[1, 1, L, L] as the model's attention takes it: bool, or for eager a number of `dtype` to add to the scores.

    Raises UserError for an implementation that takes no masks.
    """
    problem = mask_problem(config)
    if problem:
        raise UserError(problem)
    if config._attn_implementation == "eager":
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return mask[None, None]
