"""The loss of a packed micro-batch: a sum over its trained tokens, to be divided by the global count.

A sum and not a mean, because the mean over a global batch is not the mean of the micro-batches' means when
these hold different numbers of trained tokens. Only trained positions get logits, because a vocabulary of 150,000
costs 300 kB of bf16 logits a token; images and prompts need none. Their fp32 copies, twice as large, exist for
one chunk at a time, also in the backward pass, which computes them anew.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmray.loss.rules import IGNORE_INDEX
from mmray.training.model import transformers_model

# fp32 logits that exist at once, about 256 MB.
MAX_CHUNK_ELEMENTS = 2**26


def count_trained_tokens(labels: Tensor) -> Tensor:
    """Number of labels [B, L] that enter the loss, as an int64 scalar on their device.

    The first position of a row has no predecessor to be predicted from and never counts.
    """
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def packed_loss_sum(model: torch.nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of all trained tokens, an fp32 scalar attached to the graph.

    model: a transformers model, or what wraps one (`transformers_model`).
    inputs: the model's keyword arguments, without labels and use_cache: the cache stays off, because transformers
    detects packed sequences only without it.
    labels: int64 [B, L] aligned with input_ids; the token at t is predicted from position t - 1, and is not trained on
    where its label is IGNORE_INDEX.

    Without a trained token the result is zero and still attached to every parameter, so that under ZeRO-3 this rank
    takes part in every collective of the backward pass.
    """
    logits, targets, _ = _trained_logits(model, inputs, labels)
    return _in_chunks(_chunk_sum, logits, targets)


def packed_loss_sums(
    model: torch.nn.Module, inputs: dict[str, Tensor], labels: Tensor, sets: Tensor, num_sets: int
) -> tuple[Tensor, Tensor]:
    """Sums of the cross-entropies of the trained tokens of each set, fp32 [num_sets], and their numbers, int64.

    sets: the set of each token of the row, int64 [L] on the labels' device, from 0 for every trained one. The other
    arguments are those of `packed_loss_sum`, and so is the sum of the result, up to rounding.
    """
    logits, targets, trained = _trained_logits(model, inputs, labels)
    token_sets = sets[1:].expand_as(trained)[trained]

    def chunk_sums(chunk: Tensor, chunk_targets: Tensor, chunk_sets: Tensor) -> Tensor:
        losses = F.cross_entropy(chunk.float(), chunk_targets, reduction="none")
        return (losses[:, None] * F.one_hot(chunk_sets, num_sets)).sum(0)  # unlike index_add, the same on every GPU

    return _in_chunks(chunk_sums, logits, targets, token_sets), torch.bincount(token_sets, minlength=num_sets)


def _trained_logits(model: torch.nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logits [N, V] and targets [N] of the trained tokens, and which tokens of labels[:, 1:] they are, bool."""
    targets = labels[:, 1:]
    trained = targets != IGNORE_INDEX
    if labels.shape[0] == 1 and _takes_logits_to_keep(type(transformers_model(model))):
        positions = trained[0].nonzero().squeeze(1)
        logits = model(**inputs, use_cache=False, logits_to_keep=positions).logits[0]
    else:
        logits = model(**inputs, use_cache=False).logits[:, :-1][trained]
    return logits, targets[trained], trained


def _in_chunks(chunk_sum: Callable[..., Tensor], logits: Tensor, *columns: Tensor) -> Tensor:
    """Sum of `chunk_sum` over chunks of rows. logits: [N, V]; columns: [N] each, passed along; N may be 0."""
    rows = max(1, MAX_CHUNK_ELEMENTS // logits.shape[-1])
    total: Tensor | None = None
    for parts in zip(logits.split(rows), *(column.split(rows) for column in columns), strict=True):
        part = checkpoint(chunk_sum, *parts, use_reentrant=False, preserve_rng_state=False)
        total = part if total is None else total + part
    assert total is not None  # a split has at least one part, an empty one
    return total


def _chunk_sum(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def _takes_logits_to_keep(model_class: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters
