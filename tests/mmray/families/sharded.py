"""What ranks do in the tests of sharded models: each function runs on every rank of one process group."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmray.batches.micro_batch import MicroBatch
from mmray.families import family_of, load_processor, model_parts
from mmray.training.deepspeed_config import import_deepspeed
from mmray.training.engine import TrainingEngine
from mmray.training.model import build_model
from mmray.training.settings import ModelSettings, TrainingSettings
from tests.mmray.families.layouts import CPU, PICTURES, micro_batch
from tests.mmray.families.zoo import ZOO

EVERY_RANK_GATHERS = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
STEPS = 4
RATE = 1e-3
CLEAR = 1e-6
"""Gradients above it are a hundred times Adam's eps."""
PICTURES_OF_RANKS = (5, 1, 0)
PARTS = ("vision", "projector", "language", "embeddings")


def loaded(rank: int, world_size: int, folders: dict[str, Path]) -> dict[str, str]:
    """By member: how the weights that were loaded from its folder for ZeRO-3, gathered, differ from those loaded whole,
    and these from what was saved; "" where they do not."""
    deepspeed = import_deepspeed()
    os.environ["LOCAL_RANK"] = "0"
    deepspeed.init_distributed()
    config = EVERY_RANK_GATHERS | {"train_batch_size": world_size, "train_micro_batch_size_per_gpu": 1}
    return {name: _difference(deepspeed, name, folder, config) for name, folder in folders.items()}


def _difference(deepspeed: Any, name: str, folder: Path, config: dict[str, Any]) -> str:
    settings = ModelSettings(path=str(folder / "model"), dtype="fp32", attention=ZOO[name].attentions[0], seed=11)
    saved = torch.load(folder / "saved.pt", weights_only=True)
    whole = dict(build_model(settings).named_parameters())
    if whole.keys() != saved.keys():
        return f"other names: {sorted(whole.keys() ^ saved.keys())}"
    if wrong := [name for name, weight in whole.items() if not torch.equal(weight.data, saved[name])]:
        return f"loaded whole: {wrong}"
    try:
        sharded = build_model(settings, zero3_config=config)
    except Exception as error:  # noqa: BLE001 (what each member does is told)
        return f"{type(error).__name__}: {error}"
    wrong = []
    for parameter_name, parameter in sharded.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if not torch.equal(parameter.data, saved[parameter_name]):
                wrong.append(parameter_name)
    return f"loaded in shards: {wrong}" if wrong else ""


def trained(rank: int, world_size: int, name: str, folder: Path, stage: int) -> dict[str, list[dict[str, float]]]:
    """Steps of a global batch of three micro-batches with 5, 1 and no pictures: each a rank's, or all one rank's; of
    all weights, and with those frozen in which such ranks would wait for each other."""
    frozen = {"language": "frozen"} if name == "qwen3_vl_moe" else {"vision": "frozen", "projector": "frozen"}
    return {
        "all": _trained(rank, world_size, name, folder, stage, {}),
        "frozen": _trained(rank, world_size, name, folder, stage, frozen),
    }


def _trained(
    rank: int, world_size: int, name: str, folder: Path, stage: int, parts: dict[str, Any]
) -> list[dict[str, float]]:
    member = ZOO[name]
    config = member.config(folder).to_dict()
    engine = TrainingEngine(
        ModelSettings(config=config, dtype="fp32", attention="packed", gradient_checkpointing=True, seed=5),
        TrainingSettings(
            steps=STEPS,
            global_batch_bins=3,
            learning_rate=1e-3,
            zero_stage=stage,
            deepspeed=EVERY_RANK_GATHERS,
            parts=parts,
        ),
        total_steps=STEPS,
        grad_accumulation=3 // world_size,
    )
    family = family_of(load_processor(folder), model_type=member.model_type)
    batches = [micro_batch(family, PICTURES[:number] or None) for number in PICTURES_OF_RANKS]
    try:
        return [asdict(engine.step(batches[rank::world_size])) for _ in range(STEPS)]
    finally:
        engine.close()


def stepped(rank: int, world_size: int, folders: dict[str, Path]) -> dict[str, str]:
    """By member: what is wrong with an engine of ZeRO-2 on the weights of its folder and one step of it; "" if
    nothing."""
    return {name: _step_problem(name, folder, 2, {}) for name, folder in folders.items()}


