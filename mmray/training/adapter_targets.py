"""What an adapter touches in a model: linear layers, embeddings and experts, chosen by parts or patterns of names.

Only modules are adapted that compute nothing but `x W + b`, because peft adds its product to their output: plain
`nn.Linear`, also the one inside a wrapper such as Gemma 4's clippable linear. A subclass may return something else
(the router of Llama 4 returns two tensors), or may never be called (the output layer of `nn.MultiheadAttention`).
Routers of experts stay as they are. Experts are single parameters of three dimensions, which peft adapts by name.
"""

import difflib
import fnmatch
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mmray.errors import UserError
from mmray.families import model_parts
from mmray.families.parts import Parts
from mmray.training.adapter_settings import AdapterSettings
from mmray.training.router_loss import router_modules
from mmray.training.weights import listed

LONE_MATRICES = ("mm_input_projection_weight",)
"""Names of parameters of two dimensions that a module multiplies its input by without a linear layer (Gemma 3's
projector)."""
PART_NAMES = ("vision", "projector", "language", "embeddings", "audio")


@dataclass(frozen=True)
class AdapterTargets:
    """The modules and weights of one model that an adapter touches, by their names in the plain model."""

    modules: tuple[str, ...]
    """Adapted linear layers and embeddings."""
    parameters: tuple[str, ...]
    """Adapted parameters that belong to no linear layer, such as experts."""
    whole: tuple[str, ...]
    """Weights that are trained whole."""

    @classmethod
    def of(cls, model: PreTrainedModel, settings: AdapterSettings) -> "AdapterTargets":
        """The targets of an adapter in a model. model: without adapter, on the meta device or not; it is not changed.

        Raises UserError for a part or pattern that matches nothing, or what cannot be adapted.
        """
        parts = model_parts(model)
        chosen = _chosen(model, parts, settings.parts)
        whole = _whole(model, parts, settings.save_whole)
        parameters = tuple(name for name in chosen if not _is_module(model, name))
        modules = tuple(name for name in chosen if name not in parameters)
        _check_plain(settings, parameters)
        _check_untied(model, modules)
        adapted = {*parameters, *(f"{name}.weight" for name in modules)}
        if both := [name for name in whole if name in adapted]:
            raise UserError(
                f"training.adapter: {listed(both)} would be adapted (parts) and trained whole (save_whole); name it in "
                "one of them"
            )
        return cls(modules, parameters, whole)

    def in_words(self, model: PreTrainedModel, parts: Parts) -> str:
        """Lists what is adapted and what not, by part, for a person. model: without the adapter; parts: its parts."""
        weights = {name: name for name in self.parameters} | {f"{name}.weight": name for name in self.modules}
        adapted: dict[str, list[str]] = {}
        frozen: dict[str, int] = {}
        for name, _ in model.named_parameters():
            part = parts.part_of(name)
            if name in weights:
                adapted.setdefault(part, []).append(weights[name])
            elif name not in self.whole:
                frozen[part] = frozen.get(part, 0) + 1
        sentences = [f"adapted in {part}: {_kinds(names)}" for part, names in adapted.items()]
        if self.whole:
            sentences.append(f"trained whole: {_kinds(self.whole)}")
        left = ", ".join(f"{count} of {part}" for part, count in frozen.items())
        return "; ".join([*sentences, f"other weights stay as they are: {left}"])


def _chosen(model: PreTrainedModel, parts: Parts, wanted: Sequence[str]) -> list[str]:
    """Names of the adapted modules and parameters, in the model's order."""
    able = dict(_adaptable(model, parts))
    modules = {name: module for name, module in model.named_modules() if name}
    chosen: set[str] = set()
    for pattern in wanted:
        if pattern in PART_NAMES:
            names = [name for name, part in able.items() if part == pattern]
            if not names:
                raise UserError(
                    f"training.adapter.parts: {pattern} of a {type(model).__name__} has no linear layer to adapt; name "
                    f"it in save_whole, or choose among {', '.join(sorted(set(able.values())))}"
                )
        else:
            names = _below(matching(pattern, [*modules, *able]), able)
            if not names:
                raise UserError(_nothing("training.adapter.parts", pattern, able, modules))
        chosen.update(names)
    return [name for name in able if name in chosen]


