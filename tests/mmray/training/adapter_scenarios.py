"""What the ranks do in the tests of adapters: each function runs on every rank of one process group."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch

from mmray.errors import UserError
from mmray.training.checkpoint import save_state
from mmray.training.engine import TrainingEngine
from tests.mmray.training import scenarios, tiny
from tests.mmray.training.scenarios import LAST_STEP, NO_PERSISTENCE, SAVED_AT, train


@dataclass(frozen=True)
class AdapterCase:
    """A training with an adapter. Checkpointing recomputes activations at stage 3, where that has failed before."""

    stage: int
    dtype: str
    kind: str
    quantize: str | None = None
    in_files: bool = True
    dropout: float = 0.0
    rate: float | None = None
    """Learning rate of the projector, by `training.parts`."""

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in vars(self).values())

    def adapter(self, **changes: Any) -> dict[str, Any]:
        settings = {
            "kind": self.kind, "rank": 4, "alpha": 8, "dropout": self.dropout, "parts": ["language", "vision"],
            "save_whole": ["projector"],
        }  # fmt: skip
        return settings | changes

    def engine(self, folder: Path, accumulation: int, *, model: Any = None, **options: Any) -> TrainingEngine:
        base = {"path": str(folder / "model"), "config": None} if self.in_files else {}
        switches = {"quantize": self.quantize, "gradient_checkpointing": self.stage == 3}
        options.setdefault("adapter", self.adapter())
        if self.rate is not None:
            options.setdefault("parts", {"projector": {"learning_rate": self.rate, "weight_decay": 0.0}})
        if self.stage == 3:
            options["deepspeed"] = NO_PERSISTENCE
        return scenarios.build((self.stage, self.dtype), accumulation, model=base | switches | (model or {}), **options)


EQUAL = [
    AdapterCase(1, "fp32", "lora"),
    AdapterCase(1, "bf16", "dora"),
    AdapterCase(2, "fp32", "dora", rate=1e-3),
    AdapterCase(2, "bf16", "lora"),
    AdapterCase(3, "fp32", "lora"),
    AdapterCase(3, "bf16", "dora", rate=1e-3),
    AdapterCase(2, "bf16", "lora", quantize="nf4"),
    AdapterCase(2, "fp32", "lora", in_files=False),
]
"""Cases that give equal losses with any number of ranks."""
DROPPING = AdapterCase(2, "fp32", "lora", dropout=0.2)
"""Each rank draws numbers of its own, so its losses are equal with the same number alone."""


def weights_of(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    """All weights that are no codes, whole."""
    named = {name: weight for name, weight in engine.model.named_parameters() if weight.dtype != torch.uint8}
    with deepspeed.zero.GatheredParameters(list(named.values()), enabled=engine.zero_stage == 3):
        return {name: weight.detach().clone() for name, weight in named.items()}


def first_loss(engine: TrainingEngine) -> float:
    bins = tiny.global_batch(0)
    mine = tiny.micro_batches(bins, engine.rank, engine.world_size, engine.grad_accumulation)
    return engine.evaluate([mine]).mean_loss


def two_ranks(rank: int, world_size: int, folder: Path) -> dict[Any, Any]:
    """Six steps of every case in one go, saved in the middle, with the weights before and after."""
    results: dict[Any, Any] = {}
    for case in [*EQUAL, DROPPING]:
        engine = case.engine(folder, 2)
        before = weights_of(engine)
        results["first", case] = first_loss(engine)
        history = train(engine, SAVED_AT)
        save_state(engine, folder / case.name / f"of-rank-{rank}")
        results[case] = history + train(engine, LAST_STEP)
        after = weights_of(engine)
        trained = {name for name, weight in engine.model.named_parameters() if weight.requires_grad}
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        states = sum(value.numel() for state in engine.deepspeed.optimizer.state.values()
                     for name, value in state.items() if name == "exp_avg")  # fmt: skip
        sizes = sum(weight.numel() for name, weight in after.items() if name in trained)
        results["weights", case] = (trained, moved, states, sizes)
        engine.close()
    for case in (EQUAL[0], EQUAL[4]):
        engine = case.engine(folder, 2, adapter=None)
        results["base", case] = first_loss(engine)
        if case is EQUAL[0]:
            save_state(engine, folder / "plain" / f"of-rank-{rank}")
        engine.close()
    return results


def resumed(rank: int, world_size: int, folder: Path) -> dict[Any, Any]:
    """Steps 4 to 6 of every case from its checkpoint, on as many ranks."""
    results: dict[Any, Any] = {}
    for case in [*EQUAL, DROPPING]:
        engine = case.engine(folder, 2, resume_from=folder / case.name)
        results[case] = train(engine, LAST_STEP)
        engine.close()
    return results


def three_ranks(rank: int, world_size: int, folder: Path) -> dict[Any, Any]:
    """Step 4 from what two ranks saved, and a save."""
    results: dict[Any, Any] = {}
    for case in EQUAL:
        engine = case.engine(folder, 2, resume_from=folder / case.name, scratch=folder / "scratch")
        results[case] = train(engine, SAVED_AT + 1)
        save_state(engine, folder / "of-three" / case.name)
        engine.close()
    return results


def one_rank(rank: int, world_size: int, folder: Path) -> dict[Any, Any]:
    """Steps 5 and 6 from what three ranks saved; what other adapters and other bases are told."""
    results: dict[Any, Any] = {}
    for case in EQUAL:
        engine = case.engine(folder, 4, resume_from=folder / "of-three" / case.name, scratch=folder / "scratch")
        results[case] = train(engine, LAST_STEP)
        engine.close()
    case, plain = EQUAL[0], folder / "plain"
    narrower = tiny.TINY_QWEN2_VL | {"text_config": tiny.TINY_QWEN2_VL["text_config"] | {"intermediate_size": 48}}
    saved = {"resume_from": folder / "of-three" / case.name}
    results["refusals"] = {
        "rank": refusal(case, folder, adapter=case.adapter(rank=8), **saved),
        "parts": refusal(case, folder, adapter=case.adapter(parts=["language"]), **saved),
        "no adapter": refusal(case, folder, adapter=None, **saved),
        "no adapter before": refusal(case, folder, resume_from=plain, scratch=folder / "scratch"),
        "other model": refusal(
            case,
            folder,
            adapter=None,
            model={"path": None, "config": narrower},
            resume_from=plain,
            scratch=folder / "scratch",
        ),
        "other base": refusal(case, folder, model={"path": str(folder / "other")}, **saved),
        "random base": refusal(case, folder, model={"path": None, "config": tiny.TINY_QWEN2_VL}, **saved),
    }
    dropping = case.engine(folder, 4, adapter=case.adapter(dropout=0.5), scratch=folder / "scratch", **saved)
    results["other dropout"] = dropping.step_count
    dropping.close()
    return results


def refusal(case: AdapterCase, folder: Path, **options: Any) -> str:
    """The message with which an engine is not built."""
    try:
        case.engine(folder, 4, **options)
    except UserError as error:
        return str(error)
    return "no error"
