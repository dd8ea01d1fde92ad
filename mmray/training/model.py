"""Builds the model that is trained: real transformers classes, from files or with random weights.

Random weights are a pure function of the seed: the same on every rank, for every ZeRO stage and number of workers.
transformers draws them while it builds the modules, and under ZeRO-3 afterwards, module by module; both ways give the
same numbers only when the first draws nothing while building, which is how it is done here.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations import deepspeed as transformers_deepspeed

from mmray.base.words import one_line
from mmray.errors import UserError
from mmray.families import load_family
from mmray.families.model_source import source_problem
from mmray.families.processors import warn_of_remote_code
from mmray.training import quantized
from mmray.training.attention_paths import attention_name, plain_implementation, text_implementation, use_packed
from mmray.training.inline_config import inline_config
from mmray.training.settings import ModelSettings
from mmray.training.weights import UnknownWeights, check_fit, check_patterns, fit, stored_weights

log = logging.getLogger("mmray")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(
    settings: ModelSettings, *, device: torch.device | None = None, zero3_config: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The model in training mode, cache off, attention and gradient checkpointing as set; leaves the RNG of the caller
    alone.

    device: where random weights are drawn, and others quantised (the CPU where None); another device draws other
    numbers. zero3_config: the
    DeepSpeed configuration of a ZeRO-3 run. Weights are then sharded while they are drawn or loaded, so no rank ever
    holds the whole model; every rank must make this call.

    Raises UserError when the files or the model class cannot be found, or the files do not hold the model's weights.
    """
    device = device or torch.device("cpu")
    try:
        if settings.path is not None:
            _warn_of_weights(settings)
        with seeded(settings.seed, device), _zero3(zero3_config, settings):
            if settings.path is not None:
                model = _load(settings.path, settings, device)
            else:
                model = _random(settings, device, sharded=zero3_config is not None)
            if settings.resize_embeddings:
                resize_embeddings(model, settings)
    except (OSError, ImportError, ValueError) as error:
        source = settings.path if settings.path is not None else "model.config"
        reason = " ".join(str(error).split())
        raise UserError(f"cannot build the model from {source}: {reason}") from error
    _switch_off_cache(model.config)
    if settings.computes_samples_apart:
        use_packed(model)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    return model.train()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Switches gradient checkpointing on: a layer's activations are computed again in the backward pass.

    transformers then has the embeddings of tokens and of patches ask for gradients, which only its other way of
    checkpointing needs. A frozen tower would be recomputed, and its gradients computed, for nothing.
    """
    with warnings.catch_warnings():
        # Deprecated in the last versions of transformers 5, but the name that all of them know.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()


def transformers_model(module: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside what wraps it: DeepSpeed's engine, peft's adapters, both or neither.

    Its modules are those that run, so adapters that were put into it are still there.
    """
    inner: Any = module
    while not isinstance(inner, PreTrainedModel):
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner.module
    return inner


def load_plain(settings: ModelSettings) -> PreTrainedModel:
    """The model of `path` on the CPU as its files and its configuration have it: not quantised, without the switches
    that training sets. Raises UserError like `build_model`."""
    assert settings.path is not None
    try:
        return _load(settings.path, settings.model_copy(update={"quantize": None}), torch.device("cpu"))
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"cannot build the model from {settings.path}: {one_line(error)}") from error


def empty_model(settings: ModelSettings) -> PreTrainedModel:
    """The model without weights, on the meta device, in the dtype of the settings.

    It is as its configuration has it, without the switches that training sets. Raises UserError like `build_model`.
    """
    try:
        with torch.device("meta"):
            return _from_config(settings)
    except (OSError, ImportError) as error:
        raise UserError(f"cannot build the model from {settings.path or 'model.config'}: {error}") from error


def check_weights(settings: ModelSettings, *, download: bool = False) -> str:
    """Compares the weights in the files of `model.path` with the model, without loading them.

    download: as for `stored_weights`.

    Returns a text on weights that are drawn at random or left out because `model.allow_missing` says so, "" for none.

    Raises UserError naming the weights that do not fit; UnknownWeights where they cannot be known from here.
    """
    assert settings.path is not None
    config = load_config(settings)
    if getattr(config, "quantization_config", None):
        raise UnknownWeights(f"{settings.path} is quantised: transformers judges its weights while it loads them")
    stored = stored_weights(settings.path, download=download)
    try:
        names = {*stored, *empty_model(settings).state_dict()}
    except UserError:
        raise
    except Exception as error:  # values that do not go together fail in a model in many ways
        raise UserError(
            f"no model can be made by the configuration of {settings.path}: {one_line(error)}; give the config.json "
            "that belongs to its weights"
        ) from error
    weights_fit = fit(partial(empty_model, settings), stored)
    check_patterns(settings.allow_missing, {*names, *weights_fit.unexpected})
    return check_fit(settings.path, weights_fit, settings.allow_missing)


def _warn_of_weights(settings: ModelSettings) -> None:
    """Runs `check_weights` before loading, and warns of weights that are drawn at random or left out."""
    try:
        if exempt := check_weights(settings, download=True):
            log.warning("model.allow_missing: of the weights of %s, %s", settings.path, exempt)
    except UnknownWeights as reason:
        log.warning("%s", reason)


def load_config(settings: ModelSettings) -> PretrainedConfig:
    """The model's configuration, from its path or as given, with the attention implementation of its text layers.

    Raises UserError where it cannot be read.
    """
    config = _read_config(settings)
    config._attn_implementation = text_implementation(config) if settings.computes_samples_apart else settings.attention
    return config


