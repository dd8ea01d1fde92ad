"""Labels of packed rows: which tokens a model learns from.

A sample's `LossRule` says how its labels are computed. Media tokens, padding and the first token of every sample are
never trained on. A packed row predicts a sample's first token from the last state of the sample before it: with that
token in the loss, gradients were 20 to 30 % off those of the samples alone.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmray.loss.roles import RoleBoundary, role_keep_mask
from mmray.loss.rules import IGNORE_INDEX, LossRule
from mmray.packing.pack import PADDING_SEGMENT


@dataclass(frozen=True)
class LabelMaker:
    """Makes labels from tokens, with the family's token ids and the job's `loss` setting."""

    boundaries: tuple[RoleBoundary, ...]
    roles_to_train: tuple[str, ...]
    train_on_eos: Literal["turn", "all", "last", "none"]
    media_token_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that are trained on where they follow a trained turn, though they open the next one
    (`with_stop_tokens`)."""

    def labels(
        self, input_ids: Tensor, segment_ids: Tensor, loss_rules: Tensor, given_mask: Tensor, media_blocks: Tensor
    ) -> Tensor:
        """Computes the labels of a packed row by tensor operations alone, without waiting for a GPU.

        input_ids: the row's tokens, int [L].
        segment_ids: the number of each token's sample, PADDING_SEGMENT outside samples, int64 [L].
        loss_rules: the LossRule of each sample, int [samples].
        given_mask: the tokens to train on where the rule is GIVEN, bool [L].
        media_blocks: the first token and the number of tokens of each image, int [images, 2].

        Returns int64 [L]: the token where it is trained on, else IGNORE_INDEX.
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
        """Computes the labels of samples that follow one another, on the CPU.

        input_ids: the tokens of all samples, int [L].
        lengths: the number of tokens of each sample, int [samples].
        loss_rules: the LossRule of each sample, int [samples].
        given_mask: the tokens to train on where the rule is GIVEN, bool [L].
        blocks: a list or array of (first token, number of tokens), one for each image.

        Returns int64 [L], as `labels` does.
        """
        labels = self.labels(
            torch.from_numpy(input_ids.astype(np.int64)),
            segment_ids(torch.from_numpy(lengths.astype(np.int64))),
            torch.from_numpy(loss_rules.astype(np.int64)),
            torch.from_numpy(given_mask.astype(bool)),
            torch.from_numpy(np.asarray(blocks, dtype=np.int64).reshape(-1, 2)),
        )
        return labels.numpy()


def with_stop_tokens(keep: Tensor, input_ids: Tensor, stop_token_ids: tuple[int, ...]) -> Tensor:
    """Adds to a mask (`keep`, bool [L]) every stop token that directly follows a kept token.

    Some models end their turn with the token that opens the next one in the template's text: GLM's `<|user|>` or
    `<|observation|>`. Where samples follow one another, the last token of one may set the first token of the next;
    first tokens are never trained on.
    """
    if not stop_token_ids:
        return keep
    follows = torch.zeros_like(keep)
    follows[1:] = keep[:-1]
    return keep | (follows & _is_one_of(input_ids, stop_token_ids))


def _is_one_of(input_ids: Tensor, token_ids: tuple[int, ...]) -> Tensor:
    """Marks the tokens that are among token_ids; bool, shape of input_ids.

    A table over the vocabulary is used because `torch.isin` sorts, and waits for a GPU, when there are more than about
    40 token ids; Idefics3 has 100.
    """
    table = _table(token_ids, input_ids.device)
    return table[input_ids.to(torch.int64).clamp(max=len(table) - 1)]


@lru_cache(maxsize=64)
def _table(token_ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Builds a table over the vocabulary, bool: True at the token ids. Its last entry stands for all larger ids."""
    table = torch.zeros(max(token_ids, default=-1) + 2, dtype=torch.bool)
    table[list(token_ids)] = True
    return table.to(device)


def segment_ids(lengths: Tensor, padding: Tensor | None = None, *, total: int | None = None) -> Tensor:
    """Numbers the tokens of samples by their sample: 0, 0, 1, 1, 1, … for lengths [2, 3].

    lengths: the number of tokens of each sample, int [samples].
    padding: True for entries that are no sample, whose tokens get PADDING_SEGMENT, bool [samples].
    total: the sum of lengths, L. Without it the call waits for a GPU.

    Returns int64 [L].
    """
    numbers = torch.arange(len(lengths), device=lengths.device)
    if padding is not None:
        numbers = numbers.masked_fill(padding, PADDING_SEGMENT)
    return torch.repeat_interleave(numbers, lengths.to(torch.int64), output_size=total)
