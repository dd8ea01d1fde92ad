"""The loss of a packed micro-batch: a sum over its trained tokens, to be divided by the global count.

A sum and not a mean, because the mean over a global batch is not the mean of the micro-batches' means when
these hold different numbers of trained tokens. Only trained positions get logits, because images and prompts need none,
and only some of them at a time (`head_loss.py`). What a model's class does to its logits is done to them, too
(`deferred_logits.py`): the loss is that of the model's own logits.
"""

import inspect
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmray.loss.rules import IGNORE_INDEX
from mmray.training.deferred_logits import DeferredLogits, Head, deferred_head
from mmray.training.head_loss import HeadLoss, replaced_forward, runs_in_chunks
from mmray.training.model import transformers_model
from mmray.training.token_losses import Measures, Objective, TrainedTokens

log = logging.getLogger("mmray")

PLAIN = Objective()


@dataclass(frozen=True)
class PackedLoss:
    """The loss of a micro-batch."""

    loss: Tensor
    """Sum of the losses that are trained, an fp32 scalar attached to the graph."""
    measures: Measures
    """Sums over the trained tokens, detached."""


def count_trained_tokens(labels: Tensor) -> Tensor:
    """Number of labels [B, L] that enter the loss, as an int64 scalar on their device.

    The first position of a row has no predecessor to be predicted from and never counts.
    """
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def trained_positions(labels: Tensor) -> Tensor:
    """The places of the trained tokens in labels[0, 1:], int64 [N]. labels: of one row, int64 [1, L], on the host, so
    that no device is waited for."""
    (row,) = labels.numpy()
    return torch.from_numpy(np.flatnonzero(row[1:] != IGNORE_INDEX))


def packed_loss_sum(model: torch.nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of all trained tokens, an fp32 scalar attached to the graph.

    The arguments are those of `packed_loss`.
    """
    return packed_loss(model, inputs, labels).loss


def packed_loss(
    model: torch.nn.Module, inputs: dict[str, Tensor], labels: Tensor, *, positions: Tensor | None = None,
    objective: Objective = PLAIN, sets: Tensor | None = None, num_sets: int = 0, scale: float = 1.0,
    kind: type[HeadLoss] = HeadLoss,
) -> PackedLoss:  # fmt: skip
    """The summed loss of all trained tokens.

    Args:
        model: a transformers model, or what wraps one (`transformers_model`).
        inputs: the model's keyword arguments, without labels and use_cache: the cache stays off, because transformers
            detects packed sequences only without it.
        labels: int64 [B, L] aligned with input_ids; the token at t is predicted from position t - 1, and is not trained
            on where its label is IGNORE_INDEX.
        positions: `trained_positions` of labels of one row, on their device. None: they are looked for, which waits for
            the device.
        sets: the set of each token of the row, int64 [L] on the labels' device, from 0 for every trained one; None
            where the losses of sets are not measured apart.
        scale: the factor that the loss gets before its backward pass (`HeadLoss`).
        kind: what computes the loss.

    Without a trained token the loss is zero and still attached to every parameter, so that under ZeRO-3 this rank
    takes part in every collective of the backward pass, which can run once.
    """
    inner = transformers_model(model)
    targets = labels[:, 1:]
    trained = None if positions is not None else targets != IGNORE_INDEX

    def chosen(values: Tensor) -> Tensor:
        """The values [N, ...] of the trained tokens, of values [B, L - 1, ...] of all."""
        return values[0, positions] if trained is None else values[trained]

    token_sets = None if sets is None else chosen(sets[1:].expand_as(targets))
    work = kind(TrainedTokens(chosen(targets), token_sets, num_sets), objective, scale)
    options: dict[str, Any] = {"use_cache": False}
    if labels.shape[0] == 1 and _takes_logits_to_keep(type(inner)):
        options["logits_to_keep"] = positions if trained is None else trained[0].nonzero().squeeze(1)
    forward = inner.forward

    def of_trained(values: Tensor) -> Tensor:
        """The values [N, ...] of the trained tokens of the model's output [B, positions, ...]."""
        return values[0] if "logits_to_keep" in options else chosen(values[:, :-1])

    def whole_loss(*arguments: Any, **named: Any) -> Tensor:
        with deferred_head(inner) as head:
            logits = forward(*arguments, **named).logits
        deferred = isinstance(logits, DeferredLogits) and logits.computed is None
        if deferred and runs_in_chunks(logits.head.module):
            work.steps = logits.steps
            return work.of_hidden(of_trained(logits.hidden), logits.head.module)
        reason = "has modules inside its head, which ZeRO-3 shards" if deferred else _reason(head)
        _tell_of_whole_logits(type(inner).__name__, reason)
        whole = logits.compute("") if isinstance(logits, DeferredLogits) else logits
        return work.of_logits(of_trained(whole))

    with replaced_forward(inner, whole_loss):
        loss = model(**inputs, **options)
    return PackedLoss(loss, work.measures)


def _reason(head: Head | None) -> str:
    """The reason why a model has computed its logits itself."""
    return f"does `{head.needed_by}` with them" if head else "has no head that runs by itself"


@cache
def _tell_of_whole_logits(model_class: str, reason: str) -> None:
    """Warns, once, that a model's logits take memory. reason: a verb and what follows it."""
    log.warning(
        "the logits of all trained tokens of a row are computed at once, which takes memory: %s %s", model_class, reason
    )


def _takes_logits_to_keep(model_class: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters
