"""The `model` and `training` parts of the job file, checked once, here.

Inside the engine these values are certain: contradictions (two ways to give the length of training, a
DeepSpeed key that mmray computes itself) are errors when the job file is read, with the name of the setting
to use instead.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mmray.base.settings import Settings
from mmray.errors import UserError
from mmray.training.adapter_settings import AdapterSettings
from mmray.training.part_settings import PartsSetting, TrainingStage

# DeepSpeed keys whose value mmray decides, each with the setting that decides it.
OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "training.global_batch_bins",
    "train_micro_batch_size_per_gpu": "training.micro_batch_bins",
    "gradient_accumulation_steps": "training.global_batch_bins and training.micro_batch_bins",
    "managed_gradient_accumulation": "training.global_batch_bins and training.micro_batch_bins",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.optimizer, learning_rate, weight_decay, betas and eps",
    "scheduler": "training.schedule, warmup_steps and min_learning_rate_ratio",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "elasticity": "the number of workers in resources",
    "tensor_parallel": "the number of workers in resources (mmray trains data-parallel only)",
    "sequence_parallel_size": "the number of workers in resources (mmray trains data-parallel only)",
    "zero_optimization.stage": "training.zero_stage",
    "checkpoint.load_universal": "nothing: it follows from the checkpoint that is resumed",
}


RouterLoss = Literal["model"] | float | None
"""Factor of the balancing loss of a mixture of experts; "model": that of its configuration; None: no such loss."""


def _is_off(value: Any) -> bool:
    """True for a setting that changes nothing: records of runs without it are as they were before there was one."""
    return not value


class ModelSettings(Settings):
    """The trained model, and how its forward pass runs."""

    path: str | None = None
    """Folder or hub name of a pretrained model, whose weights are loaded. Set exactly one of path and config."""

    config: str | dict[str, Any] | None = None
    """Model configuration for random weights: a folder, a config.json, or the configuration itself with its
    `model_type`. Set exactly one of path and config."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and activations. With bf16, master weights, optimizer state and accumulated gradients are
    fp32."""

    attention: Literal["packed", "sdpa", "eager", "flash_attention_2"] | None = None
    """How attention is computed. packed: each sample of a row apart, by torch's own functions, in bf16 on CUDA in one
    call of its kernels for samples of various lengths; parts of a model that need masks run sdpa, which `mmray doctor`
    tells. sdpa, eager, flash_attention_2: the implementations of transformers, the last one with the flash_attn
    package. null: packed for a new run; a resumed run goes on as it began."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory and costs about a third more compute."""

    seed: int = 0
    """Seed of random weights: all of them with config, those absent from the files with path."""

    allow_missing: tuple[str, ...] = ()
    """Patterns of weight names, with `*` for any text, that may differ between the files of `path` and the model.
    Weights that the files lack are drawn at random; weights that the model lacks are ignored. Any other difference is
    an error."""

    resize_embeddings: bool = False
    """Give the model an embedding for each token added to the processor's tokenizer, starting at the mean of the
    existing ones. false: such a token is an error. A model that has an embedding for every token stays as it is."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources you trust."""

    processor: str | None = None
    """Folder or hub name of the processor. Default: `path`."""

    quantize: Literal["nf4"] | None = None
    """Hold the linear layers of the language model in 4 bits (nf4 of bitsandbytes), which an adapter trains beside
    (training.adapter); the weights of `path` are quantised while they are loaded. null: all weights in dtype."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.config is None):
            sources = "both" if self.path is not None else "neither"
            raise ValueError(f"give exactly one of path (trained weights) and config (random weights); {sources} given")
        if isinstance(self.config, dict) and "model_type" not in self.config:
            raise ValueError('an inline config needs its "model_type", for example "qwen2_vl"')
        if self.allow_missing and self.path is None:
            raise ValueError("allow_missing is about the weights of path; with config all are drawn at random")
        if self.quantize and self.path is None:
            raise ValueError("quantize is about the weights of path, which are quantised while they are loaded")
        return self

    @property
    def is_all_in_files(self) -> bool:
        """True if no weight is drawn at random."""
        return self.path is not None and not self.allow_missing and not self.resize_embeddings

    @property
    def computes_samples_apart(self) -> bool:
        """True with packed attention, which null stands for where no earlier run decides."""
        return self.attention in (None, "packed")

    @property
    def processor_source(self) -> str:
        """Folder or hub name of the processor. Raises UserError when neither processor nor path is set."""
        source = self.processor or self.path
        if source is None:
            raise UserError("model.config gives no processor; set model.processor to its folder or hub name")
        return source


class ProfileSettings(Settings):
    """The steps that are traced."""

    steps: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    """First and last step that rank 0 traces, counted from 1. The file is `profile/steps-FIRST-LAST.json.gz` in the
    run's folder, which Perfetto opens; a few steps are enough."""

    @field_validator("steps")
    @classmethod
    def _in_order(cls, steps: tuple[int, int]) -> tuple[int, int]:
        if steps[0] > steps[1]:
            raise ValueError(f"the first step to trace, {steps[0]}, comes after the last, {steps[1]}")
        return steps

    def check_within(self, total_steps: int) -> None:
        """Raises ValueError where a run of `total_steps` steps does not have all steps that are to be traced."""
        if self.steps[1] > total_steps:
            raise ValueError(
                f"profile.steps {list(self.steps)} go beyond the {total_steps} steps of training; trace earlier ones"
            )


