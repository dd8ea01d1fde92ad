"""Checkpoints that resume exactly, and with another number of ranks.

A checkpoint is one folder, the union of what its ranks wrote; no two ranks write the same file, so every rank
may write into a local folder of its own that is merged later:

    training_state.json          step, ranks, ZeRO stage, dtype        rank 0
    model.json                   settings of the model, of training    rank 0
    adapter.json                 the adapter and its base, if any      rank 0
    cursor.json, prepared.json   the place in which data               rank 0
    rng/rank-00000.pt            states of the random generators       each rank
    deepspeed/                   weights and optimizer state           each rank its shard
    groups.json                  groups of the optimizer, with parts   rank 0
    files/rank-00000.json        its files, with their checksums       each rank, last

With the same number of ranks DeepSpeed reads its shards back and the losses that follow are the same. Its
shards are cut for one number of ranks and the groups of one optimizer; for others they are first converted
(`conversion.py`, `regroup.py`). Stage 0 in fp32 has no shards and needs no conversion.
"""

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from mmray.base.version import __version__
from mmray.base.words import counted, one_line
from mmray.errors import UserError
from mmray.training.adapter import NEW_RUN, Adapter, check_adapter
from mmray.training.conversion import SHARDS, converted
from mmray.training.deepspeed_config import effective_zero_stage
from mmray.training.optim import decays_from
from mmray.training.optimizers import UNCONVERTED, momentum
from mmray.training.ranks import Ranks
from mmray.training.regroup import (
    GROUPS_FILE,
    SavedGroup,
    check_same_trained,
    complete_universal,
    read_groups,
    restore_states,
    restore_untrained,
    set_updates,
    updates_of,
    write_groups,
)
from mmray.training.saved_weights import SavedWeights
from mmray.training.settings import ModelSettings, TrainingSettings
from mmray.training.treatments import Stage, WeightGroup, stage_at, usual_groups, weight_groups

STATE_FILE = "training_state.json"
MODEL_FILE = "model.json"


class Engine(Protocol):
    """The parts of an engine that a checkpoint saves and restores."""

    deepspeed: Any
    """DeepSpeed's engine, with model and optimizer."""
    rank: int
    world_size: int
    ranks: Ranks
    zero_stage: int
    model_settings: ModelSettings
    training_settings: TrainingSettings
    stages: list[Stage]
    """The stages of the training."""
    stage: Stage
    """The stage of the next step."""
    groups: list[WeightGroup]
    """The groups of the optimizer."""
    step_count: int
    """Number of optimizer steps done."""
    router_loss: float | None
    """Factor of the balancing loss of a mixture of experts; None for none."""
    adapter: Adapter | None
    """The adapter that is trained; None where the model's own weights are."""


@dataclass(frozen=True)
class SavedState:
    """The record in a checkpoint of its training."""

    step: int
    """Number of optimizer steps done."""
    world_size: int
    """Number of ranks that wrote the checkpoint."""
    zero_stage: int
    """ZeRO stage that ran."""
    dtype: str
    """Data type of the training, "bf16" or "fp32"."""
    lists: int
    """Number of lists of files (`checksums.py`) that belong to the checkpoint."""
    router_loss: float | None = None
    """Factor of the balancing loss; None for none, as in all checkpoints of earlier versions."""
    optimizer: str | None = None
    """`training.optimizer`; None for adamw, as in all checkpoints of earlier versions."""
    decays_from: int | None = None
    """With the wsd schedule: number of steps that are done before its decay begins."""


@dataclass(frozen=True)
class ResumeSource:
    """A checkpoint in the form that the present number of ranks can load."""

    folder: Path
    """The checkpoint."""
    state: SavedState
    shards_parent: Path
    """Folder that holds `deepspeed/` in the form to load: the checkpoint or its conversion."""
    universal: bool
    """True if the shards were converted."""
    groups: list[SavedGroup]
    """The groups of the optimizer that wrote it."""
    is_regrouped: bool
    """True if the optimizer has other groups now."""


