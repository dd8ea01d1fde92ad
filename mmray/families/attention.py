"""Attention masks that mmray builds itself, for models whose positions alone would not keep samples apart.

Some models let some tokens (those of an image or a prompt) attend in both directions, and build their masks from
positions and block numbers. In transformers 5.23 this fails in packed rows: all prompts count as one block, and blocks
are looked up by the position within the sample, where those of the row's first sample are found. There is no error;
samples of another layout than the first one get wrong masks.

A mask is built once per row, not once per layer, with tensor operations on the training device. It takes one byte for
each pair of tokens, 64 MB for a row of 8,192, and no step on the way takes an integer for each pair.
"""

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mmray.errors import UserError
from mmray.families.base import PackedRow

TAKE_MASKS = ("sdpa", "eager")
"""Attention implementations that accept a mask with a value for each pair of tokens."""


SEEN_WHOLE = "the tokens of an image see each other, which takes a mask"
"""The reason why the text layers of a model that sees images whole do not compute each sample apart."""


def mask_problem(config: PretrainedConfig) -> str | None:
    """The reason why a model that needs mmray's masks cannot train with its attention implementation; None where it
    can."""
    implementation = config._attn_implementation
    if implementation in TAKE_MASKS:
        return None
    return (
        f"{implementation} takes no mask for each pair of tokens, which a {config.model_type} needs: it sees some "
        "tokens both ways; set model.attention: sdpa"
    )


def sample_numbers(row: PackedRow) -> Tensor:
    """The index of each token's sample in `lengths`, int64 [L]; padding counts as a sample."""
    numbers = torch.arange(len(row.lengths), device=row.lengths.device)
    return torch.repeat_interleave(numbers, row.lengths, output_size=len(row.input_ids))


def run_numbers(members: Tensor, samples: Tensor) -> Tensor:
    """Numbers 1, 2, 3, … of the runs of True in `members` (bool [L]), int64 [L]; 0 elsewhere. A run ends with its
    sample."""
    follows = torch.zeros_like(members)
    follows[1:] = members[:-1] & (samples[1:] == samples[:-1])
    return (members & ~follows).cumsum(0) * members


def causal_mask(samples: Tensor) -> Tensor:
    """The causal mask of packed samples, bool [L, L]: True where a token (row) may attend to another (column) of its
    sample that does not come after it."""
    places = torch.arange(len(samples), device=samples.device)
    mask = samples[:, None] == samples
    mask &= places[:, None] >= places
    return mask


def seeing_blocks(mask: Tensor, blocks: Tensor) -> Tensor:
    """`mask` with attention in both directions inside each block. blocks: int64 [L], 0 for tokens in no block."""
    return mask | (blocks.masked_fill(blocks == 0, -1)[:, None] == blocks)


def within_window(mask: Tensor, window: int) -> Tensor:
    """`mask` without the tokens that lie `window` or more tokens back; tokens that come after are unaffected."""
    places = torch.arange(len(mask), device=mask.device)
    return mask & (places > places[:, None] - window)


def given_mask(mask: Tensor, config: PretrainedConfig, dtype: torch.dtype) -> Tensor:
    """The mask in the form that the model's attention takes, [1, 1, L, L].

    It is bool, or for eager attention a number of `dtype` that is added to the scores. Raises UserError for an
    attention implementation that takes no masks.
    """
    problem = mask_problem(config)
    if problem:
        raise UserError(problem)
    if config._attn_implementation == "eager":
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return mask[None, None]
