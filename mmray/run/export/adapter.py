"""Adapters in an export: merged into their base model, or apart in a folder that peft loads.

Merged, each adapted weight is added up in fp32 and rounded once, one module at a time. A quantised base is merged as
training had it: each of its quantised weights is rounded to four bits and back. Apart, only the trained weights are
read; the base is named in `adapter_config.json`, and is neither loaded nor copied, unless its weights were drawn at
random, so that the checkpoint alone has them: then it lies in the folder `base`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmray.errors import UserError
from mmray.training.adapter import Adapter, is_adapter, plain_name, to_file_names, trained_weights
from mmray.training.base_weights import BaseFiles
from mmray.training.model import DTYPES, empty_model, load_plain, resize_embeddings
from mmray.training.quantized import quantised_layers, rounded
from mmray.training.saved_weights import SavedWeights
from mmray.training.settings import ModelSettings
from mmray.training.weights import listed

BASE_FOLDER = "base"


def merged_model(
    adapter: Adapter, settings: ModelSettings, weights: SavedWeights, dtype: torch.dtype
) -> PreTrainedModel:
    """The base model with the adapter of a checkpoint merged into it, in a dtype.

    settings: the model's, in the dtype of training. Raises UserError where the base is not the one it was trained on.
    """
    if adapter.base is None:
        model = base_in_checkpoint(adapter, settings, weights, DTYPES[settings.dtype])
    else:
        assert settings.path is not None
        adapter.base.check_equal(BaseFiles.of(settings.path), "the adapter")
        model = load_plain(settings)
        if adapter.quantize is not None:
            for name in quantised_layers(model):
                layer: Any = model.get_submodule(name)
                layer.weight.data = rounded(layer.weight.data)
    adapter.put_into(model)
    read_trained(model, weights, torch.float32)
    merge(model, dtype)
    nn.Module.to(model, dtype)
    return model


def merge(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Makes a plain model of an adapted one, whose logits are the same; the weights that change are given a dtype."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer) and not name.endswith(".base_layer"):
            model.set_submodule(name, _merged(module, dtype))
    model.requires_grad_(True)
    del model.peft_config


def base_in_checkpoint(
    adapter: Adapter, settings: ModelSettings, weights: SavedWeights, dtype: torch.dtype
) -> PreTrainedModel:
    """The base model whose weights lie in the checkpoint, without the adapter; what is trained whole is as trained."""
    model, adapted = _empty(settings), _empty(settings)
    adapter.put_into(adapted)
    saved_names = {plain_name(name): name for name in adapted.state_dict() if not is_adapter(name)}
    filled: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, empty in model.state_dict(keep_vars=True).items():
        if id(empty) not in filled:
            filled[id(empty)] = weights.read(saved_names[name], dtype)
        state[name] = filled[id(empty)]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model


def _empty(settings: ModelSettings) -> PreTrainedModel:
    model = empty_model(settings)
    if settings.resize_embeddings:
        resize_embeddings(model, settings)
    return model


def read_trained(model: PreTrainedModel, weights: SavedWeights, dtype: torch.dtype) -> None:
    """Puts the trained weights of a checkpoint into an adapted model."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = weights.read(name, dtype)


def _merged(module: Any, dtype: torch.dtype) -> nn.Module:
    """An adapted module as one without adapter."""
    module.float()
    if hasattr(module, "unload_and_optionally_merge_module"):
        base: nn.Module = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    else:
        module.merge()
        base = module.get_base_layer()
    return base.to(dtype)


def write_adapter(
    adapter: Adapter, settings: ModelSettings, weights: SavedWeights, dtype: torch.dtype, folder: Path
) -> None:
    """Writes an adapter's folder, as peft writes it: `adapter_config.json` and `adapter_model.safetensors`; also
    `adapter.json`, which names the base by its digests."""
    model = _empty(settings)
    owners = owners_of_whole(model, adapter.targets.whole)
    adapter.put_into(model)
    names = {id(weight): name for name, weight in model.named_parameters()}
    trained = {name: weights.read(names[id(weight)], dtype) for name, weight in trained_weights(model).items()}
    save_file(to_file_names(trained), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if adapter.base is None:
        base = base_in_checkpoint(adapter, settings, weights, dtype)
        base.save_pretrained(folder / BASE_FOLDER)
    config = adapter.config(BASE_FOLDER if adapter.base is None else settings.path)
    config.modules_to_save, config.inference_mode = owners or None, True
    config.save_pretrained(folder)
    _sort(folder / "adapter_config.json")
    adapter.write(folder)


def owners_of_whole(model: nn.Module, whole: Iterable[str]) -> list[str]:
    """The modules that own the weights trained whole, which peft saves as modules. model: without adapter.

    Raises UserError where a module owns such a weight and others.
    """
    wanted = set(whole)
    owners: list[str] = []
    held: set[int] = {id(model.get_parameter(name)) for name in wanted}
    for name, module in model.named_modules():
        if any(name.startswith(f"{owner}.") for owner in owners):
            continue
        if any(id(weight) in held for weight in module.parameters(recurse=False)):
            if others := [leaf for leaf, weight in module.named_parameters() if id(weight) not in held]:
                lone = [leaf for leaf, weight in module.named_parameters(recurse=False) if id(weight) in held]
                where = [f"{name}.{leaf}".lstrip(".") for leaf in lone]
                raise UserError(
                    f"peft saves whole modules alone, and {listed(where)} (training.adapter.save_whole) is not all of "
                    f"its module, which also has {listed(others)}; leave out --adapter to export the merged model"
                )
            owners.append(name)
    return owners


def _sort(file: Path) -> None:
    """Writes the lists of names in a configuration, which peft keeps as sets, in one order."""
    content = json.loads(file.read_text())
    for name in ("target_modules", "target_parameters", "modules_to_save"):
        if isinstance(content.get(name), list):
            content[name] = sorted(content[name])
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
