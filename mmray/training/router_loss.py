"""The balancing loss of a mixture of experts: without it a router learns to send all tokens to a few experts.

It is transformers' `load_balancing_loss_func` (Switch Transformer, equations 4 to 6) of each sample by itself, and the
mean of these over the global batch, by tokens. So it is the same number for any split of a batch, which a loss over
whole micro-batches is not: it is a product of two means, and a product of means over parts is another number. Only
real samples count, neither what is added to keep ranks in step nor samples that are left out of the loss.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from mmray.errors import UserError
from mmray.loss.labels import PADDING_SEGMENT
from mmray.training.settings import RouterLoss


class Routers:
    """The routers of a model, and their outputs in the last recorded forward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._top_k: int = model.config.get_text_config().num_experts_per_tok
        self._logits: list[Tensor] = []
        self._records = False
        for router, index in _routers(model):
            router.register_forward_hook(lambda _, __, output, index=index: self._keep(output[index]))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records the routers' outputs inside the block: those of a forward pass, not of its repetition by gradient
        checkpointing."""
        self._logits, self._records = [], True
        try:
            yield
        finally:
            self._records = False

    def balancing_sum(self, segments: Tensor) -> Tensor:
        """Sum of the balancing losses of the samples of the recorded row, each times its tokens; fp32, with its
        gradient.

        segments: index of each token's sample, int64 [L] on the CPU; PADDING_SEGMENT for tokens that do not count.
        """
        logits, self._logits = self._logits, []
        return _balancing_sum(logits, segments, self._top_k)

    def _keep(self, logits: Tensor) -> None:
        if self._records:
            self._logits.append(logits)


def _balancing_sum(logits: list[Tensor], segments: Tensor, top_k: int) -> Tensor:
    """Sum over the samples of a row of their balancing loss times their number of tokens, an fp32 scalar.

    logits: each layer's router logits, [L, experts]. segments: as for `Routers.balancing_sum`.

    As in transformers, layers are pooled: shares and probabilities are means over the sample's tokens in all layers.
    """
    samples, experts, device = int(segments.max()) + 1, logits[0].shape[-1], logits[0].device
    places = segments.masked_fill(segments == PADDING_SEGMENT, samples).to(device)  # the last row is thrown away
    shape = (samples + 1, experts)
    chosen, likely = logits[0].new_zeros(shape, dtype=torch.float32), logits[0].new_zeros(shape, dtype=torch.float32)
    for layer in logits:
        likelihoods = torch.softmax(layer.float(), dim=-1)
        choices = F.one_hot(likelihoods.topk(top_k, dim=-1).indices, experts).sum(dim=1)
        chosen = chosen.index_add(0, places, choices.float())
        likely = likely.index_add(0, places, likelihoods)
    tokens = torch.zeros(samples + 1, device=device).index_add(0, places, torch.ones_like(places).float())
    rows = (tokens * len(logits)).clamp(min=1)[:, None]
    losses = experts * ((chosen / rows).detach() * (likely / rows)).sum(dim=-1)
    return (losses * tokens)[:-1].sum()


def router_coefficient(
    wanted: RouterLoss, model: PreTrainedModel, saved: float | None, *, resumes: bool
) -> float | None:
    """The factor of the balancing loss in the loss that is trained; None for none.

    wanted: `training.router_loss`.
    saved: the factor in the checkpoint that is resumed, whose run continues as it began.
    Raises UserError where a factor is set for a model without a balancing loss.
    """
    if wanted is None:
        return None
    has_one = _has_balancing_loss(model)
    if wanted != "model":
        if not has_one:
            raise UserError(
                f"training.router_loss is {wanted:g}, but a {model.config.model_type} has no balancing loss in "
                "transformers; set it to null"
            )
        return wanted or None
    if resumes:
        return saved
    coefficient = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    return float(coefficient) if has_one and coefficient else None


def _has_balancing_loss(model: PreTrainedModel) -> bool:
    return "output_router_logits" in inspect.signature(type(model).forward).parameters and any(
        True for _ in _routers(model)
    )


def router_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of a model that choose experts."""
    return [router for router, _ in _routers(model)]


def _routers(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, int]]:
    """The modules that choose experts, in the order of layers, and the place of the logits in their output."""
    recorders = {
        recorder.target_class: recorder.index
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
        and isinstance(recorder := (part._can_record_outputs or {}).get("router_logits"), OutputRecorder)
    }
    for module in model.modules():
        if type(module) in recorders:
            yield module, recorders[type(module)]
