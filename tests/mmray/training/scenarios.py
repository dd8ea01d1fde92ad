"""What the ranks do in the tests of the engine: each function runs on every rank of one process group."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmray.errors import UserError
from mmray.training import engine as engine_module
from mmray.training import head_loss
from mmray.training.checkpoint import save_state
from mmray.training.engine import TrainingEngine
from mmray.training.model import build_model
from tests.mmray.training import tiny

Case = tuple[int, str]  # ZeRO stage, dtype

EXACT: list[Case] = [(0, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (3, "bf16")]
"""DeepSpeed's optimizers of stages 1 and 2 are one; the other two cases go through stages in part_scenarios.py."""
TWO_NODES: Case = (2, "fp32")
SAVED_AT, LAST_STEP = 3, 6

# Every parameter is gathered and released, also in a model as small as this one.
NO_PERSISTENCE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def build(case: Case, grad_accumulation: int, *, model: dict[str, Any] | None = None, **options) -> TrainingEngine:
    """An engine for 6 steps. options: of TrainingEngine (resume_from, scratch, node) and of TrainingSettings."""
    resume = {name: options.pop(name) for name in ("resume_from", "scratch", "node") if name in options}
    stage, dtype = case
    return TrainingEngine(
        tiny.model_settings(**({"dtype": dtype} | (model or {}))),
        tiny.training_settings(zero_stage=stage, **options),
        total_steps=LAST_STEP,
        grad_accumulation=grad_accumulation,
        **resume,
    )


def train(engine: TrainingEngine, last_step: int) -> list[dict[str, float]]:
    """Metrics of each step, and what this rank's random generators gave after it."""
    history = []
    while engine.step_count < last_step:
        bins = tiny.global_batch(engine.step_count)
        mine = tiny.micro_batches(bins, engine.rank, engine.world_size, engine.grad_accumulation)
        metrics = dataclasses.asdict(engine.step(mine))
        numpy_draw = np.random.rand()  # noqa: NPY002  the global generator is what is restored
        draws = {"python": random.random(), "numpy": numpy_draw, "torch": torch.rand(1).item()}
        history.append(metrics | draws)
    return history


def two_ranks(rank: int, world_size: int, folder: Path) -> dict[Any, Any]:
    """Six steps in one go for every case, saved in the middle; and weights from files, sharded by ZeRO-3."""
    results: dict[Any, Any] = {}
    for case in EXACT:
        engine = build(case, 2)
        history = train(engine, SAVED_AT)
        save_state(engine, folder / checkpoint_name(case) / f"of-rank-{rank}")
        results[case] = history + train(engine, LAST_STEP)
        results["nothing trained", case] = nothing_trained(engine)
        engine.close()
    engine = build((1, "fp32"), 2)
    results["stage 1"] = train(engine, 2)
    engine.close()
    pretrained = {"path": str(folder / "model"), "config": None, "gradient_checkpointing": True}
    engine = build((3, "fp32"), 2, model=pretrained, deepspeed=NO_PERSISTENCE)
    results["gathered"] = train(engine, SAVED_AT)
    results["text alone"] = text_alone(engine)
    engine.close()
    for stage in (0, 1, 2, 3):
        results["uneven", stage] = uneven(stage)
    results["uneven, adapted", 2], results["uneven, adapted", 3] = uneven(2, adapted=True), uneven(3, adapted=True)
    results["smoothed"] = smoothed(2)
    results["not finite"] = not_finite()
    results["broken files"] = not_finite(path=str(folder / "broken"), config=None)
    return results


def text_alone(engine: TrainingEngine) -> tuple[float, float]:
    """Losses of a step and of an evaluation in which rank 1 has no image but its dummy."""
    generator = torch.Generator().manual_seed(5)
    if engine.rank == 0:
        samples = (tiny.make_sample(generator, before=2, grid=(8, 8), after=20, trained=19),)
    else:
        text = tiny.make_sample(generator, before=0, grid=None, after=30, trained=20)
        samples = (text, tiny.dummy_image(generator))
    batch = [tiny.TinyBin(samples)] * 2
    evaluated = engine.evaluate([batch, batch])
    assert evaluated.trained_tokens == 4 * (19 + 20)
    return engine.step(batch).loss, evaluated.mean_loss


def uneven(stage: int, *, adapted: bool = False) -> list[list[tuple[float, float, float]]]:
    """Loss, gradient norm and evaluation of two steps in which rank 1 has far fewer trained tokens and in one
    micro-batch none: with all tokens of a row at once, and with a few at a time. adapted: the head has an adapter."""
    generator = torch.Generator().manual_seed(5)
    page = tiny.TinyBin((tiny.make_sample(generator, before=2, grid=(8, 8), after=40, trained=39),))
    short = tiny.TinyBin((tiny.make_sample(generator, before=2, grid=(8, 8), after=6, trained=3),))
    build_model, sizes = engine_module.build_model, (head_loss.HEAD_BYTES, head_loss.LOSS_BYTES["cpu"])
    if adapted:
        engine_module.build_model = with_adapter
    try:
        results = []
        for chunks in (sizes, (4 * 7 * 160, 4 * 3 * 160)):
            head_loss.HEAD_BYTES, head_loss.LOSS_BYTES["cpu"] = chunks
            engine = build((stage, "fp32"), 2, deepspeed=NO_PERSISTENCE if stage == 3 else None)
            batch = [page, page] if engine.rank == 0 else [tiny.empty_bin(), short]
            steps = [(engine.step(batch), engine.evaluate([batch]).mean_loss) for _ in range(2)]
            results.append([(metrics.loss, metrics.grad_norm, evaluated) for metrics, evaluated in steps])
            engine.close()
        return results
    finally:
        engine_module.build_model = build_model
        head_loss.HEAD_BYTES, head_loss.LOSS_BYTES["cpu"] = sizes


