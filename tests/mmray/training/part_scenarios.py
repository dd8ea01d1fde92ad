"""What ranks do in the tests of parts and stages: each function runs on every rank of one process group."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmray.errors import UserError
from mmray.training.checkpoint import save_state
from mmray.training.engine import TrainingEngine
from tests.mmray.training import tiny
from tests.mmray.training.scenarios import Case

LAST_STEP = 6
STAGES = (
    {"steps": 2, "parts": {"vision": "frozen", "language": "frozen", "embeddings": "frozen"}},
    {"steps": 2, "parts": {"vision": "frozen", "projector": {"learning_rate": 1e-3, "weight_decay": 0.0}}},
)
"""The projector alone; then the language model and the embeddings with it; then all but the embeddings."""
STAGED: dict[str, Any] = {
    "steps": LAST_STEP,
    "warmup_steps": 1,
    "stages": STAGES,
    "parts": {"embeddings": "frozen", "model.visual.blocks.0.*": {"learning_rate": 1e-3}},
}
TRAINED = {  # by the first steps of stages
    0: ("model.visual.merger.",),
    2: ("model.visual.merger.", "model.language_model.layers.", "model.language_model.norm.", "embed_tokens."),
    4: ("model.visual.", "model.language_model.layers.", "model.language_model.norm."),
}
CASES: list[Case] = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
RESUMED_AT = {case: (1, 2, 3) if case in ((1, "fp32"), (3, "bf16")) else (2,) for case in CASES}
"""The steps from which three ranks go on, around the first border: one optimizer of DeepSpeed serves stages 1 and 2,
another stage 3, and at the border itself each case does."""
SAVED = (1, 2, 3, 4)
GATHERED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def staged(case: Case, grad_accumulation: int, resume_from: Path | None = None, **options: Any) -> TrainingEngine:
    """An engine of a training in three stages. In fp32 it recomputes activations, and gathers all weights at ZeRO-3."""
    stage, dtype = case
    extra = {"deepspeed": GATHERED} if stage == 3 and dtype == "fp32" else {}
    return TrainingEngine(
        tiny.model_settings(dtype=dtype, gradient_checkpointing=dtype == "fp32"),
        tiny.training_settings(zero_stage=stage, **(STAGED | extra | options)),
        total_steps=options.get("steps", LAST_STEP),
        grad_accumulation=grad_accumulation,
        resume_from=resume_from,
        scratch=None if resume_from is None else resume_from.parent / "scratch",
    )


def checkpoint_of(folder: Path, case: Case, step: int, world_size: int) -> Path:
    return folder / f"stage-{case[0]}-{case[1]}-step-{step}-of-{world_size}"


def train(engine: TrainingEngine, folder: Path, case: Case, last_step: int) -> list[dict[str, Any]]:
    """The metrics of each step, and what it did with the weights. SAVED steps are; stages follow one another."""
    history = []
    while engine.step_count < last_step:
        before = weights_of(engine)
        bins = tiny.global_batch(engine.step_count)
        metrics = dataclasses.asdict(
            engine.step(tiny.micro_batches(bins, engine.rank, engine.world_size, engine.grad_accumulation))
        )
        after = weights_of(engine)
        moved = [name for name, weight in after.items() if not torch.equal(weight, before[name])]
        history.append(metrics | {"moved": moved, "trained": [n for g in engine.groups for n in g.names]})
        history[-1]["updates"] = updates_by_name(engine)
        place = checkpoint_of(folder, case, engine.step_count, engine.world_size)
        if engine.step_count in SAVED:
            save_state(engine, place)
            engine.ranks.every(None)
        if engine.is_at_border:
            engine.enter_stage(place, scratch=folder / "scratch")
            same = all(torch.equal(weight, after[name]) for name, weight in weights_of(engine).items())
            history[-1]["kept"] = same
    return history


def weights_of(engine: TrainingEngine) -> dict[str, Tensor]:
    """All weights, whole, as they are computed with."""
    import deepspeed

    weights = {}
    for name, weight in engine.model.named_parameters():
        with deepspeed.zero.GatheredParameters([weight], enabled=engine.zero_stage == 3):
            weights[name] = weight.detach().clone()
    return weights


def updates_by_name(engine: TrainingEngine) -> dict[str, int]:
    """The number of updates that Adam has counted, by a part of each weight's name; {} where shards are not at hand."""
    if engine.zero_stage == 3 or engine.training_settings.optimizer != "adamw":
        return {}
    wrapper = engine.deepspeed.optimizer
    inner = getattr(wrapper, "optimizer", wrapper)
    counted = {}
    for group, flat in zip(engine.groups, inner.param_groups, strict=True):
        for name in group.names:
            counted[name.split(".")[2]] = int(inner.state[flat["params"][0]]["step"])
    return counted


def costs(engine: TrainingEngine) -> dict[str, Any]:
    """Which frozen weights have a gradient after a backward pass, and the numbers in the optimizer's states."""
    bins = tiny.global_batch(0)
    for batch in tiny.micro_batches(bins, engine.rank, engine.world_size, engine.grad_accumulation):
        engine._forward_backward(batch, 1.0, 0.0)
    with_gradient = [n for n, w in engine.model.named_parameters() if not w.requires_grad and w.grad is not None]
    engine.deepspeed.optimizer.zero_grad()
    engine.step(tiny.micro_batches(bins, engine.rank, engine.world_size, engine.grad_accumulation))
    wrapper = engine.deepspeed.optimizer
    inner = getattr(wrapper, "optimizer", wrapper)
    states = sum(v.numel() for state in inner.state.values() for v in state.values() if torch.is_tensor(v) and v.dim())
    sizes = {name: getattr(weight, "ds_numel", weight.numel()) for name, weight in engine.model.named_parameters()}
    trained = sum(sizes[name] for group in engine.groups for name in group.names)
    return {"with gradient": with_gradient, "states": states, "trained": trained, "all": sum(sizes.values())}


