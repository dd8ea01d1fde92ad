"""One optimizer step at a time: a global batch in, one loss, the same for any split of the batch.

The loss is a mean over the trained tokens of the global batch. Their number is all-reduced before the first
backward pass, and every micro-batch's sum is scaled by it, so gradients are exact whatever the number of
ranks and accumulation steps; averaging micro-batch means, as trainers commonly do, weighs a token by how few
neighbours its bin has. DeepSpeed divides gradients by the number of ranks, which the scale undoes; its
division by accumulation steps is switched off.

Nothing here keeps state that a checkpoint would have to carry beyond DeepSpeed's own, the step and the RNG:
the learning rate is a function of the step, set before each one.
"""

import gc
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mmray.base.words import one_line
from mmray.errors import UserError
from mmray.families import leaf_modules
from mmray.loss.labels import PADDING_SEGMENT
from mmray.loss.rules import IGNORE_INDEX
from mmray.training import checkpoint
from mmray.training.adapter import Adapter, load_start
from mmray.training.base_weights import BaseFiles
from mmray.training.deepspeed_config import (
    buffers_kept,
    deepspeed_config,
    effective_zero_stage,
    import_deepspeed,
    with_zero_stage,
)
from mmray.training.head_loss import HeadLoss
from mmray.training.liger import LigerLoss, check_fused_loss
from mmray.training.loss import PLAIN, PackedLoss, packed_loss, trained_positions
from mmray.training.model import DTYPES, build_model
from mmray.training.optim import clip_gradients, decays_from, gradient_norm, learning_rate, optimizer_groups
from mmray.training.optimizers import peak_factor, ready_made
from mmray.training.part_settings import PartSettings
from mmray.training.ranks import Ranks
from mmray.training.router_loss import Routers, router_coefficient
from mmray.training.settings import ModelSettings, TrainingSettings, check_quantised
from mmray.training.token_losses import Measures, Objective
from mmray.training.treatments import (
    freeze,
    stage_at,
    stages_of,
    summary,
    treatments,
    weight_groups,
)
from mmray.training.weights import listed

logger = logging.getLogger(__name__)

NUM_SUMS = 5
"""Sums over the tokens of a step: of balancing losses and the four of `Measures`."""


class MicroBatch(Protocol):
    """The input of one forward and backward pass of one rank."""

    labels: Tensor
    """Labels aligned with input_ids, int64 [1, L]; IGNORE_INDEX where a token is not trained on."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the samples, without padding."""
        ...

    @property
    def token_sets(self) -> Tensor:
        """Number of the set of rows of each token's sample, int64 [L]; -1 outside samples.

        Only an engine that measures the loss of sets asks for it.
        """
        ...

    @property
    def trained_segments(self) -> Tensor:
        """Index of each token's sample, int64 [L]; PADDING_SEGMENT outside samples and in samples left out of the loss.

        Only mixtures of experts ask for it.
        """
        ...

    def model_inputs(self, device: torch.device, dtype: torch.dtype, config: PretrainedConfig) -> dict[str, Tensor]:
        """The model's keyword arguments on `device`, with pixel values as `dtype`; no labels, no use_cache.

        Under ZeRO-3 every micro-batch must run the same modules: one without images carries a dummy image.
        """
        ...


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one optimizer step, equal on every rank."""

    loss: float
    """Mean cross-entropy of the trained tokens of the global batch, in nats; 0 where there are none."""
    trained_tokens: int
    """Number of trained tokens of the global batch."""
    tokens: int
    """Number of tokens of the global batch's samples; padding that keeps ranks in step does not count."""
    grad_norm: float
    """Norm of the gradient of all parameters, before clipping."""
    learning_rate: float
    """Learning rate of this step; the highest where parts have their own. With Muon, that of its AdamW."""
    router_loss: float | None = None
    """Balancing loss of a mixture of experts, before its factor: mean over the tokens of the global batch's samples.

    It is 1 where experts are used evenly; None where no such loss is trained.
    """
    token_accuracy: float = 0.0
    """Share of the trained tokens that the model finds most likely; 0 where there are none."""
    smoothed_loss: float | None = None
    """Mean cross-entropy with smoothed targets, in nats; None without label smoothing."""
    z_loss: float | None = None
    """Mean squared logarithm of the softmax's denominator, before its factor; None without z-loss."""
    set_losses: tuple[float | None, ...] = ()
    """Mean cross-entropy of the trained tokens of each set, in nats; None for a set without one. () where the losses of
    sets are not measured."""
    rates_by_part: Mapping[str, float] = field(default_factory=dict)
    """Learning rate of each part or pattern that has its own."""
    stage: int | None = None
    """Number of the stage of the step, from 1; None in a training without stages."""


