"""Adapters, exported merged and apart: both have the engine's logits."""

import dataclasses
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import mmray
from mmray.cli import app
from mmray.errors import UserError
from mmray.run.evaluation.model import EvaluatedModel
from mmray.run.export import export_model
from mmray.training.adapter import Adapter, load_start
from mmray.training.adapter_settings import AdapterSettings
from mmray.training.base_weights import BaseFiles
from mmray.training.model import build_model
from mmray.training.settings import ModelSettings
from tests.mmray.families.zoo import ZOO
from tests.mmray.preparing import contents
from tests.mmray.run.export.cases import Case
from tests.mmray.run.export.conftest import trained
from tests.mmray.run.export.test_folder import files


@dataclass(frozen=True)
class AdapterCase(Case):
    """A training of one step that trains an adapter. base: the folder of the base model; None for random weights."""

    base: Path | None = None
    kind: str = "lora"
    quantize: str | None = None

    @property
    def model(self) -> ModelSettings:
        plain = super().model
        if self.base is None:
            return plain
        return plain.model_copy(update={"path": str(self.base), "config": None, "quantize": self.quantize})

    @property
    def training(self):
        """An adapter on the head, too, where no embedding shares its weight and experts are the point."""
        whole = ("embeddings",) if self.member == "gemma3" else ("projector",)
        parts = ["language", "lm_head"] if self.member == "qwen3_vl_moe" else ["language"]
        return {"adapter": {"rank": 2, "alpha": 6, "kind": self.kind, "parts": parts, "save_whole": whole}}


CASES = {
    "2-fp32-lora": ("qwen2_vl", 2, "fp32", 1, {}),
    "3-bf16-experts": ("qwen3_vl_moe", 3, "bf16", 2, {}),
    "1-bf16-dora": ("qwen2_vl", 1, "bf16", 2, {"kind": "dora"}),
    "3-fp32-random": ("gemma3", 3, "fp32", 2, {"base": None}),
    "2-fp32-nf4": ("qwen2_vl", 2, "fp32", 1, {"quantize": "nf4"}),
}
"""Family, ZeRO stage, dtype, ranks, and what else is special."""


@pytest.fixture(scope="module")
def engines(make_case, tmp_path_factory):
    """What the engine of each case had, by its name in CASES; beside the base lie the processor's files."""
    cases, groups = {}, {1: [], 2: []}
    for name, (member, stage, dtype, ranks, special) in CASES.items():
        case = make_case(member, stage, dtype)
        fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
        base = tmp_path_factory.mktemp("base") / "model"
        shutil.copytree(case.processor, base)
        build_model(case.model.model_copy(update={"seed": 11})).save_pretrained(base)
        cases[name] = AdapterCase(**fields, **({"base": base} | special))
        groups[ranks].append(cases[name])
    found = trained(groups)
    return {name: (case, found[case]) for name, case in cases.items()}


@pytest.fixture(params=list(CASES))
def engine(request, engines):
    return engines[request.param]


def load(folder, case):
    attention = ZOO[case.member].attentions[0]
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", attn_implementation=attention).eval()


def check_logits(model, case, engine):
    with torch.no_grad():
        logits = model(**engine["inputs"], use_cache=False).logits
    tolerance = 1e-5 if case.dtype == "fp32" else 3e-2
    assert (logits - engine["logits"]).abs().max() <= tolerance * float(engine["logits"].abs().max())


def test_merged_it_has_the_engine_s_logits(engine, tmp_path):
    case, had = engine
    export_model(str(case.run), str(tmp_path / "out"))
    model = load(tmp_path / "out", case)
    check_logits(model, case, had)
    assert not any("lora" in name or "base_layer" in name for name in model.state_dict())
    assert ("merged" in (tmp_path / "out" / "README.md").read_text()) is True


def test_apart_peft_puts_it_onto_the_base(engine, tmp_path):
    case, had = engine
    export_model(str(case.run), str(tmp_path / "out"), form="apart")
    config = (tmp_path / "out" / "adapter_config.json").read_text()
    base = tmp_path / "out" / "base" if case.base is None else case.base
    assert f'"{"base" if case.base is None else base}"' in config
    plain = load(base, case)
    if case.quantize is None:
        check_logits(PeftModel.from_pretrained(plain, tmp_path / "out").eval(), case, had)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    trained_names = {name for name in had["weights"] if "lora_" in name}
    assert len([name for name in stored if "lora_" in name]) == len(trained_names)