def two_ranks(rank: int, world_size: int, folder: Path) -> dict[Any, Any]:
    """All six steps of every case."""
    results: dict[Any, Any] = {}
    for case in CASES:
        engine = staged(case, 2)
        results[case] = train(engine, folder, case, LAST_STEP)
        engine.close()
    return results


def three_ranks(rank: int, world_size: int, folder: Path) -> dict[Any, Any]:
    """From what two ranks saved before, at and after the first border, to beyond the second."""
    results: dict[Any, Any] = {}
    for case in CASES:
        for step in RESUMED_AT[case]:
            engine = staged(case, 2, checkpoint_of(folder, case, step, 2))
            last = {1: 3, 2: 4, 3: 4}[step]
            results[case, step] = train(engine, folder / f"from-{step}", case, last)
            engine.close()
    return results


def one_rank(rank: int, world_size: int, folder: Path) -> dict[Any, Any]:
    """From what three ranks saved at the second border, the last stage; what is refused, and what frozen parts cost."""
    results: dict[Any, Any] = {}
    for case in CASES:
        engine = staged(case, 4, checkpoint_of(folder / "from-2", case, 4, 3))
        results[case] = train(engine, folder / "by-one", case, LAST_STEP)
        engine.close()
        engine = staged(case, 4, steps=6)
        results["costs", case] = costs(engine)
        engine.close()
    return results | {"longer": longer(folder)}


def longer(folder: Path) -> dict[str, Any]:
    """Losses of a run of eight steps by the wsd schedule: in one go, and from where a run of five begins to decay; and
    the message for a checkpoint of that decay. On one rank."""
    settings: dict[str, Any] = {"schedule": "wsd", "warmup_steps": 1, "decay_steps": 2, "stages": (), "parts": {}}

    def engine(steps: int, resume_from: Path | None = None) -> TrainingEngine:
        return staged((2, "fp32"), 2, resume_from, **settings, steps=steps)

    case = (2, "fp32")
    short = engine(5)
    train(short, folder / "short", case, 5)
    assert short.decays_from == 3
    short.close()
    whole = engine(8)
    losses = {"whole": [(s["loss"], s["learning_rate"]) for s in train(whole, folder / "long", case, 8)]}
    whole.close()
    resumed = engine(8, checkpoint_of(folder / "short", case, 3, 1))
    losses["resumed"] = [(s["loss"], s["learning_rate"]) for s in train(resumed, folder / "resumed", case, 8)]
    resumed.close()
    try:
        engine(8, checkpoint_of(folder / "short", case, 4, 1))
    except UserError as error:
        return losses | {"in decay": str(error)}
    return losses


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw_8bit": {"optimizer": "adamw_8bit"},
    "muon": {"optimizer": "muon", "muon_learning_rate": 0.01, "muon_momentum": 0.9, "max_grad_norm": None},
}
BY_OPTIMIZER: list[tuple[str, Case]] = [
    ("adamw_8bit", (0, "fp32")), ("adamw_8bit", (2, "fp32")), ("adamw_8bit", (1, "bf16")), ("adamw_8bit", (3, "fp32")),
    ("muon", (0, "fp32")), ("muon", (1, "fp32")), ("muon", (2, "fp32")), ("muon", (2, "bf16")),
]  # fmt: skip


def by_optimizer(name: str, case: Case, grad_accumulation: int, resume_from: Path | None = None) -> TrainingEngine:
    """An engine with an optimizer, the vision tower frozen."""
    options = OPTIMIZERS[name] | {"stages": (), "parts": {"vision": "frozen"}, "learning_rate": 1e-3}
    return staged(case, grad_accumulation, resume_from, **options)


def optimizers(rank: int, world_size: int, folder: Path) -> dict[Any, Any]:
    """Four steps of each optimizer, and the last two again from a checkpoint; two ranks."""
    results: dict[Any, Any] = {}
    for name, case in BY_OPTIMIZER:
        engine = by_optimizer(name, case, 2)
        results[name, case] = train(engine, folder / name, case, 4)
        engine.close()
        engine = by_optimizer(name, case, 2, checkpoint_of(folder / name, case, 2, 2))
        results["resumed", name, case] = train(engine, folder / f"{name}-again", case, 4)
        engine.close()
    return results


def optimizers_alone(rank: int, world_size: int, folder: Path) -> dict[Any, Any]:
    """What one rank makes of the checkpoints of two: losses, or the message."""
    results: dict[Any, Any] = {}
    for name, case in BY_OPTIMIZER:
        try:
            engine = by_optimizer(name, case, 4, checkpoint_of(folder / name, case, 2, 2))
        except UserError as error:
            results[name, case] = str(error)
            continue
        results[name, case] = train(engine, folder / f"{name}-alone", case, 4)
        engine.close()
    try:
        staged((0, "fp32"), 4, checkpoint_of(folder / "muon", (0, "fp32"), 2, 2), stages=(), parts={"vision": "frozen"})
    except UserError as error:
        results["another"] = str(error)
    return results
