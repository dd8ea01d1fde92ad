"""`mmray export`: what transformers alone loads has the engine's weights and gives its logits."""

import itertools
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from mmray.run.export import export_model
from mmray.training.model import build_model
from mmray.training.settings import ModelSettings
from tests.mmray.families.zoo import ZOO
from tests.mmray.run.export.cases import Case, prepare
from tests.mmray.run.export.conftest import trained

FAMILIES = ("qwen2_vl", "gemma3", "qwen3_vl_moe")
"""Plain, tied and always masked, with experts that are saved otherwise than they run."""
STAGES, RANKS, DTYPES = (0, 1, 2, 3), (1, 2, 3), ("fp32", "bf16")
CASES = [
    (FAMILIES[(stage + ranks) % 3], stage, ranks, DTYPES[(stage + ranks // 2) % 2])
    for stage in STAGES
    for ranks in RANKS
]


def test_the_cases_hold_every_pair():
    axes = (FAMILIES, STAGES, RANKS, DTYPES)
    for first, second in itertools.combinations(range(4), 2):
        pairs = {(case[first], case[second]) for case in CASES}
        assert pairs == set(itertools.product(axes[first], axes[second]))


@pytest.fixture(scope="module")
def engines(make_case):
    """What the engine of each case had, by its place in CASES."""
    cases = [make_case(family, stage, dtype) for family, stage, _, dtype in CASES]
    groups = {ranks: [case for case, (_, _, of, _) in zip(cases, CASES) if of == ranks] for ranks in RANKS}
    found = trained(groups)
    return [(case, found[case]) for case in cases]


def load(folder, case):
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype="auto", attn_implementation=ZOO[case.member].attentions[0], output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def check_equal(model, engine):
    """Weights bit by bit, tied ones one, logits to 1e-6 of the largest."""
    weights = dict(model.named_parameters())
    assert weights.keys() == engine["weights"].keys()
    assert all(torch.equal(weights[name], engine["weights"][name]) for name in weights)
    if model.dtype == torch.float32:
        with torch.no_grad():
            logits = model(**engine["inputs"], use_cache=False).logits
        assert logits.abs().max() > 1e-3
        assert (logits - engine["logits"]).abs().max() <= 1e-6 * max(1.0, float(engine["logits"].abs().max()))


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_the_exported_model_is_the_engine_s(engines, number, tmp_path):
    case, engine = engines[number]
    export_model(str(case.run), str(tmp_path / "out"))
    model = load(tmp_path / "out", case)
    assert str(model.dtype) == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[case.dtype]
    check_equal(model, engine)


@dataclass(frozen=True)
class WithAddedTokens(Case):
    """A case whose model was saved before tokens were added to its tokenizer."""

    @property
    def model(self) -> ModelSettings:
        return ModelSettings(path=str(self.processor), dtype=self.dtype, resize_embeddings=True)


def test_the_vectors_of_added_tokens_are_exported(make_case, tmp_path):
    plain = make_case("qwen2_vl", 2, "fp32")
    folder = tmp_path / "added"
    ZOO["qwen2_vl"].write_processor(folder)
    build_model(plain.model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = build_model(plain.model).get_input_embeddings().num_embeddings
    tokenizer.add_tokens([f"<new {number}>" for number in range(rows + 1 - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    prepared = prepare("qwen2_vl", folder, tmp_path / "rows")
    case = WithAddedTokens(plain.member, plain.stage, plain.dtype, folder, prepared, plain.run)
    engine = trained({1: [case]})[case]
    export_model(str(case.run), str(tmp_path / "out"))
    model = load(tmp_path / "out", case)
    assert model.get_input_embeddings().num_embeddings == model.config.get_text_config().vocab_size == rows + 1
    check_equal(model, engine)


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_another_dtype_is_the_master_s_or_their_nearest(engines, number, tmp_path):
    case, engine = engines[number]
    other = {"fp32": "bf16", "bf16": "fp32"}[case.dtype]
    export_model(str(case.run), str(tmp_path / "out"), dtype=other)
    model = load(tmp_path / "out", case)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[other]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, engine["masters"][name].to(dtype)), name
    if other == "fp32":
        assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in model.parameters())


def test_the_config_is_the_model_s_own(engines, tmp_path):
    """No switch of training is in it: cache, attention, checkpointing."""
    for case, _ in engines[:3]:
        export_model(str(case.run), str(tmp_path / case.member))
        ZOO[case.member].config(case.processor).save_pretrained(tmp_path / "own")
        found, own = (json.loads((tmp_path / name / "config.json").read_text()) for name in (case.member, "own"))
        assert leaves(found).items() - leaves(own).items() == {
            ("dtype", {"fp32": "float32", "bf16": "bfloat16"}[case.dtype]),
            ("architectures.0", found["architectures"][0]),
        } | {(name, value) for name, value in leaves(found).items() if name.endswith("_config.dtype")}
        assert found["text_config"]["use_cache"] is True


def leaves(value, path=""):
    """The plain values in a JSON value, by their paths."""
    if not isinstance(value, (dict, list)):
        return {path: value}
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: leaf for key, each in inner for name, leaf in leaves(each, f"{path}.{key}".lstrip(".")).items()}


@dataclass(frozen=True)
class WithParts(Case):
    """A case with a frozen part, and parts with rates of their own: several groups of weights."""

    @property
    def training(self) -> dict[str, Any]:
        parts = {"vision": "frozen", "projector": {"learning_rate": 1e-2}, "embeddings": {"learning_rate": 1e-4}}
        return {"parts": parts}


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_frozen_weights_and_groups_of_weights_are_exported(make_case, tmp_path, stage, dtype):
    """Also as fp32 from a bf16 training, which keeps masters only of what it trains."""
    plain = make_case("qwen2_vl", stage, dtype)
    case = WithParts(plain.member, stage, dtype, plain.processor, plain.prepared, plain.run)
    engine = trained({2: [case]})[case]
    before = dict(build_model(case.model).named_parameters())
    export_model(str(case.run), str(tmp_path / "out"))
    model = load(tmp_path / "out", case)
    check_equal(model, engine)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert any(".language_model." in name for name in changed)
    assert {name for name in changed if ".visual." in name} <= {name for name in before if ".merger." in name}
    export_model(str(case.run), str(tmp_path / "fp32"), dtype="fp32")
    for name, weight in load(tmp_path / "fp32", case).named_parameters():
        expected = engine["masters"].get(name, engine["weights"][name])
        assert torch.equal(weight, expected.float()), name