class TokenSums(NamedTuple):
    """Sums over trained tokens of an evaluation, of all batches of all ranks."""

    loss: float
    """Sum of the cross-entropies, in nats."""
    trained_tokens: int
    correct: int
    """Number of those that the model finds most likely."""

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy; NaN where no token is trained on."""
        return self.loss / self.trained_tokens if self.trained_tokens else math.nan

    @property
    def accuracy(self) -> float:
        """Share of the trained tokens that the model finds most likely; NaN where no token is trained on."""
        return self.correct / self.trained_tokens if self.trained_tokens else math.nan


class TrainingEngine:
    """A model, its optimizer and its place in training, over all ranks of the default process group.

    Every method is collective: all ranks call it, with the same number of micro-batches.
    """

    def __init__(
        self,
        model_settings: ModelSettings,
        training_settings: TrainingSettings,
        *,
        total_steps: int,
        grad_accumulation: int,
        resume_from: Path | None = None,
        scratch: Path | None = None,
        node: str = "",
        ranks: Ranks | None = None,
        num_sets: int = 0,
    ) -> None:
        """Builds the model and DeepSpeed around it; torch.distributed must be initialised.

        total_steps: optimizer steps of the whole training, for the learning rate.
        grad_accumulation: micro-batches per rank and step.
        resume_from: a folder that `save_state` of all ranks wrote into, complete on every rank; the number of ranks may
        have changed.
        scratch: a folder that belongs to this run. Resuming with another number of ranks writes about the size of the
        checkpoint there.
        node: ranks with the same value see the same files in scratch; "": all ranks do.
        ranks: made here where None.
        num_sets: number of sets of rows whose losses are measured apart; 0: none are.

        Raises UserError when settings, checkpoint and number of ranks do not fit together.
        """
        if not dist.is_initialized():
            raise RuntimeError("TrainingEngine needs an initialised torch.distributed process group")
        deepspeed = import_deepspeed()
        saved_stage = None if resume_from is None else checkpoint.read_state(resume_from).zero_stage
        training_settings = with_zero_stage(training_settings, grad_accumulation, saved_stage)
        check_quantised(model_settings, training_settings)
        self.model_settings = model_settings
        self.training_settings = training_settings
        self.total_steps = total_steps
        self.grad_accumulation = grad_accumulation
        self.num_sets = num_sets
        self.objective = Objective(training_settings.label_smoothing, training_settings.z_loss)
        self.ranks = ranks or Ranks()
        self.rank, self.world_size = self.ranks.rank, self.ranks.size
        self.zero_stage = effective_zero_stage(model_settings, training_settings)
        self.dtype = DTYPES[model_settings.dtype]
        self.stages = stages_of(training_settings, total_steps)
        if self.zero_stage != training_settings.zero_stage and self.rank == 0:
            logger.info("zero_stage 0 with bf16 runs as stage 1, where gradients accumulate in fp32")

        _agree_on_device()
        deepspeed.init_distributed()
        check_fused_loss(training_settings, _drawing_device())
        self.adapter = self._adapter()
        self._open(deepspeed, resume_from, scratch, node)

    def _open(self, deepspeed: Any, resume_from: Path | None, scratch: Path | None, node: str) -> None:
        """Builds the model and DeepSpeed around it for the stage that comes next, from a checkpoint where one is
        given."""
        state = None if resume_from is None else checkpoint.read_state(resume_from)
        self.step_count = 0 if state is None else state.step
        self.stage = stage_at(self.stages, self.step_count)
        model = self._build(deepspeed, begins=resume_from is None)
        self.groups = weight_groups(model, self.training_settings, self.stages, self.stage)
        source = None
        if resume_from is not None and state is not None:
            source = checkpoint.resume_source(resume_from, state, self, model)
        freeze(model, self.groups)
        with checkpoint.prepared(source, self, scratch, node) as source:
            self.deepspeed = self._initialize(deepspeed, model, load_universal=source is not None and source.universal)
            saved = None if source is None else source.state.router_loss
            self.router_loss = router_coefficient(
                self.training_settings.router_loss, self.model, saved, resumes=source is not None
            )
            self.routers = None if self.router_loss is None else Routers(self.model)
            self.device: torch.device = self.deepspeed.device
            self.deepspeed.train()
            checkpoint.seed_rng(self.training_settings.seed, self.rank)
            if source is not None:
                checkpoint.load_state(self, source)

    @property
    def model(self) -> PreTrainedModel:
        """The model itself (under ZeRO-3 with sharded weights)."""
        return self.deepspeed.module

    def step(self, micro_batches: Sequence[MicroBatch]) -> StepMetrics:
        """Does one optimizer step on this rank's part of a global batch: `grad_accumulation` micro-batches.

        A global batch without a trained token leaves weights and optimizer as they are, with a warning.

        Raises UserError when the loss or the gradient is not finite; before the weights change, except for a gradient
        under ZeRO.
        """
        if len(micro_batches) != self.grad_accumulation:
            raise ValueError(f"a step takes {self.grad_accumulation} micro-batches, got {len(micro_batches)}")
        rate, rates_by_part = self._set_rates(), self.rates_by_part
        trained, tokens, balanced = self._global_counts(micro_batches)
        if not trained:
            return self._nothing_trained(tokens, rate, rates_by_part)
        scales = self.world_size / max(1, trained), self.world_size / max(1, balanced)
        sums = torch.zeros(NUM_SUMS + 2 * self.num_sets, dtype=torch.float64, device=self.device)
        for micro_batch in micro_batches[:-1]:
            sums += self._forward_backward(micro_batch, *scales)
            self.deepspeed.step()
        sums += self._forward_backward(micro_batches[-1], *scales)
        dist.all_reduce(sums)
        balancing, *of_tokens = sums.tolist()  # the first of the step's two waits for the device
        loss, smoothed, squared, accuracy = (total / trained for total in of_tokens[: NUM_SUMS - 1])
        trains = loss if not self.objective.label_smoothing else smoothed
        self._require_finite(trains + self.objective.z_loss * squared, "loss")  # no weight has changed yet
        grad_norm = self._apply_gradients()
        self.step_count += 1
        return StepMetrics(
            loss,
            trained,
            tokens,
            grad_norm,
            rate,
            router_loss=balancing / max(1, balanced) if self.routers else None,
            token_accuracy=accuracy,
            smoothed_loss=smoothed if self.objective.label_smoothing else None,
            z_loss=squared if self.objective.z_loss else None,
            set_losses=self._set_losses(of_tokens[NUM_SUMS - 1 :]),
            rates_by_part=rates_by_part,
            stage=self._stage_number,
        )

    def _set_rates(self) -> float:
        """Gives each group of the optimizer the learning rate of the next step; returns the highest of AdamW's."""
        rates = [self._rate(group.learning_rate) for group in self.groups]
        factor = peak_factor(self.training_settings) if self.training_settings.optimizer == "muon" else 1.0
        for group, weights, rate in zip(self.deepspeed.optimizer.param_groups, self.groups, rates, strict=True):
            group["lr"] = rate * factor if weights.by_muon else rate
        return max(rates)

    def _set_losses(self, sums: list[float]) -> tuple[float | None, ...]:
        """The mean loss of each set. sums: of the losses of each set, and then the numbers of their trained tokens."""
        pairs = zip(sums[: self.num_sets], sums[self.num_sets :], strict=True)
        return tuple(loss_sum / count if count else None for loss_sum, count in pairs)

    def _nothing_trained(self, tokens: int, rate: float, rates_by_part: dict[str, float]) -> StepMetrics:
        """Counts a step without an update: with gradients of zero, AdamW would still move every weight, by its running
        means and its decay."""
        self.step_count += 1
        if self.rank == 0:
            logger.warning("step %d has no trained token: the weights stay as they are", self.step_count)
        return StepMetrics(
            0.0, 0, tokens, 0.0, rate,
            set_losses=(None,) * self.num_sets, rates_by_part=rates_by_part, stage=self._stage_number,
        )  # fmt: skip

    def evaluate(self, batches: Iterable[Sequence[MicroBatch]]) -> TokenSums:
        """The sums over the trained tokens of all batches of all ranks.

        Every rank must pass the same number of micro-batches: under ZeRO-3 each forward is collective.
        """
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.deepspeed.eval()
        try:
            with torch.no_grad():
                for batch in batches:
                    for micro_batch in batch:
                        totals[1] += _count(micro_batch.labels[:, 1:], IGNORE_INDEX)
                        packed = self._loss(micro_batch)
                        totals[0] += packed.loss
                        totals[2] += packed.measures.correct
        finally:
            self.deepspeed.train()
        dist.all_reduce(totals)
        loss_sum, trained, correct = totals.tolist()
        return TokenSums(loss_sum, int(trained), int(correct))

    def evaluate_sets(self, batches: Iterable[Sequence[MicroBatch]], num_sets: int) -> list[TokenSums]:
        """The sums over each set's trained tokens of all batches of all ranks.

        num_sets: number of sets of rows, which `MicroBatch.token_sets` numbers from 0. Every rank must pass the same
        number of micro-batches, as for `evaluate`.
        """
        totals = torch.zeros((3, num_sets), dtype=torch.float64, device=self.device)
        self.deepspeed.eval()
        try:
            with torch.no_grad():
                for batch in batches:
                    for micro_batch in batch:
                        measures = self._loss(micro_batch, num_sets=num_sets).measures
                        sums = measures.set_sums, measures.set_counts, measures.set_correct
                        totals += torch.stack([of_sets.double() for of_sets in sums])
        finally:
            self.deepspeed.train()
        dist.all_reduce(totals)
        return [TokenSums(loss_sum, int(count), int(correct)) for loss_sum, count, correct in totals.T.tolist()]

    def close(self) -> None:
        """Releases DeepSpeed's hooks and buffers, so that another engine can be built in this process."""
        self.deepspeed.destroy()

    def _adapter(self) -> Adapter | None:
        settings, model = self.training_settings.adapter, self.model_settings
        if settings is None:
            return None
        base = BaseFiles.of(model.path, self.ranks) if model.path is not None and model.is_all_in_files else None
        return Adapter.of(model, settings, base, _drawing_device())

    def enter_stage(self, saved: Path, scratch: Path | None = None, node: str = "") -> None:
        """Goes on in the stage that begins at the present step, from a checkpoint of this step. Collective.

        The optimizer keeps the state of weights that it has trained and trains on; it begins anew for others. The other
        arguments are those of the constructor. The model is built again, so nothing of the engine's may be held.
        """
        self.close()
        del self.deepspeed, self.routers
        gc.collect()  # DeepSpeed's engine holds itself in circles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._open(import_deepspeed(), saved, scratch, node)

    @property
    def is_at_border(self) -> bool:
        """True if the next step belongs to another stage than the engine is in."""
        return stage_at(self.stages, self.step_count) is not self.stage

    @property
    def decays_from(self) -> int | None:
        """With the wsd schedule: number of steps that are done before the decay of the present stage begins."""
        return decays_from(self.stage, self.training_settings)

    @property
    def rates_by_part(self) -> dict[str, float]:
        """Learning rate of the next step of each part or pattern with a peak rate of its own."""
        rates = {key: value.learning_rate for key, value in self.stage.parts.items() if isinstance(value, PartSettings)}
        return {key: self._rate(peak) for key, peak in rates.items() if peak is not None}

    @property
    def _stage_number(self) -> int | None:
        return self.stage.number + 1 if len(self.stages) > 1 else None

    @property
    def treated_parts(self) -> dict[str, str]:
        """Each part of the model, by name, as `frozen`, `trained` or `partly frozen` in the present stage."""
        return summary(treatments(self.model, self.stage, self.training_settings), self.model)

    def _rate(self, peak: float) -> float:
        """The learning rate of the next step of weights with this peak rate."""
        return learning_rate(self.step_count, self.stage, self.training_settings, peak)

    def _config(self, *, load_universal: bool) -> dict[str, Any]:
        return deepspeed_config(
            self.model_settings,
            self.training_settings,
            world_size=self.world_size,
            grad_accumulation=self.grad_accumulation,
            load_universal=load_universal,
        )

    def _build(self, deepspeed: Any, *, begins: bool) -> PreTrainedModel:
        """The model, with the adapter. begins: whether the run does, and with it the adapter from `start_from`."""
        zero3_config = self._config(load_universal=False) if self.zero_stage == 3 else None
        model = build_model(self.model_settings, device=_drawing_device(), zero3_config=zero3_config)
        if self.adapter is not None:
            self.adapter.put_into(model, self.model_settings.seed, zero3_config)
            if self.adapter.settings.start_from is not None and begins:
                load_start(model, self.adapter)
        if self.zero_stage == 3 and (leaves := leaf_modules(model.config.model_type)):
            deepspeed.utils.set_z3_leaf_modules(model, sorted(leaves))
        return model

    def _initialize(self, deepspeed: Any, model: PreTrainedModel, *, load_universal: bool) -> Any:
        groups = optimizer_groups(model, self.groups)
        optimizer = ready_made(self.training_settings, groups)
        with buffers_kept(model), _as_user_error():
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                model_parameters=None if optimizer else groups,
                config=self._config(load_universal=load_universal),
            )
        return engine

    def _global_counts(self, micro_batches: Sequence[MicroBatch]) -> tuple[int, int, int]:
        """Number of trained tokens, of tokens, and of tokens that the balancing loss is averaged over (0 without such a
        loss), of the global batch."""
        trained = sum(_count(batch.labels[:, 1:], IGNORE_INDEX) for batch in micro_batches)
        tokens = sum(batch.num_tokens for batch in micro_batches)
        balanced = 0
        if self.routers is not None:
            balanced = sum(_count(batch.trained_segments, PADDING_SEGMENT) for batch in micro_batches)
        trained, tokens, balanced = self.ranks.sums([trained, tokens, balanced])
        return trained, tokens, balanced

    def _loss(
        self, micro_batch: MicroBatch, *, objective: Objective = PLAIN, num_sets: int = 0,
        scale: float = 1.0, kind: type[HeadLoss] = HeadLoss,
    ) -> PackedLoss:  # fmt: skip
        """The loss of a micro-batch, whose sets are measured apart where `num_sets` says how many there are."""
        positions = self._copied(trained_positions(micro_batch.labels))
        sets = self._copied(micro_batch.token_sets.clamp(min=0)) if num_sets else None
        inputs = micro_batch.model_inputs(self.device, self.dtype, self.model.config)
        labels = micro_batch.labels.to(self.device)  # where inputs were made ahead, they are there already
        return packed_loss(
            self.deepspeed, inputs, labels, positions=positions, objective=objective, sets=sets, num_sets=num_sets,
            scale=scale, kind=kind,
        )  # fmt: skip

    def _copied(self, values: Tensor) -> Tensor:
        """A tensor of the host on the device; the host does not wait for the copy."""
        return values if self.device.type == "cpu" else values.pin_memory().to(self.device, non_blocking=True)

    def _forward_backward(self, micro_batch: MicroBatch, scale: float, router_scale: float) -> Tensor:
        """The micro-batch's sums (`_sums`); its gradients are accumulated."""
        options: dict[str, Any] = {"objective": self.objective, "num_sets": self.num_sets, "scale": scale}
        options["kind"] = LigerLoss if self.training_settings.fused_loss else HeadLoss
        if self.routers is None:
            packed = self._loss(micro_batch, **options)
            self.deepspeed.backward(packed.loss * scale, scale_wrt_gas=False)
            return _sums(torch.zeros_like(packed.loss), packed.measures)
        with self.routers.recording():
            packed = self._loss(micro_batch, **options)
        balancing = self.routers.balancing_sum(micro_batch.trained_segments)
        assert self.router_loss is not None
        whole = packed.loss * scale + balancing * (router_scale * self.router_loss)
        self.deepspeed.backward(whole, scale_wrt_gas=False)
        return _sums(balancing, packed.measures)

    def _apply_gradients(self) -> float:
        """Clips and updates; returns the norm before clipping. At stage 0 DeepSpeed would clip by a norm in fp32."""
        if self.zero_stage == 0:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            grad_norm = gradient_norm(gradients)
            self._require_finite(grad_norm, "gradient norm")
            clip_gradients(gradients, grad_norm, self.training_settings.max_grad_norm)
            self.deepspeed.step()
            return grad_norm
        self.deepspeed.step()
        grad_norm = float(self.deepspeed.get_global_grad_norm())
        # DeepSpeed reports a norm that is not finite as -1.
        self._require_finite(grad_norm if grad_norm >= 0 else float("nan"), "gradient norm")
        return grad_norm

    def _require_finite(self, value: float, name: str) -> None:
        """Raises UserError for a value that is not finite. All ranks hold the same value, so all raise or none."""
        if math.isfinite(value):
            return
        remedy = "lower training.learning_rate or max_grad_norm, or look at the bins of this step, and resume from the "
        remedy += "last checkpoint"
        if name == "loss" and (broken := self._broken_weights()):
            remedy = f"{len(broken)} weights of the model have numbers that are not finite: {listed(broken)}; "
            remedy += "begin from other files or an earlier checkpoint"
        raise UserError(f"the {name} of step {self.step_count + 1} is {value}; {remedy}")

    def _broken_weights(self) -> list[str]:
        """Names of the weights of which this rank holds a number that is not finite; under ZeRO-3, in its shard."""
        shards = ((name, getattr(weight, "ds_tensor", weight)) for name, weight in self.model.named_parameters())
        return [name for name, shard in shards if not torch.isfinite(shard.data).all()]