def smoothed(grad_accumulation: int) -> list[dict[str, float]]:
    """Two steps with label smoothing and z-loss, and at last an evaluation of the first batch, without."""
    engine = build((2, "fp32"), grad_accumulation, label_smoothing=0.1, z_loss=1e-3)
    history = train(engine, 2)
    mine = tiny.micro_batches(tiny.global_batch(0), engine.rank, engine.world_size, grad_accumulation)
    evaluated, done = engine.evaluate([mine]), engine.step(mine)
    history.append({"evaluated": (evaluated.mean_loss, evaluated.accuracy), "step": (done.loss, done.token_accuracy)})
    engine.close()
    return history


def with_adapter(*arguments: Any, **options: Any) -> Any:
    """The model with LoRA, beside its head and in one of its layers."""
    import peft

    targets = r".*(lm_head|language_model\.layers\.1\.mlp\.down_proj)"
    adapters = peft.LoraConfig(r=2, init_lora_weights="gaussian", target_modules=targets)
    return peft.get_peft_model(build_model(*arguments, **options), adapters)


def nothing_trained(engine: TrainingEngine) -> tuple[bool, float, int]:
    """Whether a step without a trained token leaves the weights as they are; its loss, and the steps that are done."""
    before = {name: weight.detach().clone() for name, weight in engine.model.named_parameters()}
    metrics = engine.step([tiny.empty_bin()] * engine.grad_accumulation)
    same = all(torch.equal(weight, before[name]) for name, weight in engine.model.named_parameters())
    return same, metrics.loss + metrics.grad_norm, engine.step_count


def not_finite(**model: Any) -> str:
    """The message of a step of a model; of one with random weights, whose pixels are not numbers on one rank."""
    engine = build((2, "fp32"), 2, model=model)
    bins = tiny.global_batch(0)
    if engine.rank == 1 and not model:
        bins[3].samples[0].pixel_values[0] = float("nan")
    try:
        engine.step(tiny.micro_batches(bins, engine.rank, engine.world_size, 2))
    except UserError as error:
        return str(error)
    finally:
        engine.close()
    return "no error"


def two_ranks_resumed(rank: int, world_size: int, folder: Path) -> dict[Any, Any]:
    """Steps 4 to 6 of every case, from its checkpoint."""
    results: dict[Any, Any] = {}
    for case in EXACT:
        engine = build(case, 2, resume_from=folder / checkpoint_name(case))
        results[case] = train(engine, LAST_STEP)
        engine.close()
    return results


def three_ranks(rank: int, world_size: int, folder: Path) -> dict[Any, Any]:
    """Step 4 from what two ranks saved, and a save; four bins fill six slots, two stay empty.

    In one case rank 0 is on one node and the others on a second: each node converts for itself, into a folder of its
    own.
    """
    results: dict[Any, Any] = {}
    for case in EXACT:
        node = "second" if case == TWO_NODES and rank > 0 else "first"
        (folder / node / "mmray-resume-killed").mkdir(parents=True, exist_ok=True)
        engine = build(case, 2, resume_from=folder / checkpoint_name(case), scratch=folder / node, node=node)
        results[case] = train(engine, SAVED_AT + 1)
        save_state(engine, folder / "of-three" / checkpoint_name(case))
        engine.close()
    return results


def one_rank(rank: int, world_size: int, folder: Path, shared: Path) -> dict[Any, Any]:
    """The first steps in 1, 2 and 4 micro-batches; then step 5 from the checkpoint of three ranks, and a save."""
    results: dict[Any, Any] = {"smoothed": smoothed(4)}
    for stage in (0, 1, 2, 3):
        for grad_accumulation in (1, 2, 4):
            engine = build((stage, "fp32"), grad_accumulation)
            results[stage, grad_accumulation] = train(engine, 2)
            engine.close()
    for case in EXACT:
        engine = build(case, 4, resume_from=folder / "of-three" / checkpoint_name(case), scratch=shared)
        results[case] = train(engine, SAVED_AT + 2)
        save_state(engine, folder / "of-one" / checkpoint_name(case))
        engine.close()
    results["no folder"] = refusal((2, "fp32"), resume_from=folder / checkpoint_name((2, "fp32")))
    results["other dtype"] = refusal((2, "bf16"), resume_from=folder / checkpoint_name((2, "fp32")))
    results["no checkpoint"] = refusal((2, "fp32"), resume_from=folder / "nothing")
    return results


def refusal(case: Case, **options) -> str:
    """The message with which an engine is not built."""
    try:
        build(case, 4, **options)
    except UserError as error:
        return str(error)
    return "no error"


def two_ranks_at_last(rank: int, world_size: int, folder: Path, shared: Path) -> dict[Any, Any]:
    """Step 6 from what one rank saved."""
    results: dict[Any, Any] = {}
    for case in EXACT:
        engine = build(case, 2, resume_from=folder / "of-one" / checkpoint_name(case), scratch=shared)
        results[case] = train(engine, LAST_STEP)
        engine.close()
    return results


def checkpoint_name(case: Case) -> str:
    return f"stage-{case[0]}-{case[1]}"
