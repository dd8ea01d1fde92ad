"""`mmray export` of runs with frozen parts and stages: all weights, of which the frozen ones are the base's."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mmray.run.export import export_model
from mmray.training.model import build_model
from tests.mmray.run.export.cases import Case
from tests.mmray.run.export.conftest import trained
from tests.mmray.run.export.test_export import check_equal, load

PROJECTOR_FIRST = {"steps": 1, "parts": {"vision": "frozen", "language": "frozen", "embeddings": "frozen"}}
CASES: dict[str, tuple[str, int, str, dict[str, Any], tuple[str, ...]]] = {
    "vision": ("qwen2_vl", 3, "bf16", {"parts": {"vision": "frozen"}}, ("model.visual.blocks.", "patch_embed.")),
    "tied": ("gemma3", 2, "fp32", {"parts": {"embeddings": "frozen"}}, ("embed_tokens.",)),
    "experts": ("qwen3_vl_moe", 3, "fp32", {"parts": {"language": "frozen"}}, (".experts.", ".gate.", ".self_attn.")),
    "stages": (
        "qwen2_vl", 1, "fp32", {"stages": (PROJECTOR_FIRST,), "parts": {"vision": "frozen"}}, ("model.visual.blocks.",),
    ),
}  # fmt: skip
"""Family, ZeRO stage, dtype, settings, and words in the names of weights that nothing has trained."""


@dataclass(frozen=True)
class PartsCase(Case):
    """A case in which parts are frozen. name: of CASES."""

    name: str = ""

    @property
    def training(self) -> dict[str, Any]:
        """The settings of the case."""
        return CASES[self.name][3]


@pytest.fixture(scope="module")
def engines(make_case):
    """What the engine of each case had on the first of two ranks, by its name."""
    cases = {}
    for name, (member, stage, dtype, *_) in CASES.items():
        plain = make_case(member, stage, dtype)
        fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        cases[name] = PartsCase(**fields, name=name)
    had = trained({2: list(cases.values())})
    return {name: (case, had[case]) for name, case in cases.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_export_is_the_engine_s_and_its_frozen_weights_the_base_s(engines, name, tmp_path):
    case, engine = engines[name]
    export_model(str(case.run), str(tmp_path / "out"))
    model = load(tmp_path / "out", case)
    check_equal(model, engine)
    base = dict(build_model(case.model).named_parameters())
    words = CASES[name][4]
    frozen = [key for key in base if any(word in key for word in words)]
    assert all(any(word in key for key in frozen) for word in words)
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[key], base[key]) for key in frozen)
    moved = {key.split(".")[1] for key in base if not torch.equal(weights[key], base[key])}
    assert moved, "the others are trained"