def _count(values: Tensor, left_out: int) -> int:
    """Number of values of a tensor of the host that are not `left_out`; no device is waited for."""
    return int(np.count_nonzero(values.numpy() != left_out))


def _sums(balancing: Tensor, measures: Measures) -> Tensor:
    """Joins the sums that the metrics of a step are made of, which ranks reduce at once: NUM_SUMS values, then the loss
    of each set, then the number of its trained tokens."""
    whole = torch.stack([
        balancing.detach(), measures.cross_entropy, measures.smoothed, measures.squared_normaliser, measures.correct
    ])  # fmt: skip
    return torch.cat([whole.double(), measures.set_sums.double(), measures.set_counts.double()])


@contextmanager
def _as_user_error() -> Iterator[None]:
    """Raises what DeepSpeed refuses of its configuration as a UserError."""
    try:
        yield
    except (ValueError, AssertionError) as error:  # also of its pydantic models
        raise UserError(f"DeepSpeed cannot be set up for this model and training: {one_line(error)}") from error


def _drawing_device() -> torch.device:
    """The device of this rank, on which random weights are drawn."""
    return torch.device(import_deepspeed().get_accelerator().current_device_name())


def _agree_on_device() -> None:
    """Sets LOCAL_RANK, from which DeepSpeed takes its device, to the device that the caller has set."""
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    else:
        os.environ.setdefault("LOCAL_RANK", "0")
