"""`training.deepspeed` is judged by DeepSpeed's own reader: what it does not know is refused."""

from typing import Any

import pytest

from mmray.errors import UserError
from mmray.training import deepspeed_check
from mmray.training.deepspeed_check import check_deepspeed
from mmray.training.settings import ModelSettings, TrainingSettings

pytest.importorskip("deepspeed")

MODEL = ModelSettings(config={"model_type": "qwen2_vl"}, dtype="bf16")


def check(overrides: dict[str, Any], stage: int = 3) -> str | None:
    return check_deepspeed(MODEL, TrainingSettings(steps=1, zero_stage=stage, deepspeed=overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # ignored in silence by DeepSpeed itself
        ({"zero_optimisation": {"overlap_comm": True}}, "zero_optimisation: .*did you mean zero_optimization?"),
        ({"wall_clock_brakedown": True}, "wall_clock_brakedown: .*did you mean wall_clock_breakdown?"),
        (
            {"activation_checkpointing": {"partition_activation": True}},
            "checkpointing.partition_activation: .*did you mean activation_checkpointing.partition_activations",
        ),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "did you mean data_types.grad_accum_dtype?"),
        ({"aio": {"queue_dept": 8}}, "did you mean aio.queue_depth?"),
        ({"flops_profiler": {"enable": False}}, "did you mean flops_profiler.enabled?"),
        ({"surprise": 1}, "surprise: DeepSpeed knows no such key, see its page"),
        # refused by its models, on the workers
        ({"zero_optimization": {"reduce_bucket_sizes": 1}}, "did you mean zero_optimization.reduce_bucket_size?"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise: .*did you mean zero_optimization.offload_optimizer.device?",
        ),
        ({"zero_optimization": {"reduce_bucket_size": "much"}}, "reduce_bucket_size: Input should be .*found 'much'"),
        ({"comms_logger": {"enabledd": False}}, "did you mean comms_logger.enabled?"),
    ],
)
def test_what_deepspeed_does_not_know_is_refused_with_the_nearest(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^training\.deepspeed: .*{message}") as error:
        check(overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}, "overlap_comm": True}},
        {"zero_optimization": {"stage3_prefetch_bucket_size": "auto", "sub_group_size": 1e9}},
        {"activation_checkpointing": {"partition_activations": True, "number_checkpoints": None, "profile": False}},
        {"flops_profiler": {"enabled": False, "profile_step": 1, "detailed": True, "output_file": None}},
        {"aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True}},
        {"wall_clock_breakdown": True, "memory_breakdown": False, "prescale_gradients": False, "dump_state": False},
        {"communication_data_type": "fp32", "steps_per_print": 10, "zero_allow_untested_optimizer": True},
        {"checkpoint": {"tag_validation": "Warn", "parallel_write": {"pipeline_stage": False}}},
        {"comms_logger": {"enabled": False, "prof_all": True}, "tensorboard": {"enabled": False, "job_name": "y"}},
        {"autotuning": {"enabled": False, "fast": True}, "compile": {"deepcompile": False}},
    ],
)
def test_what_deepspeed_knows_passes(overrides: dict[str, Any]) -> None:
    assert check(overrides) is None


def test_without_keys_deepspeed_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_check, "import_deepspeed", lambda: pytest.fail("imported"))
    assert check_deepspeed(MODEL, TrainingSettings(steps=1)) is None
    assert check({"zero_optimization": {"stage": "auto"}}) is None


def test_where_it_is_not_installed_a_note_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_check.importlib.util, "find_spec", lambda name: None)
    assert check({"wall_clock_brakedown": True}) == (
        "training.deepspeed is not checked: deepspeed is not installed here"
    )
