"""The parts of a model: vision tower, projector, language model, and embeddings with the head.

A family names the modules of its parts once (`Family.module_names`), as transformers names them in a loaded model, not
as they stand in the hub's files. A name stands for all weights below it, except those that a longer name of another
part holds: the merger of a Qwen2-VL is its projector and lies inside its vision tower. So parts are disjoint by
construction, and `Parts.of` finds out whether they cover a model.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from torch import nn
from transformers import PreTrainedModel

from mmray.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Names of modules, or of lone parameters, of each part of a model."""

    vision: tuple[str, ...]
    """The vision tower."""
    projector: tuple[str, ...]
    """Modules that turn the vision tower's features into the language model's."""
    language: tuple[str, ...] = ("model.language_model",)
    """The language model's layers."""
    embeddings: tuple[str, ...] = ("model.language_model.embed_tokens", "lm_head")
    """The token embeddings and the head, which many models tie together."""
    audio: tuple[str, ...] = ()
    """The audio tower and its connection to the language model. mmray reads no audio, so it learns nothing."""

    def items(self) -> Iterable[tuple[str, tuple[str, ...]]]:
        """Each part's name with its modules."""
        return ((part.name, getattr(self, part.name)) for part in fields(self))

    def part_of(self, name: str) -> str:
        """The part that a parameter belongs to. Raises KeyError for a parameter of no part."""
        holders = [(len(module), part) for part, modules in self.items() for module in modules if _holds(module, name)]
        if not holders:
            raise KeyError(name)
        return max(holders)[1]

    def parameters(self, model: nn.Module) -> dict[str, list[str]]:
        """The names of a model's parameters by part, in the model's order; a tied weight once, by its first name."""
        names: dict[str, list[str]] = {part: [] for part, _ in self.items()}
        for name, _ in model.named_parameters():
            names[self.part_of(name)].append(name)
        return names

    def of(self, model: PreTrainedModel) -> "Parts":
        """The parts that a given model has, without names that it lacks, such as a head that only larger models own.

        Raises UserError where a parameter of the model belongs to no part, or a part but audio has none.
        """
        present = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
        parts = replace(self, **{part: tuple(filter(present.__contains__, names)) for part, names in self.items()})
        try:
            empty = [part for part, names in parts.parameters(model).items() if not names and part != "audio"]
        except KeyError as error:
            raise UserError(
                f"{type(model).__name__} has the weight {error.args[0]!r}, which belongs to none of the parts that "
                "mmray knows of it; use the release of transformers that mmray names"
            ) from error
        if empty:
            raise UserError(f"{type(model).__name__} has no weights in the parts that mmray names: {', '.join(empty)}")
        return parts


def parts_by_rules(model: PreTrainedModel) -> Parts:
    """The parts of a model that no family serves, found by what transformers itself tells of it.

    transformers tells any model's token embeddings, head, language model and vision tower; whatever lies in none of
    them joins sight to text. Raises UserError where it tells no vision tower or no language model of this model.
    """
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    vision, language = model.get_encoder("image"), model.get_decoder()
    decoder = names.get(id(language), "")
    if not names.get(id(vision)) or decoder in ("", model.base_model_prefix) or _holds(decoder, names[id(vision)]):
        raise UserError(
            f"transformers does not tell which modules of {type(model).__name__} are its vision tower and its language "
            "model, so its parts cannot be named"
        )
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    parts = Parts(
        vision=(names[id(vision)],),
        projector=(),
        language=(decoder,),
        embeddings=tuple(names[id(module)] for module in ends if module is not None),
    )
    modules = [name for names in dict(parts.items()).values() for name in names]
    joining = [name for name, _ in model.named_parameters() if not any(_holds(module, name) for module in modules)]
    return replace(parts, projector=tuple(joining)).of(model)


def _holds(module: str, name: str) -> bool:
    return name == module or name.startswith(f"{module}.")