def test_a_merged_weight_is_the_sum_rounded_once(engines, tmp_path):
    case, had = engines["2-fp32-lora"]
    export_model(str(case.run), str(tmp_path / "out"), dtype="bf16")
    merged, base = load(tmp_path / "out", case), load(case.base, case)
    name = "model.language_model.layers.0.self_attn.q_proj"
    first, second = (had["weights"][f"{name}.lora_{letter}.default.weight"] for letter in "AB")
    expected = base.get_submodule(name).weight.double() + 6 / 2 * second.double() @ first.double()
    assert second.any()
    difference = (merged.get_submodule(name).weight.double() - expected).abs()
    assert (difference <= expected.abs() * 2**-8).all()
    untouched = "model.visual.blocks.0.attn.qkv.weight"
    assert torch.equal(merged.get_parameter(untouched), base.get_parameter(untouched).bfloat16())


def test_a_second_export_is_byte_equal(engines, tmp_path):
    case, _ = engines["3-bf16-experts"]
    for form in ("merged", "apart"):
        for number in (1, 2):
            export_model(str(case.run), str(tmp_path / f"{form}{number}"), form=form)
        assert files(tmp_path / f"{form}1") == files(tmp_path / f"{form}2")


def test_a_run_begins_with_an_adapter_that_was_exported(engines, tmp_path):
    """The engine's weights come back; another rank, another base and no adapter are refused."""
    case, had = engines["1-bf16-dora"]
    export_model(str(case.run), str(tmp_path / "out"), form="apart")
    settings = AdapterSettings(**case.training["adapter"], start_from=str(tmp_path / "out"))
    adapter = Adapter.of(case.model, settings, BaseFiles.of(str(case.base)))
    model = build_model(case.model)
    adapter.put_into(model)
    load_start(model, adapter)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, had["weights"][name]), name

    def refusal(base=adapter.base, **changes):
        other = dataclasses.replace(adapter, settings=settings.model_copy(update=changes), base=base)
        model = build_model(case.model)
        other.put_into(model)
        with pytest.raises(UserError) as caught:
            load_start(model, other)
        return str(caught.value)

    assert "r is 2 there and 4 here" in refusal(rank=4)
    assert "use_dora is True there and False here" in refusal(kind="lora")
    assert "belongs to another base model: model.safetensors differ" in refusal(
        base=BaseFiles({**adapter.base.digests, "model.safetensors": "0"})
    )
    assert "holds no adapter that can be read" in refusal(start_from=str(tmp_path))
    vision = dataclasses.replace(
        Adapter.of(case.model, settings.model_copy(update={"parts": ("vision",)}), adapter.base), base=None
    )
    model = build_model(case.model)
    vision.put_into(model)
    with pytest.raises(UserError, match=r"it lacks model\.visual.*it has also model\.language_model"):
        load_start(model, vision)


def test_the_base_may_move_but_not_change(engines, tmp_path):
    case, had = engines["2-fp32-lora"]
    moved = Path(shutil.copytree(case.base, tmp_path / "moved"))
    settings = case.model.model_copy(update={"path": str(moved)})
    export_model(str(case.run), str(tmp_path / "out"), settings=settings)
    check_logits(load(tmp_path / "out", case), case, had)
    weights = moved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"the adapter belongs to another base model: model\.safetensors differ"):
        export_model(str(case.run), str(tmp_path / "other"), settings=settings)
    assert not (tmp_path / "other").exists()


def test_its_readme_s_lines_read_a_page(engines, tmp_path, monkeypatch, capsys):
    case, _ = engines["2-fp32-lora"]
    done = CliRunner().invoke(app, ["export", str(case.run), str(tmp_path / "out"), "--adapter"])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| adapter | lora of rank 2 on language, apart |" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    shutil.copy(case.prepared.parent / "wide.png", tmp_path / "out" / "page.png")
    monkeypatch.chdir(tmp_path / "out")
    names = {}
    exec(code.replace("max_new_tokens=512", "max_new_tokens=4"), names)
    assert isinstance(names["model"], PeftModel)
    assert names["inputs"]["input_ids"].shape[1] < names["output"].shape[1]
    assert capsys.readouterr().out.endswith("\n")
    assert mmray.prompt(str(tmp_path / "out")).dtype == torch.float32


def test_a_model_without_adapter_has_no_forms(make_case, tmp_path):
    case = make_case("qwen2_vl", 2, "fp32")
    trained({1: [case]})
    for option in ("--merge", "--adapter"):
        done = CliRunner().invoke(app, ["export", str(case.run), str(tmp_path / "out"), option])
        assert isinstance(done.exception, UserError)
        assert "holds no adapter: leave out --merge and --adapter" in str(done.exception)
    assert contents(tmp_path) == {}


def test_an_adapter_apart_is_no_model_to_evaluate(engines, tmp_path):
    case, _ = engines["2-fp32-lora"]
    export_model(str(case.run), str(tmp_path / "out"), form="apart")

    class Job:
        model = case.model

    with pytest.raises(UserError, match="an adapter without its base; export it with --merge"):
        EvaluatedModel.find(Job(), folder=str(tmp_path / "out"))
