"""Optimizer states that move to other groups: at the end of a stage, and where parts get other rates.

A checkpoint that has anything but the usual two groups tells them in `groups.json`: the names of the weights of each,
the stage since which they are trained, and the number of updates they have had, from which AdamW corrects its running
means. DeepSpeed's universal form has a file for each weight and state, so it can be loaded into any groups once it is
completed: weights that were frozen so far get states of zero. What DeepSpeed leaves out of that form, frozen weights
and buffers, is read from the checkpoint itself.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmray.base.words import one_line
from mmray.errors import UserError
from mmray.training.saved_weights import SavedWeights
from mmray.training.treatments import WeightGroup, trained_difference

GROUPS_FILE = "groups.json"
FP32, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class SavedGroup:
    """One group of the optimizer as a checkpoint tells it."""

    names: tuple[str, ...]
    """Names of its weights, in order."""
    since: int
    """Number of the stage since which they are trained."""
    updates: int
    """Number of updates they have had since then; 0 where each weight's state tells its own, as at ZeRO stage 0."""


def write_groups(folder: Path, groups: Sequence[WeightGroup], updates: Sequence[int]) -> None:
    """Writes the groups of the optimizer into a checkpoint. updates: of each group."""
    saved = [SavedGroup(group.names, group.since, number) for group, number in zip(groups, updates, strict=True)]
    (folder / GROUPS_FILE).write_text(json.dumps([asdict(group) for group in saved], indent=1) + "\n")


def read_groups(folder: Path) -> list[SavedGroup] | None:
    """The groups of the optimizer in a checkpoint; None for one that does not tell, which has the usual two of all
    weights. Raises UserError where they cannot be read."""
    path = folder / GROUPS_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        return [SavedGroup(tuple(group["names"]), group["since"], group["updates"]) for group in content]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}; take another checkpoint") from error


def check_same_trained(
    folder: Path, step: int, saved_groups: Sequence[SavedGroup], groups: Sequence[WeightGroup], place: str
) -> None:
    """Raises UserError, with what differs, where a checkpoint has trained other weights in its last step.

    step: number of steps done. saved_groups: those of the checkpoint. groups: those in which the present settings would
    have done its last step; place: name of the setting that says so.
    """
    saved = {name: group.since for group in saved_groups for name in group.names}
    wanted = {name: group.since for group in groups for name in group.names}
    if difference := trained_difference(saved, wanted):
        raise UserError(
            f"{folder} has trained other weights in step {step} than {place} says ({difference}). Set it back; or, to "
            f"train other parts from here on, give what was trained so far as training.stages, up to step {step}, and "
            "what comes now as training.parts"
        )
    if saved != wanted:
        raise UserError(
            f"{folder} began to train some weights in other stages than training.stages says; leave the stages "
            f"up to step {step} as they were"
        )


def complete_universal(
    folder: Path, weights: SavedWeights, saved: Sequence[SavedGroup], groups: Sequence[WeightGroup]
) -> None:
    """Adds to a checkpoint in universal form what a load into other groups needs.

    folder: the universal form, whose `zero/` holds a folder for each weight. weights: those of the checkpoint that it
    was made from. saved: its groups. groups: those into which it will be loaded.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    known = {name for group in saved for name in group.names}
    for name in (name for group in groups for name in group.names if name not in known):
        place = folder / "zero" / name
        place.mkdir(parents=True, exist_ok=True)
        weight = weights.read(name, torch.float32)
        torch.save({"param": weight}, place / f"{FP32}.pt")
        zeros = torch.zeros(()).expand(weight.shape)  # one number on disk, whatever the shape
        for moment in MOMENTS:
            torch.save({"param": zeros}, place / f"{moment}.pt")
    path = folder / "zero" / "optimizer_state.pt"
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum]):
        state = torch.load(path, weights_only=True)
    if "param_groups" in state:  # stages 1 and 2 load as many groups as it lists; their settings are set afterwards
        first = state["param_groups"][0]
        state["param_groups"] = [dict(first) for _ in groups]
        torch.save(state, path)


def restore_untrained(
    model: torch.nn.Module, groups: Sequence[WeightGroup], weights: SavedWeights, zero_stage: int
) -> None:
    """Reads the weights that are not trained, and the buffers, from a checkpoint into a model. Collective.

    What the checkpoint does not hold, as the model below an adapter, stays as it was built.
    """
    import deepspeed

    trained = {name for group in groups for name in group.names}
    frozen = {name: weight for name, weight in model.named_parameters() if name not in trained}
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    with torch.no_grad():
        for name, target in (frozen | buffers).items():
            if name not in weights:
                continue
            if zero_stage < 3 or name in buffers:
                target.copy_(weights.read(name, target.dtype))
                continue
            with deepspeed.zero.GatheredParameters([target], modifier_rank=0):
                if torch.distributed.get_rank() == 0:
                    target.copy_(weights.read(name, target.dtype))


def restore_states(engine: Any, weights: SavedWeights, saved: Sequence[SavedGroup]) -> None:
    """Gives each trained weight its state at ZeRO stage 0, where a checkpoint holds them by the numbers of the weights.

    engine: DeepSpeed's engine, whose optimizer is torch's own. Weights without a saved state begin with a new one.
    """
    names = [name for group in saved for name in group.names]
    states: dict[int, dict[str, Any]] = weights.optimizer_state()["state"]
    by_name = {name: states[number] for number, name in enumerate(names) if number in states}
    for name, weight in engine.module.named_parameters():
        if weight.requires_grad and name in by_name:
            engine.optimizer.state[weight] = {
                key: value.to(weight.device) if isinstance(value, Tensor) and value.dim() else value
                for key, value in by_name[name].items()
            }


def updates_of(engine: Any, zero_stage: int, num_groups: int) -> list[int]:
    """The number of updates that each group of the optimizer has had, on this rank. engine: DeepSpeed's."""
    if zero_stage == 0:
        return [0] * num_groups
    updates = [0] * num_groups
    for group, state in _group_states(engine, zero_stage):
        updates[group] = max(updates[group], int(state.get("step", 0)))
    return updates


def set_updates(engine: Any, zero_stage: int, groups: Sequence[WeightGroup], saved: Sequence[SavedGroup]) -> None:
    """Sets the number of updates of each group to that of the weights that have been trained since the same stage.

    DeepSpeed's loader gives groups that mix them up, or those of stage 3, all the same number.
    """
    updates = {group.since: group.updates for group in saved}
    for number, state in _group_states(engine, zero_stage):
        done = updates.get(groups[number].since, 0)
        state["step"] = torch.tensor(float(done)) if isinstance(_inner(engine), torch.optim.AdamW) else done


def _group_states(engine: Any, zero_stage: int) -> list[tuple[int, dict[str, Any]]]:
    """The states of this rank's shards, each with the number of its group; those that have any."""
    inner = _inner(engine)
    if zero_stage == 3:
        flats, group_of = engine.optimizer.fp32_partitioned_groups_flat, engine.optimizer.sub_group_to_group_id
        shards = [(group_of[number], flat) for number, flat in enumerate(flats)]
    else:
        shards = [(number, group["params"][0]) for number, group in enumerate(inner.param_groups)]
    return [(number, inner.state[flat]) for number, flat in shards if inner.state.get(flat)]


def _inner(engine: Any) -> torch.optim.Optimizer:
    """The optimizer inside DeepSpeed's."""
    inner: torch.optim.Optimizer = engine.optimizer.optimizer
    return inner
