"""The loss of trained tokens by their hidden states, in chunks, so that their logits never exist at once.

A vocabulary of 150,000 costs 300 kB of bf16 logits a token, as much for their gradients, and twice as much for each of
their fp32 copies. So the head runs on some hundred tokens at a time, and the loss on a part of these. Gradients of the
hidden states and of the head are computed in the forward pass, where the logits are at hand, and handed out in the
backward pass, as liger-kernel does it. Keeping nothing and computing the logits anew would cost a fourth product
of matrices beside the three: a quarter of the time where the model is wide.

For all that watches modules and weights the head is called once, whatever the number of chunks: ZeRO-3 gathers its
weight once a pass, on ranks with other numbers of trained tokens alike, and every weight gets one gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmray.training.deferred_logits import Step
from mmray.training.token_losses import Measures, Objective, TrainedTokens, chunk_loss

HEAD_BYTES = 2**26
"""Bytes of the logits that the head computes at once."""

LOSS_BYTES = {"cpu": 2**23, "cuda": 2**25}
"""Bytes of an fp32 copy of the logits that the loss is computed of at once; there are three at most. A GPU takes more,
because each call costs it time."""


class HeadLoss:
    """Computes the loss of a micro-batch's trained tokens, and its gradients with it."""

    def __init__(
        self, tokens: TrainedTokens, objective: Objective, scale: float = 1.0, steps: Sequence[Step] = ()
    ) -> None:
        """Binds the tokens.

        Args:
            scale: the factor of the loss in what is differentiated. Gradients are computed for it; another factor in
                the backward pass is right, too, and rounded once more.
            steps: what is done to the head's output before the loss.
        """
        self.tokens, self.objective, self.steps = tokens, objective, steps
        self.scale = torch.full((), scale, dtype=torch.float32, device=tokens.targets.device)  # waits for no device
        self.measures = Measures.zeros(tokens)

    def of_hidden(self, hidden: Tensor, head: torch.nn.Module) -> Tensor:
        """The summed loss, an fp32 scalar, of hidden states [N, width]; one call of the head."""
        forward, plain = head.forward, type(head) is torch.nn.Linear and "forward" not in vars(head)

        def whole_loss(rows: Tensor) -> Tensor:
            parameters = [weight for weight in head.parameters() if weight.requires_grad]
            return self._apply(LinearHead(head) if plain else _ModuleHead(head, forward, parameters), rows, parameters)

        with replaced_forward(head, whole_loss):
            loss: Tensor = head(hidden)
        return loss

    def of_logits(self, logits: Tensor) -> Tensor:
        """The summed loss, an fp32 scalar, of logits [N, vocabulary] that are computed already, with all steps."""
        self.steps = ()
        return self._apply(_NoHead(), logits, [])

    def _apply(self, head: "Head", rows: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        if torch.is_grad_enabled() and (rows.requires_grad or parameters):
            loss: Tensor = _Loss.apply(self, head, rows, *parameters)
            return loss
        return self.run(head, rows, differentiate=False)[0]

    def run(self, head: "Head", rows: Tensor, *, differentiate: bool) -> tuple[Tensor, list[Tensor | None]]:
        """The summed loss, and the gradients of the rows and of the head's parameters, times the scale.

        rows: what the head takes, [N, width]; N may be 0.
        """
        total, gradients = self.scale.new_zeros(()), torch.empty_like(rows) if differentiate else None
        at_once = head.rows_at_once(rows)
        for start in range(0, max(1, len(rows)), at_once):
            chunk = rows[start : start + at_once]
            of_chunk = None if gradients is None else gradients[start : start + at_once]
            total = total + self._run_chunk(head, chunk, start, of_chunk)
        return total, [gradients, *head.gradients()]

    def _run_chunk(self, head: "Head", rows: Tensor, start: int, gradients: Tensor | None) -> Tensor:
        """The summed loss of the rows from `start` on, whose logits are gone when it returns; their gradients are
        written into `gradients`, [n, width], where it is not None."""
        logits = head.logits(rows, differentiate=gradients is not None)
        loss, logit_gradients = self._loss(logits, start, gradients is not None, overwrite=head.overwrite)
        if gradients is not None and logit_gradients is not None:
            gradients.copy_(head.backward(rows, logit_gradients))
        return loss

    def _loss(
        self, logits: Tensor, start: int, differentiate: bool, *, overwrite: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The summed loss of logits [n, vocabulary] of the tokens from `start` on, and their gradients, times the
        scale, which take the place of the logits where `overwrite` is set."""
        total, at_once = self.scale.new_zeros(()), LOSS_BYTES.get(logits.device.type, LOSS_BYTES["cuda"])
        rows = max(1, at_once // (4 * logits.shape[-1]))
        gradients = None if not differentiate else logits if overwrite else torch.empty_like(logits)
        for first in range(0, max(1, len(logits)), rows):
            part = logits[first : first + rows].detach().requires_grad_(differentiate)
            where = slice(start + first, start + first + len(part))
            with torch.set_grad_enabled(differentiate):
                stepped = part
                for step in self.steps:
                    stepped = step(stepped)
                loss = chunk_loss(stepped, self.tokens, where, self.objective, self.measures)
            total = total + loss.detach()
            if gradients is not None:
                (gradients[first : first + len(part)],) = torch.autograd.grad(loss, part, self.scale)
        return total, gradients


class _Loss(torch.autograd.Function):
    """The loss as one operation, whose gradients are known when it is done."""

    @staticmethod
    def forward(ctx: Any, work: HeadLoss, head: "Head", rows: Tensor, *parameters: Tensor) -> Tensor:
        loss, ctx.gradients = work.run(head, rows, differentiate=True)
        ctx.scale = work.scale
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of a loss are handed out once: compute the loss again")
        factor = upstream / ctx.scale  # 1 where the loss was scaled as announced
        return (None, None, *(None if gradient is None else gradient.mul_(factor) for gradient in gradients))


class Head(Protocol):
    """The last part of a model, applied to some rows at a time."""

    overwrite: bool
    """True if the gradients of logits may take the logits' place."""

    def rows_at_once(self, rows: Tensor) -> int:
        """Number of rows that it is applied to at once. rows: all of them."""
        ...

    def logits(self, rows: Tensor, *, differentiate: bool) -> Tensor:
        """The logits [n, vocabulary] of rows [n, width], detached."""
        ...

    def backward(self, rows: Tensor, logit_gradients: Tensor) -> Tensor:
        """The gradients of the rows of which logits were computed last; those of parameters are added up."""
        ...

    def gradients(self) -> list[Tensor | None]:
        """The sums of the gradients of the parameters that are trained, in the order of `Module.parameters`."""
        ...


class LinearHead:
    """A matrix, and perhaps a bias, whose gradients are summed in place."""

    overwrite = True

    def __init__(self, module: Any) -> None:
        self.weight, self.bias = module.weight, module.bias
        self._of_weight: Tensor | None = None
        self._of_bias: Tensor | None = None

    def rows_at_once(self, rows: Tensor) -> int:
        return _rows_of_head(self.weight.shape[0], rows)

    def logits(self, rows: Tensor, *, differentiate: bool) -> Tensor:
        return F.linear(rows, self.weight, self.bias)

    def backward(self, rows: Tensor, logit_gradients: Tensor) -> Tensor:
        if self.weight.requires_grad:
            if self._of_weight is None:
                self._of_weight = logit_gradients.t().mm(rows)
            else:
                self._of_weight.addmm_(logit_gradients.t(), rows)
        if self.bias is not None and self.bias.requires_grad:
            of_bias = logit_gradients.sum(0)
            self._of_bias = of_bias if self._of_bias is None else self._of_bias + of_bias
        return logit_gradients.mm(self.weight)

    def gradients(self) -> list[Tensor | None]:
        return self.in_order(self._of_weight, self._of_bias)

    def in_order(self, of_weight: Tensor | None, of_bias: Tensor | None) -> list[Tensor | None]:
        """The gradients of those that are trained: weight, bias."""
        pairs = (self.weight, of_weight), (self.bias, of_bias)
        return [gradient for weight, gradient in pairs if weight is not None and weight.requires_grad]


class _ModuleHead:
    """Any head: with adapters, quantised, kept whole by peft. Its parameters' gradients come from autograd."""

    overwrite = False  # what the module keeps for its own backward pass may be its output

    def __init__(self, module: Any, forward: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]) -> None:
        self._forward, self._parameters, self._vocabulary = forward, parameters, module.out_features
        self._sums: list[Tensor | None] = [None] * len(parameters)

    def rows_at_once(self, rows: Tensor) -> int:
        return _rows_of_head(self._vocabulary, rows)

    def logits(self, rows: Tensor, *, differentiate: bool) -> Tensor:
        self._rows = rows.detach().requires_grad_(differentiate)
        with torch.set_grad_enabled(differentiate):
            self._logits = self._forward(self._rows)
        return self._logits.detach()

    def backward(self, rows: Tensor, logit_gradients: Tensor) -> Tensor:
        of_rows, *gradients = torch.autograd.grad(
            self._logits, [self._rows, *self._parameters], logit_gradients, allow_unused=True
        )
        for number, gradient in enumerate(gradients):
            if gradient is not None:
                before = self._sums[number]
                self._sums[number] = gradient.clone() if before is None else before.add_(gradient)
        return of_rows

    def gradients(self) -> list[Tensor | None]:
        return self._sums


class _NoHead:
    """Logits that the model has computed itself."""

    overwrite = False  # the model may need them in its own backward pass

    def rows_at_once(self, rows: Tensor) -> int:
        return max(1, len(rows))

    def logits(self, rows: Tensor, *, differentiate: bool) -> Tensor:
        return rows

    def backward(self, rows: Tensor, logit_gradients: Tensor) -> Tensor:
        return logit_gradients

    def gradients(self) -> list[Tensor | None]:
        return []


def _rows_of_head(vocabulary: int, rows: Tensor) -> int:
    return max(1, HEAD_BYTES // (vocabulary * rows.element_size()))


def runs_in_chunks(head: torch.nn.Module) -> bool:
    """False for a head with modules inside whose weights ZeRO-3 has sharded.

    Each of them gathers its weights whenever it is called, on all ranks together, which have other numbers of chunks.
    """
    inside = (weight for part in head.children() for weight in part.parameters())
    return not any(hasattr(weight, "ds_id") for weight in inside)


@contextmanager
def replaced_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Lets a module run another function inside the block, with all that hooks do around it."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