def save_state(engine: Engine, folder: Path) -> None:
    """Writes this rank's part of a checkpoint into `folder`, which all ranks may share or not. Collective.

    It is complete only when every rank has returned and the folders are merged: commit it after that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    leaves_out = _base_is_in_files(engine)
    with _frozen_left_out(engine.deepspeed.module) if leaves_out else nullcontext():
        engine.deepspeed.save_checkpoint(
            str(folder), tag=SHARDS, save_latest=False, exclude_frozen_parameters=leaves_out
        )
    (folder / "rng").mkdir(exist_ok=True)
    torch.save(_rng_state(), _rng_file(folder, engine.rank))
    if engine.rank == 0:
        state = SavedState(
            step=engine.step_count,
            world_size=engine.world_size,
            zero_stage=engine.zero_stage,
            dtype=engine.model_settings.dtype,
            lists=engine.world_size,
            router_loss=engine.router_loss,
            optimizer=None if (name := engine.training_settings.optimizer) == "adamw" else name,
            decays_from=decays_from(engine.stage, engine.training_settings),
        )
        written = {name: value for name, value in asdict(state).items() if value is not None}
        (folder / STATE_FILE).write_text(json.dumps(written, indent=2) + "\n")
        if engine.adapter is not None:
            engine.adapter.write(folder)
        settings = {"model": engine.model_settings, "training": engine.training_settings}
        content = {name: value.model_dump(mode="json") for name, value in settings.items()}
        (folder / MODEL_FILE).write_text(json.dumps({"mmray": __version__, **content}, indent=1) + "\n")
        if engine.training_settings.parts or engine.training_settings.stages:
            updates = updates_of(engine.deepspeed, engine.zero_stage, len(engine.groups))
            write_groups(folder, engine.groups, updates)


def read_state(folder: Path) -> SavedState:
    """The record of its training in the checkpoint in `folder`. Raises UserError where the folder is no checkpoint."""
    try:
        return SavedState(**json.loads((folder / STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} holds no readable checkpoint: {error}") from error


def read_settings(folder: Path) -> tuple[ModelSettings, TrainingSettings] | None:
    """The settings with which the checkpoint in `folder` was trained.

    None for a checkpoint that was written before checkpoints held them. Raises UserError where they cannot be read.
    """
    path = folder / MODEL_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        return ModelSettings(**content["model"]), TrainingSettings(**content["training"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}; it was written by another mmray") from error


def check_resume(
    folder: Path,
    state: SavedState,
    model: PreTrainedModel,
    settings: tuple[ModelSettings, TrainingSettings],
    stages: Sequence[Stage],
) -> None:
    """Raises UserError, with what differs, where a checkpoint belongs to another training than the settings'.

    model: the model of the settings, also one without weights. stages: those of the training.
    """
    model_settings, training = settings
    saved = (state.zero_stage, state.dtype)
    wanted = (effective_zero_stage(model_settings, training), model_settings.dtype)
    if saved != wanted:
        raise UserError(
            f"{folder} was written with ZeRO stage {saved[0]} and {saved[1]}, this run has stage "
            f"{wanted[0]} and {wanted[1]}; set training.zero_stage and model.dtype back, or begin a new run "
            f"(output.run) {NEW_RUN}"
        )
    optimizer = state.optimizer or "adamw"
    if optimizer != training.optimizer:
        raise UserError(
            f"{folder} was written by optimizer {optimizer}, and this run has {training.optimizer}, which cannot use "
            f"its states; set training.optimizer back, or begin a new run (output.run) {NEW_RUN}"
        )
    done = stage_at(stages, state.step - 1)
    groups = weight_groups(model, training, stages, done)
    check_same_trained(folder, state.step, _saved_groups(folder, model, training), groups, done.place)
    falls_from = state.decays_from
    if falls_from is not None and falls_from < state.step and falls_from != decays_from(done, training):
        raise UserError(
            f"{folder} lies in the decay of the learning rate, which began after step {falls_from}: the rate would "
            "jump back to its peak. A longer run continues a checkpoint from before the decay: move those after step "
            f"{falls_from} out of the run's folder"
        )


def _saved_groups(folder: Path, model: PreTrainedModel, training: TrainingSettings) -> list[SavedGroup]:
    """The groups of the optimizer in a checkpoint; the usual ones where it does not tell."""
    groups = read_groups(folder)
    if groups is None:
        return [SavedGroup(group.names, 0, 0) for group in usual_groups(model, training)]
    return groups


@contextmanager
def prepared(
    source: ResumeSource | None, engine: Engine, scratch: Path | None, node: str
) -> Iterator[ResumeSource | None]:
    """The checkpoint in the form that the engine's ranks and groups can load, converted where needed; None without one.
    Collective.

    DeepSpeed must know the form before its engine is built, so this comes first; the conversion lives until the block
    ends on every rank.
    """
    if source is None or not source.universal:
        yield source
        return
    state, optimizer = source.state, engine.training_settings.optimizer
    writers, why = counted(state.world_size, "worker"), f"has {counted(engine.world_size, 'worker')}"
    if state.world_size == engine.world_size:
        why = "has other groups of weights, by training.parts or stages"
    if optimizer in UNCONVERTED:
        raise UserError(
            f"{source.folder} was written by {writers}, and this run {why}; that cannot be with optimizer {optimizer} "
            f"under ZeRO {state.zero_stage}: {UNCONVERTED[optimizer]}. Set them back"
        )
    if scratch is None:
        raise UserError(
            f"{source.folder} was written by {writers}; to resume with {engine.world_size}, give a folder to "
            "convert it in"
        )

    def complete(folder: Path) -> None:
        if source.is_regrouped:
            complete_universal(folder, _weights(engine, source), source.groups, engine.groups)

    with converted(source.folder, state.world_size, scratch, node, engine.ranks, complete) as shards_parent:
        yield replace(source, shards_parent=shards_parent)


def resume_source(folder: Path, state: SavedState, engine: Engine, model: PreTrainedModel) -> ResumeSource:
    """The checkpoint that an engine with this model resumes from, not converted yet.

    Raises UserError where it is incomplete, or belongs to another training.
    """
    if not (folder / SHARDS).is_dir():
        raise UserError(f"{folder} is an incomplete checkpoint: it holds no {SHARDS} folder")
    training = engine.training_settings
    check_adapter(folder, engine.adapter)
    if engine.adapter is not None:
        engine.adapter.check_base(folder)
    check_resume(folder, state, model, (engine.model_settings, training), engine.stages)
    groups = _saved_groups(folder, model, training)
    is_regrouped = [group.names for group in groups] != [group.names for group in engine.groups]
    universal = state.zero_stage > 0 and (is_regrouped or state.world_size != engine.world_size)
    return ResumeSource(folder, state, folder, universal, groups, is_regrouped)


def _weights(engine: Engine, source: ResumeSource) -> SavedWeights:
    return SavedWeights(source.folder / SHARDS, zero_stage=engine.zero_stage, masters=False)


@contextmanager
def _frozen_left_out(model: torch.nn.Module) -> Iterator[None]:
    """Leaves frozen weights out of the model's state inside the block, by all names of tied ones: DeepSpeed knows the
    first name alone."""

    def leave_out(_: torch.nn.Module, state: dict[str, Any], prefix: str, __: dict[str, Any]) -> None:
        for name, weight in model.named_parameters(remove_duplicate=False):
            if not weight.requires_grad:
                state.pop(prefix + name, None)

    handle = model.register_state_dict_post_hook(leave_out)
    try:
        yield
    finally:
        handle.remove()


def _base_is_in_files(engine: Engine) -> bool:
    """True if the frozen weights of an adapter's base lie in files, so that checkpoints leave them out."""
    return engine.adapter is not None and engine.adapter.base is not None