def _adaptable(model: PreTrainedModel, parts: Parts) -> Iterator[tuple[str, str]]:
    """Everything in a model that can be adapted, each with its part."""
    routers = {id(module) for router in router_modules(model) for module in router.modules()}
    for name, module in model.named_modules():
        if id(module) in routers:
            continue
        if type(module) is nn.Linear or isinstance(module, nn.Embedding):
            part = parts.part_of(f"{name}.weight")
            if part == "embeddings" or not isinstance(module, nn.Embedding):
                yield name, part
        for leaf, parameter in module.named_parameters(recurse=False):
            is_expert = type(module).__name__.endswith("Experts") and parameter.dim() == 3
            if is_expert or leaf in LONE_MATRICES:
                yield f"{name}.{leaf}", parts.part_of(f"{name}.{leaf}")


def _whole(model: PreTrainedModel, parts: Parts, wanted: Sequence[str]) -> tuple[str, ...]:
    """Names of the weights that are trained whole, in the model's order."""
    weights = [name for name, _ in model.named_parameters()]
    by_part = parts.parameters(model)
    modules = [name for name, _ in model.named_modules() if name]
    chosen: set[str] = set()
    for pattern in wanted:
        if pattern in PART_NAMES:
            names = by_part[pattern]
        else:
            names = _below(matching(pattern, [*modules, *weights]), weights)
        if not names and (holders := matching(pattern, modules)):
            raise UserError(f"training.adapter.save_whole: {pattern!r} {_weightless(model, holders[0])}")
        if not names:
            raise UserError(_nothing("training.adapter.save_whole", pattern, [*modules, *weights], {}))
        chosen.update(names)
    return tuple(name for name in weights if name in chosen)


def _weightless(model: nn.Module, name: str) -> str:
    """The reason why a module has no weights of its own to train, in words after its name."""
    for inner, weight in model.get_submodule(name).named_parameters(prefix=name):
        first = next(other for other, known in model.named_parameters() if known is weight)
        return f"is one weight with {first} ({inner} is tied to it); name that one, or embeddings, which trains both"
    return "has no weights to train; name modules or weights that have some"


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern with `*` matches as a whole, or from a dot on to their end."""
    return [n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"*.{pattern}")]


def _below(holders: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that are holders, or lie below one."""
    return [name for name in names if any(name == holder or name.startswith(f"{holder}.") for holder in holders)]


def _kinds(names: Iterable[str]) -> str:
    """Names in a few words: their ends, each with how often it occurs."""
    ends: Counter[str] = Counter()
    for name in names:
        pieces = name.removesuffix(".weight").split(".")
        first = -2 if pieces[-1].isdecimal() or name.endswith(".bias") else -1
        ends[".".join(pieces[first:])] += 1
    return ", ".join(f"{end} ({count})" for end, count in ends.items())


def _nothing(setting: str, pattern: str, names: Collection[str], modules: Mapping[str, Any]) -> str:
    """The message for a pattern that matches nothing."""
    if others := matching(pattern, modules):
        kinds = sorted({type(modules[name]).__name__ for name in others})
        return (
            f"{setting}: {pattern!r} matches {listed(others)}, but an adapter cannot be put on a {' or '.join(kinds)}; "
            "name linear layers, or train it whole (save_whole)"
        )
    words = {*PART_NAMES, *names, *(name.rsplit(".", 1)[-1] for name in names)}
    near = difflib.get_close_matches(pattern, sorted(words), n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; parts are {', '.join(PART_NAMES[:4])}"
    return f"{setting}: {pattern!r} is no part of the model and matches no name in it{hint}"


def _check_plain(settings: AdapterSettings, parameters: Sequence[str]) -> None:
    """Raises UserError where parameters outside of linear layers are adapted in a way that peft has for layers
    alone."""
    if parameters and (settings.kind != "lora" or settings.dropout):
        what = f"kind: {settings.kind}" if settings.kind != "lora" else f"dropout: {settings.dropout:g}"
        raise UserError(
            f"training.adapter: peft adapts {listed(parameters)} by plain LoRA alone, without {what}; set kind: lora "
            "and dropout: 0, or leave them out by patterns in parts"
        )


def _check_untied(model: PreTrainedModel, modules: Sequence[str]) -> None:
    """Raises UserError where an adapted module shares its weight with another: merged, both would change."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            holders.setdefault(id(module.weight), []).append(name)
    for name in modules:
        tied = holders.get(id(model.get_submodule(name).weight), [name])
        if len(tied) > 1:
            raise UserError(
                f"training.adapter: {' and '.join(tied)} share one weight in a {type(model).__name__}, which an "
                "adapter on one of them would change for both; train it whole (save_whole: [embeddings]), or leave it "
                "out"
            )


def _is_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
