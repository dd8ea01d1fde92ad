"""The loss by liger-kernel, one kernel for softmax, loss and gradient, on GPUs.

It computes what `HeadLoss` does, also its gradients in the forward pass. It is asked for by `training.fused_loss`, and
never taken by itself, so that two runs of a job compute in one way wherever they run.
"""

import importlib.util
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmray.errors import UserError
from mmray.training.deferred_logits import Step
from mmray.training.head_loss import Head, HeadLoss, LinearHead
from mmray.training.settings import TrainingSettings


class LigerLoss(HeadLoss):
    """Computes the loss of trained tokens with liger-kernel. Evaluation and rows without such tokens do without it."""

    def run(self, head: Head, rows: Tensor, *, differentiate: bool) -> tuple[Tensor, list[Tensor | None]]:
        """As `HeadLoss.run`. Raises UserError for a model whose logits liger-kernel cannot compute."""
        if not differentiate or not len(rows):
            return super().run(head, rows, differentiate=differentiate)
        if not isinstance(head, LinearHead):
            raise UserError(
                "training.fused_loss: the model's head is no plain matrix, which liger needs; set it to null"
            )
        from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

        losses, _, correct, _, *gradients = fused_linear_cross_entropy_forward(
            rows, head.weight, self.tokens.targets, bias=head.bias, reduction="none", softcap=soft_cap(self.steps),
            return_token_accuracy=True, compute_gradients=True, weight_requires_grad=head.weight.requires_grad,
        )  # fmt: skip
        self.measures.cross_entropy, self.measures.correct = losses.sum(), correct.sum()
        if self.tokens.sets is not None:
            members = F.one_hot(self.tokens.sets, self.tokens.num_sets)
            self.measures.set_sums = (losses[:, None] * members).sum(0)
            self.measures.set_correct = (correct[:, None] * members).sum(0)
        scaled = [None if gradient is None else gradient.mul_(self.scale) for gradient in gradients]
        of_rows, of_weight, of_bias = scaled
        return self.measures.cross_entropy, [of_rows, *head.in_order(of_weight, of_bias)]


def soft_cap(steps: Sequence[Step]) -> float | None:
    """The cap of logits in `cap * tanh(logits / cap)`; None where nothing is done to them.

    Raises UserError for other steps.
    """
    kinds = [(step.function.__name__.strip("_"), step.arguments) for step in steps]
    match [kind for kind in kinds if kind[0] not in ("float", "contiguous")]:
        case []:
            return None
        case [("div" | "truediv", (float() | int() as cap,)), ("tanh", ()), ("mul" | "rmul", (factor,))] if (
            cap == factor
        ):
            return float(cap)
    done = ", ".join(name for name, _ in kinds)
    raise UserError(f"training.fused_loss: the model does {done} with its logits, which liger cannot; set it to null")


def check_fused_loss(settings: TrainingSettings, device: torch.device) -> None:
    """Raises UserError where `training.fused_loss` cannot be honoured on a device."""
    if settings.fused_loss is None:
        return
    if device.type != "cuda":
        raise UserError(
            f"training.fused_loss: liger runs on CUDA, and this worker trains on {device.type}; set it to null"
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError("training.fused_loss: liger needs the package liger-kernel: pip install 'mmray[liger]'")
