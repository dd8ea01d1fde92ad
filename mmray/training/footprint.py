"""The bytes of a training, before it begins: on each rank's device, and in a checkpoint.

Weights, gradients and optimizer follow from the number of parameters, the ZeRO stage, the type and the number of ranks;
on a CPU they were measured to be what is said here (`tests/mmray/training/test_footprint.py`). Activations are an
estimate, from the widths of the model and the tokens of a micro-batch.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from mmray.training.adapter import Adapter
from mmray.training.deepspeed_config import deepspeed_config, effective_zero_stage
from mmray.training.model import empty_model
from mmray.training.settings import ModelSettings, TrainingSettings
from mmray.training.treatments import stages_of, treatments

LOGITS_BYTES = 2**28 * 2
"""fp32 logits of a chunk of the loss, and their gradients."""
STAGES = (1, 2, 3)


@dataclass(frozen=True)
class Bytes:
    """Bytes a parameter: on every rank (`whole`), and shared out among all ranks (`shared`)."""

    whole: float = 0.0
    shared: float = 0.0

    def of(self, parameters: int, ranks: int) -> int:
        """The bytes of one rank."""
        return round(parameters * (self.whole + self.shared / ranks))


WEIGHTS: dict[tuple[str, int], Bytes] = {
    ("fp32", 0): Bytes(4), ("fp32", 1): Bytes(4), ("fp32", 2): Bytes(4), ("fp32", 3): Bytes(0, 4),
    ("bf16", 1): Bytes(2), ("bf16", 2): Bytes(2), ("bf16", 3): Bytes(0, 2),
}  # fmt: skip
GRADIENTS: dict[tuple[str, int], Bytes] = {
    ("fp32", 0): Bytes(4), ("fp32", 1): Bytes(4), ("fp32", 2): Bytes(0, 4), ("fp32", 3): Bytes(0, 4),
    ("bf16", 1): Bytes(6), ("bf16", 2): Bytes(0, 4), ("bf16", 3): Bytes(0, 4),
}  # fmt: skip
MOMENTS = {"adamw": 8.0, "adamw_8bit": 2.0, "muon": 4.0}
"""Bytes a parameter of an optimizer's running means. Muon has both of AdamW's for embeddings, the head and vectors."""
MASTER = 4.0
"""Bytes a parameter of the fp32 weights that ZeRO keeps from stage 1 on."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a training. The first five are those of one rank; those of optimizer and gradients lie in the host's
    memory where they are offloaded."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """An estimate: of the forward pass of one micro-batch, and the logits of a chunk of the loss."""
    host: int
    """Bytes of optimizer and gradients in the host's memory, for each rank; 0 without offloading."""
    checkpoint: int
    """Bytes of a checkpoint, of all ranks."""

    @property
    def certain(self) -> int:
        """Bytes that a rank's device holds in every step, whatever the data."""
        return self.weights + self.gradients + self.optimizer

    @property
    def device(self) -> int:
        """Bytes of a rank's device, with the estimate of activations."""
        return self.certain + self.activations


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model and of its micro-batches, from which the bytes follow."""

    parameters: int
    trained: int
    """Parameters that are trained."""
    config: PretrainedConfig
    tokens: int
    """Most tokens of a micro-batch."""
    visual_tokens: int
    """Most visual tokens of a micro-batch."""

    @classmethod
    def of(cls, model: ModelSettings, training: TrainingSettings, tokens: int, visual_tokens: int) -> "Sizes":
        """The sizes of a model, without its weights. Raises UserError where it, or a part of it, does not exist."""
        empty = empty_model(model)
        if training.adapter is not None:
            Adapter.of(model, training.adapter, None).put_into(empty)
        return cls(*parameters_of(empty, training), empty.config, tokens, visual_tokens)


def parameters_of(model: PreTrainedModel, training: TrainingSettings) -> tuple[int, int]:
    """Number of a model's parameters, and of those that are trained in the stage that trains the most."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    most = 0
    for stage in stages_of(training, sum(stage.steps for stage in training.stages) + 1):
        treated = treatments(model, stage, training)
        most = max(
            most, sum(size for name, size in sizes.items() if name not in frozen and not treated[name].is_frozen)
        )
    return sum(sizes.values()), most