def stepped_frozen(rank: int, world_size: int, folders: dict[str, Path]) -> dict[str, str]:
    """By member: what is wrong with a step under ZeRO-3 with one part frozen, and of one under another stage with
    another part, both with activations recomputed. Stages and parts go round, so that every pair of them is there."""
    problems = {}
    for number, (name, folder) in enumerate(folders.items()):
        cases = ((3, PARTS[number % 4]), (number % 3, PARTS[(number + 1) % 4]))
        found = [(stage, part, _step_problem(name, folder, stage, {part: "frozen"})) for stage, part in cases]
        problems[name] = "; ".join(f"ZeRO {stage}, {part} frozen: {what}" for stage, part, what in found if what)
    return problems


def _step_problem(name: str, folder: Path, stage: int, parts: dict[str, Any]) -> str:
    """The first step of Adam moves each number of a weight by the learning rate against the sign of its gradient, which
    transformers' own loss gives here; nothing moves a frozen weight."""
    member = ZOO[name]
    settings = ModelSettings(
        path=str(folder / "model"), dtype="fp32", attention=member.attentions[0], seed=11,
        gradient_checkpointing=bool(parts),
    )  # fmt: skip
    training = TrainingSettings(
        steps=1, global_batch_bins=1, learning_rate=RATE, schedule="constant", max_grad_norm=None, router_loss=None,
        zero_stage=stage, parts=parts, deepspeed=EVERY_RANK_GATHERS if stage == 3 else None,
    )  # fmt: skip
    try:
        saved = torch.load(folder / "saved.pt", weights_only=True)
        family = family_of(load_processor(folder), model_type=member.model_type)
        batch = micro_batch(family, PICTURES[:1])
        gradients = _gradients(settings, batch, parts)
        engine = TrainingEngine(settings, training, total_steps=1, grad_accumulation=1)
    except Exception as error:  # noqa: BLE001 (what each member does is told)
        return f"{type(error).__name__}: {error}"
    try:
        before = _whole(engine)
        if wrong := [key for key, weight in before.items() if not torch.equal(weight, saved[key])]:
            return f"loaded: {wrong}"
        result, weights = engine.step([batch]), _whole(engine)
        wrong = [key for key, weight in weights.items() if not _moved(saved[key], weight, gradients[key])]
        moved = sum(not torch.equal(weight, saved[key]) for key, weight in weights.items())
        if wrong or not moved or result.trained_tokens == 0:
            return f"stepped: {result}, {moved} of {len(saved)} weights moved, not as their gradients say: {wrong}"
        return ""
    finally:
        engine.close()


def _whole(engine: TrainingEngine) -> dict[str, Tensor]:
    """Copies of all weights, gathered where they are sharded."""
    named = dict(engine.model.named_parameters())
    with import_deepspeed().zero.GatheredParameters(list(named.values()), enabled=engine.zero_stage == 3):
        return {name: weight.detach().clone() for name, weight in named.items()}


def _gradients(settings: ModelSettings, batch: MicroBatch, parts: dict[str, Any]) -> dict[str, Tensor]:
    """The gradient of each weight by the mean loss of a batch, as large as all logits make it; 0 of frozen parts."""
    model = build_model(settings)
    logits = model(**batch.model_inputs(CPU, torch.float32, model.config), use_cache=False).logits[0, :-1]
    F.cross_entropy(logits, batch.labels[0, 1:]).backward()
    held = model_parts(model).parameters(model)
    frozen = {name for part in parts for name in held[part]}
    return {
        name: torch.zeros(()) if weight.grad is None or name in frozen else weight.grad
        for name, weight in model.named_parameters()
    }


def _moved(before: Tensor, after: Tensor, gradient: Tensor) -> bool:
    """Whether a weight moved as its gradient says; not at all without one. What is near rounding errors says
    nothing."""
    if not gradient.any():
        return torch.equal(before, after)
    clear = gradient.abs() > max(CLEAR, 1e-3 * gradient.abs().max().item())
    expected = -RATE * gradient.sign()
    return torch.allclose((after - before)[clear], expected[clear], rtol=0.02, atol=0)
