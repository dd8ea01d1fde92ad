"""Labels of packed rows: which tokens a model learns from.

A sample's `LossRule` says how its labels come about; media tokens, padding and the first token of every sample are
never trained. The first token because a packed row predicts it from the last state of the sample before it: with it,
gradients were 20 to 30 % off those of the samples alone.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmray.loss.roles import RoleBoundary, role_keep_mask
from mmray.packing.pack import PADDING_SEGMENT

IGNORE_INDEX = -100
"""The label of a token that is not trained, as PyTorch's cross-entropy has it."""


class LossRule(IntEnum):
    """How the trained tokens of a sample are found."""

    ALL = 0
    """Every token but media."""
    ROLES = 1
    """The turns of the roles to train, found when training."""
    GIVEN = 2
    """Token by token as found when preparing: what the row itself or its chat template says."""


@dataclass(frozen=True)
class LabelMaker:
    """Everything labels depend on besides the tokens: the family's ids and the job's `loss` setting."""

    boundaries: tuple[RoleBoundary, ...]
    roles_to_train: tuple[str, ...]
    train_on_eos: Literal["turn", "all", "last", "none"]
    media_token_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that train where they follow a trained turn (`with_stop_tokens`), though they open the next one."""

    def labels(
        self, input_ids: Tensor, segment_ids: Tensor, loss_rules: Tensor, given_mask: Tensor, media_blocks: Tensor
    ) -> Tensor:
        """Labels of a packed row, with tensor operations alone; on a GPU nothing here waits for it.

        input_ids: int [L]; segment_ids: int64 [L], the number of each token's sample, PADDING_SEGMENT outside samples;
        rules: int [samples], the LossRule of each; given: bool [L], read where the rule is GIVEN;
        media_blocks: int [images, 2], the first token and the number of tokens of what stands for each image.
        Returns int64 [L]: the token, or IGNORE_INDEX.
        """
        by_role = role_keep_mask(
            input_ids,
            self.boundaries,
            roles_to_train=self.roles_to_train,
            train_on_eos=self.train_on_eos,
            segment_ids=segment_ids,
        )
        by_role = with_stop_tokens(by_role, input_ids, self.stop_token_ids)
        rule = loss_rules[segment_ids]
        trained = (
            (rule == LossRule.ALL) | ((rule == LossRule.ROLES) & by_role) | ((rule == LossRule.GIVEN) & given_mask)
        )
        first = torch.ones_like(trained)
        first[1:] = segment_ids[1:] != segment_ids[:-1]
        media = _is_one_of(input_ids, self.media_token_ids)
        edges = torch.zeros(len(input_ids) + 1, dtype=torch.int32, device=input_ids.device)
        starts, counts = media_blocks.to(torch.int64).unbind(1)
        edges.scatter_add_(0, starts, torch.ones_like(starts, dtype=torch.int32))
        edges.scatter_add_(0, starts + counts, -torch.ones_like(starts, dtype=torch.int32))
        media = media | (edges[:-1].cumsum(0) > 0)
        trained &= ~first & ~media & (segment_ids != PADDING_SEGMENT)
        return input_ids.to(torch.int64).masked_fill(~trained, IGNORE_INDEX)

    def of_arrays(
        self, input_ids: np.ndarray, lengths: np.ndarray, loss_rules: np.ndarray, given_mask: np.ndarray, blocks: Any
    ) -> np.ndarray:
        """The same for samples one after another on the CPU: `lengths` and `rules` are int [samples], `given` bool [L],
        `blocks` a list or array of (first token, number of tokens). Returns int64 [L]."""
        labels = self.labels(
            torch.from_numpy(input_ids.astype(np.int64)),
            segment_ids(torch.from_numpy(lengths.astype(np.int64))),
            torch.from_numpy(loss_rules.astype(np.int64)),
            torch.from_numpy(given_mask.astype(bool)),
            torch.from_numpy(np.asarray(blocks, dtype=np.int64).reshape(-1, 2)),
        )
        return labels.numpy()


def with_stop_tokens(keep: Tensor, input_ids: Tensor, stop_token_ids: tuple[int, ...]) -> Tensor:
    """`keep` (bool [L]), and each of these tokens that directly follows a kept one.

    Some models end their turn with the token that opens the next one in the template's text: GLM's `<|user|>` or
    `<|observation|>`. Where samples follow one another, the first token of one may be set by the last of another;
    first tokens are never trained.
    """
    if not stop_token_ids:
        return keep
    follows = torch.zeros_like(keep)
    follows[1:] = keep[:-1]
    return keep | (follows & _is_one_of(input_ids, stop_token_ids))


def _is_one_of(input_ids: Tensor, token_ids: tuple[int, ...]) -> Tensor:
    """bool, shape of input_ids. By a table over the vocabulary: `torch.isin` sorts, and waits for a GPU, when the
    tokens are more than about 40; Idefics3 has 100."""
    table = _table(token_ids, input_ids.device)
    return table[input_ids.to(torch.int64).clamp(max=len(table) - 1)]


@lru_cache(maxsize=64)
def _table(token_ids: tuple[int, ...], device: torch.device) -> Tensor:
    """bool, True at the token ids; its last place is that of all larger ones."""
    table = torch.zeros(max(token_ids, default=-1) + 2, dtype=torch.bool)
    table[list(token_ids)] = True
    return table.to(device)


def segment_ids(lengths: Tensor, padding: Tensor | None = None, *, total: int | None = None) -> Tensor:
    """0, 0, 1, 1, 1, … for samples of these lengths, int [samples]; int64 [L].

    padding: bool [samples], True for what is no sample: its tokens are of PADDING_SEGMENT. total: L; without it a GPU
    is waited for.
    """
    numbers = torch.arange(len(lengths), device=lengths.device)
    if padding is not None:
        numbers = numbers.masked_fill(padding, PADDING_SEGMENT)
    return torch.repeat_interleave(numbers, lengths.to(torch.int64), output_size=total)