def footprint(sizes: Sizes, model: ModelSettings, training: TrainingSettings, ranks: int) -> Footprint:
    """The bytes of a training on so many ranks. training: with its ZeRO stage (`with_zero_stage`)."""
    key = model.dtype, effective_zero_stage(model, training)
    zero = deepspeed_config(model, training, world_size=1, grad_accumulation=1, load_universal=False)[
        "zero_optimization"
    ]
    weights = WEIGHTS[key].of(sizes.parameters, ranks)
    moments = MOMENTS[training.optimizer]
    states = Bytes(0, MASTER + moments) if key[1] else Bytes(moments)
    gradients, optimizer = (table.of(sizes.trained, ranks) for table in (GRADIENTS[key], states))
    saved = sizes.parameters if key[1] < 3 else sizes.parameters - sizes.trained  # stage 3 saves the masters alone
    checkpoint = WEIGHTS[key[0], 1].of(saved, 1) + states.of(sizes.trained, 1)
    host = 0
    if _offloads(zero, "offload_optimizer"):
        host, gradients, optimizer = gradients + optimizer, 0, 0
    if _offloads(zero, "offload_param"):
        host, weights = host + weights, 0
    return Footprint(weights, gradients, optimizer, activations(sizes, model), host, checkpoint)


def _offloads(zero: dict[str, Any], group: str) -> bool:
    return (zero.get(group) or {}).get("device", "none") != "none"


def activations(sizes: Sizes, model: ModelSettings) -> int:
    """An estimate of what the forward pass of a micro-batch keeps for its backward pass.

    A layer of width h with a feed-forward width of f keeps about 10 h + 4 f numbers a token (Korthikanti et al., 2022,
    34 h bytes in 16 bits for f = 4 h, without the attention's own); with gradient checkpointing its input, h, and one
    layer's rest.
    """
    size = 2 if model.dtype == "bf16" else 4
    text = sizes.config.get_text_config().to_dict()
    kept = _kept(text, model.gradient_checkpointing) * sizes.tokens
    vision = (sizes.config.to_dict().get("vision_config")) or {}
    patches = sizes.visual_tokens * int(vision.get("spatial_merge_size", 2)) ** 2
    return round(size * (kept + _kept(vision, model.gradient_checkpointing) * patches)) + LOGITS_BYTES


def _kept(config: dict[str, Any], recomputes: bool) -> float:
    """Numbers that the layers of a part of a model keep a token; 0 where its widths are not known by these names."""
    width = _first(config, "embed_dim", "hidden_size")
    layers = _first(config, "num_hidden_layers", "depth")
    inner = _first(config, "intermediate_size") or 4 * width
    layer = 10 * width + 4 * inner
    return layers * width + layer if recomputes else layers * layer


def _first(config: dict[str, Any], *names: str) -> int:
    return next((value for name in names if isinstance(value := config.get(name), int)), 0)


def alternatives(training: TrainingSettings, ranks: int) -> list[tuple[str, TrainingSettings, int]]:
    """Settings that take less memory, in words, the one that costs least speed first."""
    stage = training.zero_stage or 1
    stages = [(f"training.zero_stage: {more}", {"zero_stage": more}, ranks) for more in STAGES if more > stage]
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    choices: list[tuple[str, dict[str, Any], int]] = list(stages)
    choices += [
        (f"training.zero_stage: 3 and resources.workers: {more}", {"zero_stage": 3}, more)
        for more in (ranks * factor for factor in (2, 4, 8, 16, 32, 64, 128))
    ]
    if not training.deepspeed:
        text = "training.zero_stage: 3 and training.deepspeed: {zero_optimization: {offload_optimizer: {device: cpu}}}"
        choices.insert(len(stages), (text, {"zero_stage": 3, "deepspeed": offload}, ranks))
    return [(text, training.model_copy(update=update), more) for text, update, more in choices]


def remedies(
    sizes: Sizes, model: ModelSettings, training: TrainingSettings, ranks: int, room: int, host_room: int
) -> list[str]:
    """The settings with which a training fits, in words, up to two.

    room: bytes of a rank's device; host_room: bytes of the host's memory for each rank.
    """
    fitting = []
    for text, settings, more in alternatives(training, ranks):
        needs = footprint(sizes, model, settings, more)
        if needs.certain <= room and needs.host <= host_room:
            fitting.append(text)
    halved = model.model_copy(update={"dtype": "bf16"})
    if model.dtype == "fp32" and footprint(sizes, halved, training, ranks).certain <= room:
        fitting.insert(0, "model.dtype: bf16")
    return fitting[:2]
