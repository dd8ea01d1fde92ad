"""What is trained, told before a run begins: the weights of each part, how they are trained, and what that costs.

It needs the model's names and shapes alone, so it is judged on a model without memory, on any machine.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from mmray.base.words import amount, file_size
from mmray.errors import UserError
from mmray.families import model_parts
from mmray.training.adapter import Adapter, check_adapter
from mmray.training.checkpoint import check_resume, read_state
from mmray.training.model import empty_model, resize_embeddings
from mmray.training.settings import ModelSettings, TrainingSettings
from mmray.training.treatments import Stage, stages_of, treatments, weight_groups

MASTER_BYTES = 4
"""Bytes of the fp32 copy of a weight that is trained in bf16."""
STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0, "muon": 8.0}
"""Bytes of the states that an optimizer keeps of a number."""
MUON_BYTES = 4.0
"""Bytes of the states of a number that Muon updates."""
REST = "the whole model"
"""Name of all weights of a model whose parts are not known."""


@dataclass(frozen=True)
class PartFacts:
    """One part of a model in one stage."""

    name: str
    weights: int
    """Number of its numbers."""
    trained: int
    """Number of those that are trained."""
    rates: tuple[float, ...]
    """Peak learning rates of its weights, the highest first."""
    state_bytes: int
    """Bytes of the optimizer's states and fp32 copies, over all workers."""

    @property
    def text(self) -> str:
        """The part in words."""
        size = f"{self.name} {amount(self.weights)} weights"
        if not self.trained:
            return f"{size}, frozen"
        share = "" if self.trained == self.weights else f"{amount(self.trained)} of them trained, "
        rates = " and ".join(f"{rate:g}" for rate in self.rates)
        return f"{size}, {share}learning_rate {rates}, {file_size(self.state_bytes)} of states"


def part_model(settings: ModelSettings, training: TrainingSettings) -> PreTrainedModel:
    """The model of a job without weights, with the shapes that it is trained with and its adapter. Raises UserError as
    `empty_model` does, and for an adapter's targets that the model does not have."""
    model = empty_model(settings)
    if settings.resize_embeddings:
        resize_embeddings(model, settings)
    if training.adapter is not None:
        Adapter.of(settings, training.adapter, None).put_into(model)
    return model


def stage_facts(
    model: PreTrainedModel, settings: ModelSettings, training: TrainingSettings
) -> Iterator[tuple[Stage, list[PartFacts]]]:
    """The parts of a model in each stage of a training. Raises UserError where `parts` or `stages` do not fit it."""
    total_steps = training.steps or 1 + sum(stage.steps for stage in training.stages)
    stages = stages_of(training, total_steps)
    part_of = _parts_of(model)
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    for stage in stages:
        treated = treatments(model, stage, training)
        trained, states = Counter[str](), Counter[str]()
        rates: dict[str, set[float]] = {}
        for group in weight_groups(model, training, stages, stage):
            per_number = (MUON_BYTES if group.by_muon else STATE_BYTES[training.optimizer]) + (
                MASTER_BYTES if settings.dtype == "bf16" else 0
            )
            for name in group.names:
                trained[part_of[name]] += sizes[name]
                rates.setdefault(part_of[name], set()).add(treated[name].learning_rate)
                states[part_of[name]] += int(per_number * sizes[name])
        facts = []
        for part in dict.fromkeys(part_of.values()):
            names = [name for name in sizes if part_of[name] == part]
            weights = sum(sizes[name] for name in names)
            of_part = tuple(sorted(rates.get(part, ()), reverse=True))
            facts.append(PartFacts(part, weights, trained[part], of_part, states[part]))
        yield stage, facts


def _parts_of(model: PreTrainedModel) -> Mapping[str, str]:
    """The part of each weight, by its name."""
    try:
        parts = model_parts(model).parameters(model)
    except UserError:  # general rules do not tell the parts of every model
        return {name: REST for name, _ in model.named_parameters()}
    return {name: part for part, names in parts.items() for name in names}


def check_resumed(folder: Path, settings: ModelSettings, training: TrainingSettings, total_steps: int) -> None:
    """Raises UserError, with what differs, where a checkpoint was written by another training than the settings'.

    It reads the small files of the checkpoint alone, before any worker starts. total_steps: steps of the whole run.
    """
    stages = stages_of(training, total_steps)
    check_adapter(folder, None if training.adapter is None else Adapter.of(settings, training.adapter, None))
    check_resume(folder, read_state(folder), part_model(settings, training), (settings, training), stages)
