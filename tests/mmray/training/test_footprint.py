"""The bytes of a training, told before it begins, against what two ranks measure."""

from pathlib import Path
from typing import Any

import pytest

from mmray.training.footprint import Footprint, Sizes, footprint, parameters_of, remedies
from mmray.training.model import empty_model
from mmray.training.settings import ModelSettings, TrainingSettings
from tests.mmray.training import memory_use, tiny
from tests.mmray.training.ranks import RankGroup

RANKS = 2
CASES = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]
WITHIN = 0.2


def told(dtype: str, stage: int) -> tuple[Footprint, int]:
    """The bytes that are told of the measured model, and its number of parameters."""
    model = tiny.model_settings(config=memory_use.config(), dtype=dtype)
    training = tiny.training_settings(zero_stage=stage)
    sizes = Sizes.of(model, training, 100, 100)
    return footprint(sizes, model, training, RANKS), sizes.parameters


def test_weights_gradients_optimizer_and_checkpoint_are_what_is_measured(tmp_path: Path) -> None:
    """Each case in processes of its own, where nothing of another lives on."""
    for dtype, stage in CASES:
        ranks = RankGroup(RANKS, memory_use.measured, stage, dtype, tmp_path).results()
        expected, parameters = told(dtype, stage)
        assert ranks[0]["parameters"] == parameters
        files = [file for file in (tmp_path / f"{stage}-{dtype}").rglob("*") if file.is_file()]
        measured = {use: max(rank[use] for rank in ranks) for use in ("weights", "gradients", "optimizer")}
        measured["checkpoint"] = sum(file.stat().st_size for file in files)
        for use, size in measured.items():
            assert getattr(expected, use) == pytest.approx(size, rel=WITHIN), f"{use} at stage {stage}, {dtype}"


# ---- What follows from them ----

BILLION = 10**9


def sizes(parameters: int, trained: int | None = None) -> Sizes:
    config = empty_model(tiny.model_settings()).config
    return Sizes(parameters, parameters if trained is None else trained, config, 8192, 4096)


def model(**changes: Any) -> ModelSettings:
    return tiny.model_settings(**({"dtype": "bf16"} | changes))


def training(**changes: Any) -> TrainingSettings:
    return TrainingSettings(**({"steps": 1, "zero_stage": 1} | changes))


def test_a_model_of_seven_billion_on_eight_ranks() -> None:
    """By hand: 14 GB of weights, 42 GB of gradients on every rank at stage 1, 84 GB of optimizer on eight."""
    found = footprint(sizes(7 * BILLION), model(), training(), 8)
    assert (found.weights, found.gradients, found.optimizer) == (14 * BILLION, 42 * BILLION, 84 * BILLION // 8)
    assert found.checkpoint == 98 * BILLION
    shared = footprint(sizes(7 * BILLION), model(), training(zero_stage=3), 8)
    assert shared.certain == 7 * BILLION * (2 + 4 + 12) // 8
    assert shared.checkpoint == 84 * BILLION


def test_frozen_weights_have_no_gradients_and_no_optimizer() -> None:
    found = footprint(sizes(7 * BILLION, trained=BILLION), model(), training(), 8)
    assert (found.weights, found.gradients, found.optimizer) == (14 * BILLION, 6 * BILLION, 12 * BILLION // 8)
    assert found.checkpoint == (14 + 12) * BILLION


def test_the_stage_that_trains_the_most_counts() -> None:
    parts = {"vision": "frozen", "language": "frozen", "embeddings": "frozen"}
    asked = tiny.training_settings(parts=parts)
    empty = empty_model(tiny.model_settings())
    total, trained = parameters_of(empty, asked)
    projector = sum(one.numel() for name, one in empty.named_parameters() if ".merger." in name)
    assert (total, trained) == (sum(one.numel() for one in empty.parameters()), projector)
    whole = tiny.training_settings(parts=parts, stages=[{"steps": 2, "parts": {}}])
    assert parameters_of(empty, whole) == (total, total)


def test_smaller_optimizers_take_less() -> None:
    taken = {name: footprint(sizes(BILLION), model(), training(optimizer=name, **more), 8) for name, more in (
        ("adamw", {}), ("adamw_8bit", {}), ("muon", {"muon_learning_rate": 0.02, "max_grad_norm": None}))}  # fmt: skip
    assert [taken[name].optimizer for name in taken] == [12 * BILLION // 8, 6 * BILLION // 8, 8 * BILLION // 8]


def test_what_is_offloaded_is_in_the_hosts_memory() -> None:
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    found = footprint(sizes(7 * BILLION), model(), training(zero_stage=2, deepspeed=offload), 8)
    assert found.certain == 14 * BILLION
    assert found.host == 7 * BILLION * (4 + 12) // 8


def test_more_tokens_keep_more_and_recomputing_less() -> None:
    small = sizes(BILLION)
    many = Sizes(small.parameters, small.trained, small.config, 2 * small.tokens, 2 * small.visual_tokens)
    keeps, keeps_more = (footprint(each, model(), training(), 8).activations for each in (small, many))
    recomputes = footprint(small, model(gradient_checkpointing=True), training(), 8).activations
    assert recomputes < keeps < keeps_more


def test_the_settings_that_would_fit_are_named() -> None:
    """7 billion take 66.5 GB on each of eight at stage 1, 24.5 GB at stage 2 and 15.75 GB at stage 3."""

    def named(room: int, **changes: Any) -> list[str]:
        asked = model(**{name: changes.pop(name) for name in ("dtype",) if name in changes})
        return remedies(sizes(7 * BILLION), asked, training(**changes), 8, room * BILLION, 1000 * BILLION)

    assert named(30) == ["training.zero_stage: 2", "training.zero_stage: 3"]
    assert named(20)[0] == "training.zero_stage: 3"
    assert named(10)[0].startswith("training.zero_stage: 3 and training.deepspeed: {zero_optimization: {offload_opt")
    assert named(10)[1] == "training.zero_stage: 3 and resources.workers: 16"
    assert named(18, dtype="fp32", zero_stage=3)[0] == "model.dtype: bf16"
    assert remedies(sizes(7 * BILLION), model(), training(), 8, BILLION // 100, 0) == []
