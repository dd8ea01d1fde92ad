"""What the proofs of training rest on: versions that are asked for, and buffers that keep their types."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from mmray.errors import UserError
from mmray.training.deepspeed_config import buffers_kept
from mmray.training.model import build_model
from tests.mmray.training import tiny

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("name", "too_old"), [("deepspeed", "0.19.7"), ("transformers", "5.0.0"), ("ray", "2.50.0")])
def test_versions_that_compute_something_else_are_not_installed(name: str, too_old: str) -> None:
    """With DeepSpeed 0.19.2, .3, .5 and .7, ranks on gloo load wrong weights for ZeRO-3, and losses are NaN."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = [*project["dependencies"], *project["optional-dependencies"]["cluster"]]
    (bound,) = [Requirement(line).specifier for line in stated if Requirement(line).name == name]
    tested = re.search(rf"^{name}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert tested is not None
    assert tested[1] in bound
    assert too_old not in bound


def test_rotary_buffers_in_bf16_are_an_error() -> None:
    """What DeepSpeed did before 0.19.2."""
    model = build_model(tiny.model_settings(dtype="bf16"))
    with buffers_kept(model):
        model.to("cpu")
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    with (
        pytest.raises(
            UserError, match=r"inv_freq from torch\.float32 to torch\.bfloat16, .*deepspeed 0\.19\.8 or later"
        ),
        buffers_kept(model),
    ):
        model.bfloat16()