def load_state(engine: Engine, source: ResumeSource) -> None:
    """Restores weights, optimizer state, step and RNG into a new engine. Collective.

    RNG states belong to a rank: with another number of ranks they are seeded anew from seed, step and rank.
    """
    with tempfile.TemporaryDirectory(prefix="mmray-load-") as plain, _other_model_told(source.folder, engine):
        # DeepSpeed takes the path for a glob pattern: hand it one without special characters.
        (Path(plain) / SHARDS).symlink_to((source.shards_parent / SHARDS).resolve())
        by_number = engine.zero_stage > 0 or not source.is_regrouped
        engine.deepspeed.load_checkpoint(
            plain, tag=SHARDS, load_optimizer_states=by_number, load_lr_scheduler_states=False,
            load_module_strict=not _base_is_in_files(engine),
        )  # fmt: skip
    if source.universal:
        restore_untrained(engine.deepspeed.module, engine.groups, _weights(engine, source), engine.zero_stage)
    elif source.is_regrouped:
        restore_states(engine.deepspeed, _weights(engine, source), source.groups)
    _restore_own_settings(engine)
    if source.universal and (source.folder / GROUPS_FILE).exists():
        set_updates(engine.deepspeed, engine.zero_stage, engine.groups, source.groups)
    engine.step_count = source.state.step
    rng_file = _rng_file(source.folder, engine.rank)
    if source.state.world_size == engine.world_size:
        _set_rng_state(torch.load(rng_file, weights_only=True))
    else:
        seed_rng(engine.training_settings.seed, engine.rank, source.state.step)


