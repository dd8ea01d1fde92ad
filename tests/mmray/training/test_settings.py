"""Contradictions in the settings, the learning rate, and the DeepSpeed configuration made of them."""

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from mmray.errors import UserError
from mmray.training.deepspeed_config import deepspeed_config
from mmray.training.optim import learning_rate
from mmray.training.settings import ModelSettings, TrainingSettings, load_deepspeed_overrides
from mmray.training.treatments import stage_at, stages_of


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither given"),
        ({"steps": 3, "epochs": 1}, "both given"),
        ({"steps": 3, "warmup_steps": 1, "warmup_ratio": 0.1}, "at most one of warmup_steps and warmup_ratio"),
        ({"steps": 3, "warmup_steps": 4}, "longer than training"),
        ({"steps": 3, "schedule": "constant", "min_learning_rate_ratio": 0.1}, "no meaning with schedule: constant"),
        ({"steps": 3, "global_batch_bins": 6, "micro_batch_bins": 4}, "must be a multiple"),
        ({"steps": 3, "betas": (0.9, 1.0)}, "betas must lie in"),
        ({"steps": 3, "deepspeed": {"train_batch_size": 4}}, "decided by training.global_batch_bins"),
        ({"steps": 3, "deepspeed": {"zero_optimization": {"stage": 3}}}, "decided by training.zero_stage"),
        ({"steps": 3, "deepspeed": {"fp16": {"enabled": True}}}, "decided by model.dtype"),
        ({"steps": 3, "fused_loss": "liger", "label_smoothing": 0.1}, r"leaves out label_smoothing \(0.1\)"),
        ({"steps": 3, "fused_loss": "liger", "z_loss": 1e-4}, r"leaves out z_loss \(0.0001\); remove one"),
        ({"steps": 3, "profile": {"steps": [3, 4]}}, r"profile.steps \[3, 4\] go beyond the 3 steps"),
        ({"steps": 3, "profile": {"steps": [2, 1]}}, "the first step to trace, 2, comes after the last, 1"),
        ({"steps": 3, "adapter": {}, "stages": [{"steps": 1, "parts": {}}]}, "stages and adapter do not go together"),
        ({"steps": 3, "adapter": {}, "optimizer": "muon", "muon_learning_rate": 1}, "made for whole matrices"),
        ({"steps": 3, "adapter": {"rank": 0}}, "greater than or equal to 1"),
        ({"steps": 3, "parts": {"vision": {"learning_rate": 0}}}, "greater than 0"),
        ({"steps": 3, "parts": {"vision": "thawed"}}, "should be 'frozen' or keys such as learning_rate"),
    ],
)
def test_contradictions_are_errors(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainingSettings(**settings)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_numbers_are_finite(number: float) -> None:
    """A rate that YAML reads as .inf would train to NaN."""
    for settings in (
        {"learning_rate": number}, {"weight_decay": number}, {"eps": number}, {"max_grad_norm": number},
        {"parts": {"vision": {"learning_rate": number}}}, {"parts": {"vision": {"weight_decay": number}}},
        {"adapter": {"alpha": number}}, {"steps": None, "epochs": number}, {"betas": (number, 0.9)},
        {"optimizer": "muon", "muon_learning_rate": number}, {"router_loss": number}, {"stop_seconds": number},
    ):  # fmt: skip
        with pytest.raises(ValidationError, match=r"finite|router_loss is a number"):
            TrainingSettings(**{"steps": 3} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither given"),
        ({"path": "a", "config": "b"}, "both given"),
        ({"config": {"hidden_size": 64}}, 'needs its "model_type"'),
    ],
)
def test_a_model_has_one_source(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelSettings(**settings)


def test_the_processor_comes_from_the_model_unless_given() -> None:
    assert ModelSettings(path="a").processor_source == "a"
    assert ModelSettings(config="a", processor="b").processor_source == "b"
    with pytest.raises(UserError, match=r"set model\.processor"):
        _ = ModelSettings(config="a").processor_source


def test_learning_rate_of_each_schedule() -> None:
    def rates(total_steps: int, **settings) -> list[float]:
        training = TrainingSettings(steps=total_steps, learning_rate=2.0, **settings)
        (stage,) = stages_of(training, total_steps)
        return [learning_rate(step, stage, training, 2.0) for step in range(total_steps + 2)]

    assert rates(4, schedule="constant") == [2.0] * 6
    assert rates(6, schedule="linear", warmup_steps=2) == pytest.approx([1, 2, 2, 1.5, 1, 0.5, 0, 0])
    assert rates(4, schedule="linear", min_learning_rate_ratio=0.5) == pytest.approx([2, 1.75, 1.5, 1.25, 1, 1])
    cosine = rates(6, warmup_ratio=0.2, min_learning_rate_ratio=0.1)  # 1.2 steps, rounded up to 2
    assert cosine == pytest.approx([1, 2, 2, 1.8 * 0.8535534 + 0.2, 1.1, 1.8 * 0.1464466 + 0.2, 0.2, 0.2])
    assert rates(7, schedule="wsd", warmup_steps=2, decay_steps=2) == pytest.approx([1, 2, 2, 2, 2, 2, 1, 0, 0])
    ending = rates(4, schedule="wsd", decay_steps=4, min_learning_rate_ratio=0.5)
    assert ending == pytest.approx([2, 1.75, 1.5, 1.25, 1, 1])


def test_each_stage_goes_through_the_schedule() -> None:
    training = TrainingSettings(
        steps=7, learning_rate=2.0, schedule="linear", warmup_steps=1,
        stages=[{"steps": 3, "parts": {"language": "frozen"}}],
    )  # fmt: skip
    stages = stages_of(training, 7)
    rates = [learning_rate(step, stage_at(stages, step), training, 2.0) for step in range(7)]
    assert rates == pytest.approx([2, 2, 1, 2, 2, 4 / 3, 2 / 3])
    assert [stage_at(stages, step).number for step in range(-1, 9)] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_stages_leave_steps_for_the_rest() -> None:
    stages = [{"steps": 3, "parts": {}}, {"steps": 2, "parts": {}}]
    with pytest.raises(ValidationError, match=r"stages take 5 steps, and training has 5: none is left"):
        TrainingSettings(steps=5, stages=stages)
    with pytest.raises(UserError, match=r"training.stages take 5 steps, and training has 4: none is left"):
        stages_of(TrainingSettings(epochs=1, stages=stages), 4)
    with pytest.raises(ValidationError, match=r"stage 2 of training has 2 steps, fewer than .* together \(3\)"):
        TrainingSettings(steps=9, stages=stages, schedule="wsd", warmup_steps=1, decay_steps=2)


def test_deepspeed_overrides_are_laid_over_ours(tmp_path: Path) -> None:
    from_trainer = {
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": "auto", "overlap_comm": True, "reduce_bucket_size": "auto"},
        "steps_per_print": 100,
    }
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(from_trainer))
    training = TrainingSettings(steps=1, zero_stage=0, deepspeed=str(file), max_grad_norm=None)
    config = deepspeed_config(
        ModelSettings(config="a"), training, world_size=2, grad_accumulation=3, load_universal=False
    )
    assert config["zero_optimization"] == {"stage": 1, "overlap_comm": True}  # bf16 needs stage 1 at least
    assert config["bf16"] == {"enabled": True}
    assert (config["train_batch_size"], config["steps_per_print"], config["gradient_clipping"]) == (6, 100, 0.0)

    file.write_text('{"optimizer": {"type": "Lamb"}}')
    with pytest.raises(UserError, match=r"'optimizer' is decided by training\.optimizer"):
        load_deepspeed_overrides(str(file))
    for group in ("[1]", "null", '"stage 2"'):
        file.write_text(f'{{"zero_optimization": {group}}}')
        with pytest.raises(UserError, match="'zero_optimization' must be an object"):
            load_deepspeed_overrides(str(file))
    with pytest.raises(UserError, match="cannot read"):
        load_deepspeed_overrides(str(tmp_path / "missing.json"))


def test_offloading_takes_deepspeeds_own_optimizer() -> None:
    def optimizer(**training) -> dict:
        settings = TrainingSettings(steps=1, **training)
        model = ModelSettings(config="a")
        config = deepspeed_config(model, settings, world_size=1, grad_accumulation=1, load_universal=False)
        return config["optimizer"]["params"]

    assert optimizer()["torch_adam"] is True
    assert "torch_adam" not in optimizer(deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