def text_attention(settings: ModelSettings) -> str:
    """The attention that the text layers of a model run, as `model.attention` names it.

    Raises UserError where the model's configuration cannot be read.
    """
    if not settings.computes_samples_apart:
        return str(settings.attention)
    return attention_name(load_config(settings)._attn_implementation)


def _read_config(settings: ModelSettings) -> PretrainedConfig:
    if isinstance(settings.config, dict):
        return inline_config(settings.config)
    source = settings.path or settings.config or ""
    if problem := source_problem(source):
        setting = "model.path" if settings.path else "model.config"
        raise UserError(f"{setting}: cannot read a model configuration from {source}: {problem}")
    if settings.trust_remote_code:
        warn_of_remote_code(source)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
    except Exception as error:  # each class checks its values with errors of its own
        raise UserError(f"cannot read a model configuration from {source}: {one_line(error)}") from error


def _load(path: str, settings: ModelSettings, device: torch.device) -> PreTrainedModel:
    config = load_config(settings)
    model_class = _model_class(config)
    options = _build_options(model_class, config, settings)
    if settings.quantize is not None:
        options |= quantized.loading_options(empty_model(settings), options["dtype"], device)
    model: PreTrainedModel = model_class.from_pretrained(path, **options)
    quantized.as_in_training(model)
    return model


def _random(settings: ModelSettings, device: torch.device, *, sharded: bool) -> PreTrainedModel:
    if sharded:
        return _from_config(settings)
    with no_init_weights(), device:
        model = _from_config(settings)
    model.initialize_weights()
    model.tie_weights()
    return model


def _from_config(settings: ModelSettings) -> PreTrainedModel:
    config = load_config(settings)
    model_class = _model_class(config)
    build = model_class.from_config if hasattr(model_class, "from_config") else model_class._from_config
    model: PreTrainedModel = build(config, **_build_options(model_class, config, settings))
    return model


def resize_embeddings(model: PreTrainedModel, settings: ModelSettings) -> None:
    """Gives tokens that were added to the tokenizer their embedding rows.

    transformers sets them to the mean of the others; their number is then the configuration's `vocab_size`. On the meta
    device only shapes change. Raises UserError where transformers cannot resize.
    """
    family = load_family(
        settings.processor_source, model_type=model.config.model_type, trust_remote_code=settings.trust_remote_code
    )
    if family.num_token_ids > family.embedding_rows(model.config):
        model.resize_token_embeddings(family.num_token_ids, mean_resizing=model.device.type != "meta")
        if family.embedding_rows(model.config) != model.get_input_embeddings().num_embeddings:
            raise UserError(
                f"model.resize_embeddings: transformers cannot resize a {model.config.model_type} and save it"
            )


def _build_options(model_class: Any, config: PretrainedConfig, settings: ModelSettings) -> dict[str, Any]:
    attention = plain_implementation(config) if settings.computes_samples_apart else settings.attention
    options: dict[str, Any] = {"dtype": DTYPES[settings.dtype], "attn_implementation": attention}
    if model_class is AutoModelForImageTextToText:
        options["trust_remote_code"] = settings.trust_remote_code
    return options


def _model_class(config: PretrainedConfig) -> Any:
    """The auto class where it knows the configuration, otherwise the class that the configuration names."""
    auto_map = getattr(config, "auto_map", None) or {}
    if type(config) in AutoModelForImageTextToText._model_mapping or "AutoModelForImageTextToText" in auto_map:
        return AutoModelForImageTextToText
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    raise UserError(
        f"transformers has no image-text-to-text model for model_type {config.model_type!r}"
        f" (architectures: {config.architectures})"
    )


def _switch_off_cache(config: PretrainedConfig) -> None:
    """Switches the cache off, also in the text config: with a cache transformers does not detect packed sequences."""
    for part in (config, config.get_text_config()):
        part.use_cache = False


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws random numbers of a device from a seed inside the block, and puts its generator back afterwards."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


@contextmanager
def _zero3(config: dict[str, Any] | None, settings: ModelSettings) -> Iterator[None]:
    """Makes transformers build and load for ZeRO-3."""
    if config is None:
        yield
        return
    empty = empty_model(settings)
    with knows_of_zero3(config), _converted_by_shapes_of(empty):
        yield


@contextmanager
def knows_of_zero3(config: dict[str, Any]) -> Iterator[None]:
    """Lets transformers, and peft, which asks it, know of ZeRO-3 inside the block.

    They find an object of this kind. transformers' own, HfDeepSpeedConfig, wants the accelerate package for nothing but
    reading the stage.
    """
    holder = _Zero3Config(config)  # transformers keeps a weak reference
    transformers_deepspeed.set_hf_deepspeed_config(holder)
    try:
        yield
    finally:
        transformers_deepspeed.unset_hf_deepspeed_config()


@contextmanager
def _converted_by_shapes_of(empty: PreTrainedModel) -> Iterator[None]:
    """Gives weights that are merged, split or transposed while loading for ZeRO-3 the shapes of `empty`.

    transformers 5.23 asks the model itself, whose shards are empty, so that Qwen3-VL-MoE's experts are transposed
    wrongly and fail with a size mismatch.
    """
    convert = transformers_deepspeed._apply_weight_conversions_to_state_dict

    def by_true_shapes(model: PreTrainedModel, state_dict: Any, weight_mapping: Any) -> Any:
        return convert(empty, state_dict, weight_mapping)

    transformers_deepspeed._apply_weight_conversions_to_state_dict = by_true_shapes
    try:
        yield
    finally:
        transformers_deepspeed._apply_weight_conversions_to_state_dict = convert


class _Zero3Config:
    """The DeepSpeed configuration in the form that transformers queries."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True