@contextmanager
def _other_model_told(folder: Path, engine: Engine) -> Iterator[None]:
    """Raises an error of loading as a UserError where the checkpoint was trained with another model than the job's."""
    try:
        yield
    except Exception as error:  # DeepSpeed's loaders fail in many ways
        saved = read_settings(folder)
        if saved is None:
            raise
        now = engine.model_settings
        changed = [name for name in ("path", "config") if getattr(saved[0], name) != getattr(now, name)]
        if not changed:
            raise
        raise UserError(
            f"{folder} was trained with another model.{' and model.'.join(changed)}, and its weights do not fit this "
            f"one: {one_line(error):.300}; set it back, or begin a new run (output.run)"
        ) from error


def _restore_own_settings(engine: Engine) -> None:
    """Restores the present settings, which DeepSpeed overwrites from a checkpoint, and corrects one mistake of its
    loader.

    Optimizer groups come back with the hyperparameters they were saved with (from a universal checkpoint of stage 3 all
    with those of the first group) and so does the clipping norm. That loader also gives all groups one step counter,
    which each of them would then advance: without the copies the second step after such a load was off by 5e-6 in the
    loss and 2e-3 in the gradient norm.
    """
    settings = engine.training_settings
    optimizer = engine.deepspeed.optimizer
    for group, weights in zip(optimizer.param_groups, engine.groups, strict=True):
        group.update(weight_decay=weights.weight_decay)
        if weights.by_muon:
            group.update(momentum=momentum(settings))
        else:
            group.update(betas=tuple(settings.betas), eps=settings.eps)
    if engine.zero_stage > 0:
        optimizer.clip_grad = settings.max_grad_norm or 0.0
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def seed_rng(seed: int, rank: int, step: int = 0) -> None:
    """Seeds python, numpy and torch of this rank; ranks and steps get unrelated streams."""
    word = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    random.seed(word)
    np.random.seed(word)  # noqa: NPY002  the global generator is what other libraries draw from
    torch.manual_seed(word)


@contextmanager
def rng_kept() -> Iterator[None]:
    """Puts the random generators of this process back, after the block, as they were before it."""
    before = _rng_state()
    try:
        yield
    finally:
        _set_rng_state(before)


def _rng_file(folder: Path, rank: int) -> Path:
    return folder / "rng" / f"rank-{rank:05d}.pt"


def _rng_state() -> dict[str, Any]:
    """The RNG states as tensors, numbers and tuples only, so that they load without unpickling code."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
