"""The losses of trained tokens by their logits, and what is counted of them at the same time."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """The loss of a token that is trained; by default its cross-entropy."""

    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over the vocabulary."""
    z_loss: float = 0.0
    """Factor of the squared logarithm of the softmax's denominator, which is added to the loss."""


@dataclass(frozen=True)
class TrainedTokens:
    """The trained tokens of a micro-batch: N of them."""

    targets: Tensor
    """Token ids to be predicted, int64 [N]."""
    sets: Tensor | None = None
    """Number of each token's set, int64 [N]; None where the losses of sets are not measured apart."""
    num_sets: int = 0


@dataclass
class Measures:
    """Sums over trained tokens, detached; fp32 scalars, which grow chunk by chunk."""

    cross_entropy: Tensor
    """Sum of the cross-entropies, in nats."""
    smoothed: Tensor
    """Sum of the cross-entropies with smoothed targets; 0 without label smoothing."""
    squared_normaliser: Tensor
    """Sum of the squared logarithms of the softmax's denominators; 0 without z-loss."""
    correct: Tensor
    """Number of tokens that are the most likely ones by the model: no other one has a larger logit."""
    set_sums: Tensor
    """Sum of the cross-entropies of each set, fp32 [num_sets]."""
    set_counts: Tensor
    """Number of trained tokens of each set, int64 [num_sets]."""
    set_correct: Tensor
    """Number of those of each set that are the most likely ones, fp32 [num_sets]."""

    @classmethod
    def zeros(cls, tokens: TrainedTokens) -> "Measures":
        """Sums of zero on the device of the targets; the tokens of the sets are counted."""
        zero = torch.zeros((), dtype=torch.float32, device=tokens.targets.device)
        counts = tokens.targets.new_zeros(tokens.num_sets)
        if tokens.sets is not None:  # `bincount` would wait for a GPU
            counts = (tokens.sets[:, None] == torch.arange(tokens.num_sets, device=counts.device)).sum(0)
        of_sets = zero.new_zeros(tokens.num_sets)
        return cls(zero, zero, zero, zero, of_sets, counts, of_sets)


def chunk_loss(logits: Tensor, tokens: TrainedTokens, rows: slice, objective: Objective, measures: Measures) -> Tensor:
    """The sum of the trained losses of a chunk of tokens, attached to its logits [n, vocabulary]; adds to the measures.

    rows: the tokens of the chunk, n of them, which may be 0.
    """
    logits, targets = logits.float(), tokens.targets[rows]
    likelihoods = F.log_softmax(logits, dim=-1)
    loss = cross_entropy = F.nll_loss(likelihoods, targets, reduction="sum")
    measures.cross_entropy = measures.cross_entropy + cross_entropy.detach()
    with torch.no_grad():
        of_targets = likelihoods.gather(1, targets[:, None])
        correct = of_targets >= likelihoods.amax(dim=-1, keepdim=True)
        measures.correct = measures.correct + correct.sum()
        if tokens.sets is not None:
            # Unlike index_add, these sums are the same on every GPU.
            members = F.one_hot(tokens.sets[rows], tokens.num_sets)
            measures.set_sums = measures.set_sums + (-of_targets * members).sum(0)
            measures.set_correct = measures.set_correct + (correct * members).sum(0)
    if objective.label_smoothing:
        spread = -likelihoods.mean(dim=-1).sum()
        loss = (1 - objective.label_smoothing) * cross_entropy + objective.label_smoothing * spread
        measures.smoothed = measures.smoothed + loss.detach()
    if objective.z_loss:
        squared = logits.logsumexp(dim=-1).square().sum()
        loss = loss + objective.z_loss * squared
        measures.squared_normaliser = measures.squared_normaliser + squared.detach()
    return loss