class TrainingSettings(Settings):
    """Length, batch, optimizer, ZeRO stage, and how often to evaluate and to save."""

    steps: int | None = Field(default=None, ge=1)
    """Total optimizer steps; a resumed run counts the earlier ones. Set exactly one of steps and epochs."""

    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training data, possibly a fraction of one. Set exactly one of steps and epochs."""

    global_batch_bins: int = Field(default=8, ge=1)
    """Bins of one optimizer step, over all workers and accumulation steps."""

    micro_batch_bins: int = Field(default=1, ge=1)
    """Bins of one forward and backward pass on one worker."""

    parts: PartsSetting = Field(default_factory=dict)
    """Treatment of parts of the model: `frozen`, or a learning rate and weight decay of their own. Keys are vision,
    projector, language, embeddings and audio, or patterns of names of weights, with `*` for any text; a pattern comes
    before a part. What no key names is trained with the settings beside this one."""

    stages: tuple[TrainingStage, ...] = ()
    """Stages at the beginning of training in which other parts are trained, one after another. The steps after the last
    stage train `parts`. In each stage the learning rate goes through the whole schedule, with its warm-up. Empty: one
    stage."""

    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    """Optimizer. adamw_8bit: AdamW of bitsandbytes, whose states take a quarter of the memory. muon: DeepSpeed's Muon
    for the matrices of layers, and AdamW for embeddings, the head, biases and norm scales."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate, reached after the warm-up."""

    muon_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the matrices that Muon trains, whose updates all have the same size: 0.02 is usual when
    training from scratch, far less for trained weights. A part with a learning rate of its own has its matrices' rate
    changed by the same factor. Required with optimizer: muon, and an error with another."""

    muon_momentum: float | None = Field(default=None, ge=0, lt=1)
    """Decay rate of Muon's running mean of the gradient. null: 0.95. An error with another optimizer."""

    schedule: Literal["cosine", "constant", "linear", "wsd"] = "cosine"
    """How the learning rate falls from its peak to the end of training. wsd: warm-up, stable, decay: it stays at its
    peak and falls linearly over the last `decay_steps`."""

    decay_steps: int | None = Field(default=None, ge=1)
    """Steps over which the wsd schedule falls at the end. Required with it, and an error with another schedule."""

    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps over which the learning rate rises linearly from zero. Set at most one of warmup_steps and warmup_ratio;
    with neither there is no warm-up."""

    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Length of the warm-up as a fraction of all steps, rounded up to a whole step. Set at most one of warmup_steps and
    warmup_ratio."""

    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    """Final learning rate of the cosine, linear and wsd schedules, as a fraction of learning_rate."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of AdamW, on matrices only: biases and norm scales are never decayed."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's running means of the gradient and of its square, each in [0, 1)."""

    eps: float = Field(default=1e-8, gt=0)
    """Term that AdamW adds to the denominator to avoid division by zero."""

    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm; larger gradients are scaled down to it. null: no clipping."""

    adapter: AdapterSettings | None = None
    """Train an adapter (LoRA, DoRA) beside frozen weights. null: the model's weights are trained."""

    deepspeed: dict[str, Any] | str | None = None
    """DeepSpeed configuration merged over mmray's own: inline, or the path of a JSON file. Values "auto" are ignored;
    keys that mmray decides are errors."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1, exclude_if=_is_off)
    """Share of each target that is spread evenly over the whole vocabulary. `loss` in the metrics stays the plain
    cross-entropy, in training and evaluation; `smoothed_loss` is the one that is trained."""

    z_loss: float = Field(default=0.0, ge=0, allow_inf_nan=False, exclude_if=_is_off)
    """Factor of the z-loss, the squared logarithm of the softmax's denominator, which is added to the loss of each
    trained token and keeps logits from growing; 1e-4 is common. `loss` in the metrics does not contain it; `z_loss` is
    its mean before the factor."""

    router_loss: RouterLoss = "model"
    """Factor of the balancing loss of a mixture of experts, which keeps its routers from sending all tokens to a few
    experts: a number, "model" for `router_aux_loss_coef` of its configuration, or null for none. A resumed run with
    "model" keeps the factor it began with."""

    fused_loss: Literal["liger"] | None = Field(default=None, exclude_if=_is_off)
    """Kernel that computes the loss on GPUs: liger, of the package liger-kernel (`pip install 'mmray[liger]'`). null:
    mmray's own way, in chunks, which gives the same loss."""

    profile: ProfileSettings | None = Field(default=None, exclude_if=_is_off)
    """Steps of which a trace is written, to see what they spend their time on. null: none."""

    zero_stage: Literal[0, 1, 2, 3] | None = None
    """State that ZeRO partitions across the workers. 0: nothing; 1: optimizer state; 2: also gradients; 3: also
    weights. With bf16, 0 runs as 1, because DeepSpeed accumulates in fp32 only from stage 1 on. null: 1 where each
    worker has four or more micro-batches in a step, because stage 2 exchanges gradients after each of them, otherwise
    2; a resumed run keeps the stage of its checkpoint."""

    seed: int = 0
    """Seed of everything random in training: data order and, per worker, dropout."""

    eval_every_steps: int | None = Field(default=None, ge=1)
    """Steps between evaluations. null: never evaluate."""

    checkpoint_every_steps: int | None = Field(default=500, ge=1)
    """Steps between checkpoints. null: save only at the end."""

    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the latest checkpoints are kept."""

    max_failures: int = Field(default=3, ge=0)
    """How many times training restarts from the last checkpoint after a worker is lost."""

    max_preemptions: int | None = Field(default=None, ge=0)
    """How many times training restarts after a node is preempted with notice. Such restarts do not count as failures.
    null: no limit."""

    stop_seconds: float = Field(default=120.0, ge=0)
    """How long, in seconds, a run that is asked to stop (Ctrl-C, SIGTERM, `ray job stop`) may take to finish and save
    its current step. After that it ends without saving."""

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        return betas

    @field_validator("router_loss")
    @classmethod
    def _router_loss_in_range(cls, value: RouterLoss) -> RouterLoss:
        if isinstance(value, float) and not 0 <= value < math.inf:
            raise ValueError(f'router_loss is a number from 0 on, "model" or null, got {value}')
        return value

    @field_validator("deepspeed")
    @classmethod
    def _no_owned_keys(cls, value: dict[str, Any] | str | None) -> dict[str, Any] | str | None:
        if isinstance(value, dict):
            check_deepspeed_overrides(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            lengths = "both" if self.steps is not None else "neither"
            raise ValueError(f"give exactly one of steps and epochs; {lengths} given")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give at most one of warmup_steps and warmup_ratio; both given")
        if self.warmup_steps is not None and self.steps is not None and self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) is longer than training (steps: {self.steps})")
        if self.schedule == "constant" and self.min_learning_rate_ratio > 0:
            raise ValueError("min_learning_rate_ratio has no meaning with schedule: constant; remove one of them")
        for name in ("label_smoothing", "z_loss"):
            if self.fused_loss and (value := getattr(self, name)):
                raise ValueError(f"fused_loss: {self.fused_loss} leaves out {name} ({value:g}); remove one of them")
        self._check_adapter()
        self._check_decay()
        if self.profile and self.steps is not None:
            self.profile.check_within(self.steps)
        self._check_stages()
        self._check_muon()
        if self.global_batch_bins % self.micro_batch_bins:
            raise ValueError(
                f"global_batch_bins ({self.global_batch_bins}) must be a multiple of "
                f"micro_batch_bins ({self.micro_batch_bins})"
            )
        return self

    def _check_adapter(self) -> None:
        if self.adapter is None:
            return
        if self.stages:
            raise ValueError(
                "stages and adapter do not go together: an adapter is trained whole from its first step on; train "
                "each stage in a run of its own, with the export of the one before as model.path"
            )
        if self.optimizer == "muon":
            raise ValueError("optimizer: muon is made for whole matrices; the thin ones of an adapter take adamw")

    def _check_decay(self) -> None:
        if self.schedule != "wsd":
            if self.decay_steps is not None:
                raise ValueError(f"decay_steps belongs to schedule: wsd, and the schedule is {self.schedule}")
            return
        if self.decay_steps is None:
            raise ValueError("schedule: wsd needs decay_steps, the steps over which the rate falls at the end")
        if self.warmup_ratio is not None:
            raise ValueError(
                "schedule: wsd takes warmup_steps, not warmup_ratio: with a ratio, a longer run would not continue a "
                "shorter one"
            )

    def _check_stages(self) -> None:
        """Checks the length of each stage, where the number of all steps is known."""
        least = (self.warmup_steps or 0) + (self.decay_steps or 0)
        lengths = [stage.steps for stage in self.stages]
        if self.steps is not None:
            left = self.steps - sum(lengths)
            if lengths and left < 1:
                raise ValueError(
                    f"stages take {sum(lengths)} steps, and training has {self.steps}: none is left for what "
                    "training.parts says; make steps larger, or leave the last stage out"
                )
            lengths.append(left)
        for number, length in enumerate(lengths, start=1):
            if length < least:
                place = f"stage {number} of training" if self.stages else "training"
                raise ValueError(
                    f"{place} has {length} steps, fewer than warmup_steps and decay_steps together ({least})"
                )

    def _check_muon(self) -> None:
        if self.optimizer == "muon":
            if self.muon_learning_rate is None:
                raise ValueError("optimizer: muon needs muon_learning_rate; learning_rate is that of its AdamW")
            return
        for name in ("muon_learning_rate", "muon_momentum"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} belongs to optimizer: muon, and the optimizer is {self.optimizer}")


def check_quantised(model: ModelSettings, training: TrainingSettings) -> None:
    """Raises UserError where a quantised model cannot be trained as the settings say."""
    if model.quantize is None:
        return
    if training.adapter is None:
        raise UserError("model.quantize: weights in 4 bits cannot be trained themselves; set training.adapter")
    if not model.is_all_in_files:
        drawn = "resize_embeddings" if model.resize_embeddings else "allow_missing"
        raise UserError(
            f"model.quantize does not go with model.{drawn}: all weights must be in the files of model.path"
        )
    if training.zero_stage == 3:
        raise UserError(
            "model.quantize does not go with training.zero_stage 3, which would cut the codes of a weight apart from "
            "their scales; set zero_stage: 2, where each worker holds the quantised weights whole"
        )


def load_deepspeed_overrides(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """Read and check the user's part of the DeepSpeed configuration.

    value: as in `training.deepspeed`. Returns it without its "auto" values; {} for None. Raises UserError when the file
    cannot be read or a key is one that mmray decides.
    """
    if value is None:
        return {}
    overrides: Any = value
    if isinstance(value, str):
        try:
            overrides = json.loads(Path(value).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"training.deepspeed: cannot read {value} as JSON: {error}") from error
        if not isinstance(overrides, dict):
            raise UserError(f"training.deepspeed: {value} must hold a JSON object, found {type(overrides).__name__}")
    try:
        check_deepspeed_overrides(overrides)
    except ValueError as error:
        raise UserError(f"training.deepspeed: {error}") from error
    return _without_auto(overrides)


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """True if a DeepSpeed configuration, or a user's part of one, keeps the optimizer in the host's memory."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def check_deepspeed_overrides(overrides: dict[str, Any]) -> None:
    """Raise ValueError, naming the setting to use, if mmray decides a key whose value is not "auto"; also where the
    group that mmray completes is not one."""
    stated = _without_auto(overrides)
    zero = stated.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"the DeepSpeed key 'zero_optimization' must be an object, found {zero!r:.40}")
    for key, remedy in OWNED_DEEPSPEED_KEYS.items():
        node: Any = stated
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None and node != {}:
            raise ValueError(f"the DeepSpeed key {key!r} is decided by {remedy}; remove it from the DeepSpeed config")


def _without_auto(node: dict[str, Any]) -> dict[str, Any]:
    """Copy a configuration without its "auto" values, and without groups that hold nothing else."""
    kept: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            inner = _without_auto(value)
            if inner or not value:
                kept[key] = inner
        elif value != "auto":
            kept[key] = value
    return kept
