"""Which attention each part of a model runs with `model.attention: packed`, and the switch to it.

Text layers compute each sample apart where the family allows it and transformers gives the layers the samples' bounds.
Vision towers that attend within pictures or windows of any size (Qwen, GLM, PaddleOCR, Pixtral) compute each of those
apart, all in one call of a layer. Every other part runs transformers' sdpa, or eager where transformers has no sdpa for
it, and says why: towers that stack their pictures are one call without a mask already.

A model is built with that other implementation and switched afterwards: while it builds a model, transformers looks for
a package behind every name that holds "flash".
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from mmray.families import by_sample_problem
from mmray.families.packed_attention import MAX_HEAD_SIZE, PACKED_FLASH
from mmray.training.flash_attention import head_size

TEXT, VISION = "text", "vision"


@dataclass(frozen=True)
class AttentionPath:
    """The attention of one part of a model."""

    part: str
    """The part's name: text, vision, or that of its configuration."""
    implementation: str
    """Name of the implementation in transformers."""
    reason: str
    """The reason why the part does not compute samples apart; where it does, the reason why a GPU runs a call for each
    sample, and not one for all; "" for none."""
    config: PretrainedConfig
    """The part's configuration, which decides its implementation."""

    @property
    def name(self) -> str:
        """The implementation as `model.attention` names it."""
        return attention_name(self.implementation)

    def __str__(self) -> str:
        return f"{self.part} {self.name}" + (f" ({self.reason})" if self.reason else "")


def plain_implementation(config: PretrainedConfig) -> str:
    """sdpa; eager for a model with a text model for which transformers has no sdpa."""
    return "sdpa" if all(known._supports_sdpa for known in _classes(config)) else "eager"


def text_implementation(config: PretrainedConfig) -> str:
    """The implementation of a model's text layers with `model.attention: packed`."""
    return plain_implementation(config) if _text_problem(config) else PACKED_FLASH


def attention_paths(model: PreTrainedModel) -> list[AttentionPath]:
    """The attention of each part of a model with `model.attention: packed`, text first; the model stays as it is."""
    towers: dict[int, list[PreTrainedModel]] = {}
    whole, text = model.config, model.config.get_text_config()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config is not whole and module.config is not text:
            towers.setdefault(id(module.config), []).append(module)
    names = {id(getattr(whole, name, None)): name.removesuffix("_config") for name in whole.sub_configs}
    problem = _text_problem(whole)
    paths = [_path(TEXT, _text_models(model), problem, text)]
    for number, tower in towers.items():
        paths.append(_path(names.get(number, VISION), tower, _tower_problem(tower), tower[0].config))
    return paths


def _path(part: str, models: Sequence[PreTrainedModel], problem: str | None, config: PretrainedConfig) -> AttentionPath:
    """The path of a part. problem: the reason why its models do not compute samples apart."""
    if problem:
        return AttentionPath(part, _plain(models), problem, config)
    on_gpus = _one_by_one(models)
    return AttentionPath(part, PACKED_FLASH, f"on GPUs sample by sample: {on_gpus}" if on_gpus else "", config)


def _one_by_one(models: Sequence[PreTrainedModel]) -> str:
    """The reason why torch's kernels for samples of various lengths cannot run a part on any GPU; "" for none."""
    sizes = {head_size(module) for part in models for module in part.modules()}
    if max(sizes, default=0) > MAX_HEAD_SIZE:
        return f"its heads have {max(sizes)} numbers, one call takes up to {MAX_HEAD_SIZE}"
    if any(part.dtype == torch.float32 for part in models):
        return "one call takes bf16"
    if any(getattr(part.config, "attn_logit_softcapping", None) for part in models):
        return "its scores have a soft cap"
    if any(hasattr(module, "sinks") for part in models for module in part.modules()):
        return "its heads have sinks"
    return ""


def use_packed(model: PreTrainedModel) -> None:
    """Switches each part of a model to its attention with `model.attention: packed`."""
    for path in attention_paths(model):
        _switch(path.config, path.implementation)
        if path.part == TEXT:
            _switch(model.config, path.implementation)


def attention_names(model: PreTrainedModel) -> dict[str, str]:
    """The attention that each part of a model runs now, by the part's name, as `model.attention` names it."""
    return {path.part: attention_name(path.config._attn_implementation) for path in attention_paths(model)}


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Lets a model run without the bounds of samples inside the block, as generation does: parts that compute samples
    apart run sdpa, or eager where there is none."""
    switched: dict[int, PretrainedConfig] = {}
    try:
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module.config._attn_implementation == PACKED_FLASH:
                switched[id(module.config)] = module.config
                _switch(module.config, plain_implementation(module.config))
        yield
    finally:
        for config in switched.values():
            _switch(config, PACKED_FLASH)


def attention_name(implementation: str | None) -> str:
    """The name in `model.attention` of an implementation of transformers."""
    return "packed" if implementation == PACKED_FLASH else str(implementation)


def _switch(config: PretrainedConfig, implementation: str) -> None:
    """Sets the implementation of one configuration, and not of those within it."""
    config._attn_implementation = {"": implementation}


def _text_problem(config: PretrainedConfig) -> str | None:
    """The reason why the text layers of a model do not compute samples apart."""
    if problem := by_sample_problem(config):
        return problem
    lacking = [known.__name__ for known in _classes(config) if not known._supports_flash_attn]
    return f"transformers gives the layers of {lacking[0]} no bounds of samples" if lacking else None


def _classes(config: PretrainedConfig) -> list[type[PreTrainedModel]]:
    """The classes of a configuration's model and text model, as far as transformers has them."""
    known: Any = AutoModel._model_mapping
    return [known[type(part)] for part in (config, config.get_text_config()) if type(part) in known]


def _text_models(model: PreTrainedModel) -> list[PreTrainedModel]:
    text = model.config.get_text_config()
    return [part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is text]


def _tower_problem(tower: Sequence[PreTrainedModel]) -> str | None:
    """The reason why a part besides the text model does not compute pictures apart. tower: its models."""
    lacking = [type(part).__name__ for part in tower if not part._supports_flash_attn]
    if lacking:
        return f"transformers has no other for {lacking[0]}"
    if not any(_is_told_bounds(module) for part in tower for module in part.modules()):
        return "one call takes all its pictures"
    return None


def _is_told_bounds(module: torch.nn.Module) -> bool:
    """True for a module that takes the bounds of pictures, or gives them to its layers."""
    forward = type(module).forward
    if "cu_seqlens" in inspect.signature(forward).parameters:
        return True
    return isinstance(module, PreTrainedModel) and "cu_seq_lens_q" in inspect.getsource(inspect.unwrap(forward))


def _plain(models: Sequence[PreTrainedModel]) -> str:
    return "sdpa" if all(part._supports_sdpa for part in models) else "eager"
