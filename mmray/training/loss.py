"""The loss of a packed micro-batch: a sum over its trained tokens, to be divided by the global count.

A sum and not a mean, because the mean over a global batch is not the mean of the micro-batches' means when
these hold different numbers of trained tokens. Only trained positions get logits, because a vocabulary of 150,000
costs 300 kB of bf16 logits a token; images and prompts need none. Their fp32 copies, twice as large, exist for
one chunk at a time, also in the backward pass, which computes them anew.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmray.loss.labels import IGNORE_INDEX

# fp32 logits that exist at once, about 256 MB.
MAX_CHUNK_ELEMENTS = 2**26


def count_trained_tokens(labels: Tensor) -> Tensor:
    """Number of labels [B, L] that enter the loss, as an int64 scalar on their device.

    The first position of a row has no predecessor to be predicted from and never counts.
    """
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def packed_loss_sum(model: torch.nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of all trained tokens, an fp32 scalar attached to the graph.

    model: a transformers model, or a DeepSpeed engine around one.
    inputs: the model's keyword arguments, without labels and use_cache: the cache stays off, because transformers
    detects packed sequences only without it.
    labels: int64 [B, L] aligned with input_ids; the token at t is predicted from position t - 1, and is not trained on
    where its label is IGNORE_INDEX.

    Without a trained token the result is zero and still attached to every parameter, so that under ZeRO-3 this rank
    takes part in every collective of the backward pass.
    """
    targets = labels[:, 1:]
    trained = targets != IGNORE_INDEX
    module: Any = getattr(model, "module", model)
    if labels.shape[0] == 1 and _takes_logits_to_keep(type(module)):
        positions = trained[0].nonzero().squeeze(1)
        logits = model(**inputs, use_cache=False, logits_to_keep=positions).logits[0]
    else:
        logits = model(**inputs, use_cache=False).logits[:, :-1][trained]
    return _cross_entropy_sum(logits, targets[trained])


def _cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies, an fp32 scalar, computed in chunks of rows. logits: [N, V]; targets: [N]; N may be
    0."""
    rows = max(1, MAX_CHUNK_ELEMENTS // logits.shape[-1])
    total = logits.new_zeros((), dtype=torch.float32)
    for chunk, chunk_targets in zip(logits.split(rows), targets.split(rows), strict=True):
        total = total + checkpoint(_chunk_sum, chunk, chunk_targets, use_reentrant=False, preserve_rng_state=False)
    return total


def _chunk_sum(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def _takes_logits_to_keep(model_class: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters
