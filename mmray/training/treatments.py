"""What is trained, and how: the treatment of each weight by `training.parts` and `training.stages`.

    stages_of        the stages of a training, each with its steps
    treatments       a stage's treatment of each weight: frozen, or its rate and decay
    weight_groups    the groups of the optimizer: every weight that is trained is in exactly one, none is empty

A key that names nothing, a weight that two patterns treat differently, a tied weight of which one name is frozen and
the other not, and a stage that trains nothing are errors, found from the names alone.
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from transformers import PreTrainedModel

from mmray.errors import UserError
from mmray.families import Parts, model_parts
from mmray.training.part_settings import PartSettings, PartsSetting
from mmray.training.settings import TrainingSettings
from mmray.training.weights import listed

_ADAPTED = re.compile(r"\.lora_\w+\.\w+(\.weight)?$")
_WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save\.\w+)(?=\.)")
PART_NAMES = tuple(part.name for part in fields(Parts))


@dataclass(frozen=True)
class Stage:
    """Steps of a training in which the same parts are trained."""

    number: int
    """Number of the stage, from 0."""
    first_step: int
    """Steps of the training that are done before it."""
    steps: int
    """Number of steps of the stage."""
    parts: PartsSetting
    """Treatment of the parts in it."""
    place: str
    """Name of the setting that says so."""

    @property
    def stop_step(self) -> int:
        """Steps of the training that are done after it."""
        return self.first_step + self.steps


def stages_of(training: TrainingSettings, total_steps: int) -> list[Stage]:
    """The stages of a training of `total_steps` steps, in order; the last is that of `training.parts`.

    Raises UserError where no step is left for the last.
    """
    stages: list[Stage] = []
    first_step = 0
    for number, stage in enumerate(training.stages):
        stages.append(Stage(number, first_step, stage.steps, stage.parts, f"training.stages.{number}.parts"))
        first_step += stage.steps
    if stages and first_step >= total_steps:
        raise UserError(
            f"training.stages take {first_step} steps, and training has {total_steps}: none is left for what "
            "training.parts says; train longer, or leave the last stage out"
        )
    return [*stages, Stage(len(stages), first_step, total_steps - first_step, training.parts, "training.parts")]


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage of the step that follows `step` done ones; after the last step, the last stage."""
    return next((stage for stage in stages if step < stage.stop_step), stages[-1])


@dataclass(frozen=True)
class Treatment:
    """The treatment of one weight."""

    key: str | None
    """The part or pattern that says so; None where no key names the weight."""
    is_frozen: bool
    learning_rate: float
    """Peak learning rate."""
    weight_decay: float
    """Weight decay; that of a matrix."""


def treatments(model: PreTrainedModel, stage: Stage, training: TrainingSettings) -> dict[str, Treatment]:
    """The treatment of each weight of a model, by its name; a tied weight once, by its first name.

    Raises UserError, naming the key or the weight, where the stage's parts do not fit the model.
    """
    names_of = weight_names(model)
    others = Treatment(None, False, training.learning_rate, training.weight_decay)
    if not stage.parts:
        return dict.fromkeys(names_of, others)
    by_key = {key: _treatment(key, value, training) for key, value in stage.parts.items()}
    keys = _Keys(model, stage)
    treated: dict[str, Treatment] = {}
    for name, names in names_of.items():
        by_name = {alias: others if (key := keys.of(alias, name)) is None else by_key[key] for alias in names}
        first = by_name[name]
        for alias, other in by_name.items():
            if _values(other) != _values(first):
                raise UserError(
                    f"{stage.place}: {alias} and {name} are tied, one weight, and the first is {_words(other)}, "
                    f"the second {_words(first)}; treat both alike, as the part embeddings does"
                )
        treated[name] = first
    keys.check_used(treated)
    if all(treatment.is_frozen for treatment in treated.values()):
        raise UserError(f"{stage.place} freezes every weight of the model: nothing would be trained")
    return treated


def weight_names(model: torch.nn.Module) -> dict[str, list[str]]:
    """The names of each weight, by the first of them; several where weights are tied."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(first.setdefault(id(weight), name), []).append(name)
    return names


def plain_name(name: str) -> str:
    """The name that a weight has in the model without peft's adapters; that of the adapted weight for an adapter's."""
    return _WRAPPED.sub("", _ADAPTED.sub(".weight", name))


class _Keys:
    """The keys of a stage's parts, and the weights that they name."""

    def __init__(self, model: PreTrainedModel, stage: Stage) -> None:
        self._kind, self._stage = type(model).__name__, stage
        names_of = weight_names(model)
        self._first_names = [plain_name(name) for name in names_of]
        self._names = [plain_name(name) for names in names_of.values() for name in names]
        self._patterns = [key for key in stage.parts if key not in PART_NAMES]
        self._parts = model_parts(model) if len(self._patterns) < len(stage.parts) else None

    def of(self, name: str, first_name: str) -> str | None:
        """The key that a name of a weight falls under: a pattern before the part. Raises UserError for two patterns.

        first_name: the weight's first name, which tells its part.
        """
        name, first_name, parts = plain_name(name), plain_name(first_name), self._stage.parts
        patterns = [pattern for pattern in self._patterns if fnmatch.fnmatchcase(name, pattern)]
        if any(parts[pattern] != parts[patterns[0]] for pattern in patterns):
            raise UserError(
                f"{self._stage.place}: {name} is treated differently by {' and by '.join(map(repr, patterns))}; write "
                "patterns that do not overlap"
            )
        if patterns:
            return patterns[0]
        part = self._part(first_name)
        return part if part in parts else None

    def _part(self, name: str) -> str | None:
        return None if self._parts is None else self._parts.part_of(name)

    def check_used(self, treated: dict[str, Treatment]) -> None:
        """Raises UserError for a key that decides on no weight."""
        for key in self._stage.parts:
            if any(treatment.key == key for treatment in treated.values()):
                continue
            if key in self._patterns and any(fnmatch.fnmatchcase(name, key) for name in self._names):
                continue  # it says the same as another pattern
            raise UserError(f"{self._stage.place}: {self._unused(key)}")

    def _unused(self, key: str) -> str:
        if key in PART_NAMES:
            if any(self._part(name) == key for name in self._first_names):
                return f"{key} has no weight that no pattern takes, and patterns come before parts; leave {key} out"
            return f"a {self._kind} has no part {key}; leave it out"
        if any(name.startswith(f"{key.rstrip('.')}.") for name in self._names):
            return f"{key} is a module and no weight; write {key.rstrip('.')}.* for all its weights"
        near = difflib.get_close_matches(key, [*PART_NAMES, *self._modules()], n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        return f"{key!r} is no part ({', '.join(PART_NAMES)}) and matches no weight of a {self._kind}{hint}"

    def _modules(self) -> Iterable[str]:
        """The names of weights, and the patterns of the modules above them."""
        modules = {name.rsplit(".", depth)[0] for name in self._names for depth in range(1, name.count(".") + 1)}
        return [*self._names, *(f"{module}.*" for module in sorted(modules))]


def _treatment(key: str, value: object, training: TrainingSettings) -> Treatment:
    if not isinstance(value, PartSettings):
        return Treatment(key, True, 0.0, 0.0)
    rate, decay = value.learning_rate, value.weight_decay
    return Treatment(
        key,
        False,
        training.learning_rate if rate is None else rate,
        training.weight_decay if decay is None else decay,
    )


def _values(treatment: Treatment) -> tuple[bool, float, float]:
    return treatment.is_frozen, treatment.learning_rate, treatment.weight_decay


def _words(treatment: Treatment) -> str:
    if treatment.is_frozen:
        return "frozen"
    return f"trained with learning_rate {treatment.learning_rate:g} and weight_decay {treatment.weight_decay:g}"


@dataclass(frozen=True)
class WeightGroup:
    """One group of the optimizer: weights with the same settings, of which as many updates were done."""

    names: tuple[str, ...]
    """Names of its weights, in the model's order."""
    learning_rate: float
    """Peak learning rate."""
    weight_decay: float
    since: int
    """Number of the stage from which on these weights have been trained without a break."""
    by_muon: bool = False
    """True if Muon updates them."""


def weight_groups(
    model: PreTrainedModel, training: TrainingSettings, stages: Sequence[Stage], stage: Stage
) -> list[WeightGroup]:
    """The groups of the optimizer in a stage: matrices first, which decay, and then biases and norm scales, which do
    not.

    Weights that the model itself does not train (`requires_grad`), as below an adapter, are in none. Under ZeRO-3 a
    weight is an empty shard with its true shape beside it (`ds_shape`).
    """
    history = [treatments(model, earlier, training) for earlier in stages[: stage.number + 1]]
    members: dict[tuple[bool, bool, float, float, int], list[str]] = {}
    usable, named = {treatment.key for treatment in history[-1].values()}, set[str | None]()
    for name, weight in model.named_parameters():
        treatment = history[-1][name]
        if treatment.is_frozen and weight.requires_grad and training.adapter is not None:
            raise UserError(
                f"{stage.place}: {treatment.key} is frozen, and training.adapter trains {plain_name(name)}; leave it "
                "out of one of them (the adapter's parts and save_whole)"
            )
        if treatment.is_frozen or not weight.requires_grad:
            continue
        shape = tuple(getattr(weight, "ds_shape", weight.shape))
        is_matrix = len(shape) >= 2
        by_muon = training.optimizer == "muon" and is_matrix and not any(word in name.lower() for word in NOT_BY_MUON)
        if by_muon and len(shape) >= 4:
            raise UserError(
                f"optimizer: muon is made for matrices, and {name} of the shape {list(shape)} is a convolution; freeze "
                f"it ({stage.place}), or set optimizer: adamw"
            )
        decay = treatment.weight_decay if is_matrix else 0.0
        key = (not is_matrix, not by_muon, treatment.learning_rate, decay, _trained_since(history, name))
        members.setdefault(key, []).append(name)
        named.add(treatment.key)
    for part, value in stage.parts.items():
        if isinstance(value, PartSettings) and part in usable and part not in named:
            raise UserError(
                f"{stage.place}: {part} is given settings, and nothing of it is trained: the adapter does not touch it"
            )
    if not members:
        raise UserError(f"{stage.place} leaves no weight to train: the rest of the model is not trained by its adapter")
    return [
        WeightGroup(tuple(names), rate, decay, since, by_muon=not by_adam)
        for (_, by_adam, rate, decay, since), names in sorted(members.items(), key=lambda item: item[0][:2])
    ]


def usual_groups(model: PreTrainedModel, training: TrainingSettings) -> list[WeightGroup]:
    """The groups of the optimizer in a training that has no parts and no stages."""
    stage = Stage(0, 0, 1, {}, "training")
    return weight_groups(model, training, [stage], stage)


def freeze(model: PreTrainedModel, groups: Sequence[WeightGroup]) -> None:
    """Leaves gradients to the weights of these groups alone."""
    trained = {name for group in groups for name in group.names}
    for name, weight in model.named_parameters():
        if name not in trained:
            weight.requires_grad_(False)


NOT_BY_MUON = ("embed", "lm_head")
"""Words in the names of weights that DeepSpeed leaves to AdamW."""


def _trained_since(history: Sequence[dict[str, Treatment]], name: str) -> int:
    """The first of the stages that have trained a weight without a break, up to the last of them."""
    frozen = [number for number, stage in enumerate(history) if stage[name].is_frozen]
    return frozen[-1] + 1 if frozen else 0


def summary(treated: dict[str, Treatment], model: PreTrainedModel) -> dict[str, str]:
    """The treatment of each part of a model in a word or two: `frozen`, `trained`, or `partly frozen`."""
    words = {}
    for part, names in model_parts(model).parameters(model).items():
        frozen = [treated[name].is_frozen for name in names]
        if names:
            words[part] = "frozen" if all(frozen) else "partly frozen" if any(frozen) else "trained"
    return words


def trained_difference(saved: Iterable[str], wanted: Iterable[str]) -> str:
    """How two sets of trained weights differ, in words; "" where they do not."""
    saved, wanted = set(saved), set(wanted)
    lines = [
        f"{words}: {listed(sorted(names))}"
        for words, names in (("now frozen", saved - wanted), ("now trained", wanted - saved))
        if names
    ]
    return "; ".join(lines)
