"""Labels of packed rows: which tokens a model learns from.

A sample's `LossRule` says how its labels come about; media tokens, padding and the first token of every sample are
never trained. The first token because a packed row predicts it from the last state of the sample before it: with it,
gradients were 20 to 30 % off those of the samples alone.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

from mmray.masks.roles import RoleBoundary, role_keep_mask

IGNORE_INDEX = -100
"""The label of a token that is not trained, as PyTorch's cross-entropy has it."""

PADDING_SEGMENT = -1
"""The segment of tokens that belong to no sample."""


class LossRule(IntEnum):
    """How the trained tokens of a sample are found."""

    ALL = 0
    """Every token but media (pre-training)."""
    ROLES = 1
    """The turns of the roles to train (chat)."""
    GIVEN = 2
    """As the row's own labels say (`tokenized` rows)."""


@dataclass(frozen=True)
class LabelMaker:
    """Everything labels depend on besides the tokens: the family's ids and the job's masking settings."""

    boundaries: tuple[RoleBoundary, ...]
    roles_to_train: tuple[str, ...]
    train_on_eos: Literal["turn", "all", "last", "none"]
    media_token_ids: tuple[int, ...]

    def labels(
        self, input_ids: Tensor, segment_ids: Tensor, rules: Tensor, given: Tensor, media_blocks: Tensor
    ) -> Tensor:
        """Labels of a packed row, with tensor operations alone.

        input_ids: int [L]; segment_ids: int [L], one value per sample, PADDING_SEGMENT outside samples;
        rules: int [L], the LossRule of each token's sample; given: bool [L], read where the rule is GIVEN;
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
        trained = (rules == LossRule.ALL) | ((rules == LossRule.ROLES) & by_role) | ((rules == LossRule.GIVEN) & given)
        first = torch.ones_like(trained)
        first[1:] = segment_ids[1:] != segment_ids[:-1]
        media = torch.isin(
            input_ids, torch.tensor(self.media_token_ids, device=input_ids.device, dtype=input_ids.dtype)
        )
        edges = torch.zeros(len(input_ids) + 1, dtype=torch.int32, device=input_ids.device)
        starts, counts = media_blocks.to(torch.int64).unbind(1)
        edges.scatter_add_(0, starts, torch.ones_like(starts, dtype=torch.int32))
        edges.scatter_add_(0, starts + counts, -torch.ones_like(starts, dtype=torch.int32))
        media |= edges[:-1].cumsum(0) > 0
        trained &= ~first & ~media & (segment_ids != PADDING_SEGMENT)
        return torch.where(trained, input_ids.to(torch.int64), IGNORE_INDEX)


def segment_ids(lengths: Tensor, padding: int = 0) -> Tensor:
    """0, 0, 1, 1, 1, … for samples of these lengths, int [samples]; int64 [L].

    padding: tokens at the end that belong to none.
    """
    numbers = torch.arange(len(lengths), device=lengths.device)
    segments = torch.repeat_interleave(numbers, lengths.to(torch.int64))
    segments[len(segments) - padding :] = PADDING_SEGMENT
    return segments
