"""Files that do not hold the model's weights are an error that names them; nothing is drawn at random in silence."""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from mmray.errors import UserError
from mmray.training import weights as weights_module
from mmray.training.model import build_model, check_weights, empty_model
from mmray.training.settings import ModelSettings
from mmray.training.weights import StoredWeight, UnknownWeights
from tests.mmray.training import tiny

DOWN = "model.language_model.layers.1.mlp.down_proj.weight"
State = dict[str, Tensor]
Changed = Callable[[Callable[[State], State]], Path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers saves the small model: names of earlier versions, the tied head left out."""
    folder = tmp_path_factory.mktemp("whole")
    build_model(tiny.model_settings()).save_pretrained(folder)
    return folder


@pytest.fixture
def changed(whole: Path, tmp_path: Path) -> Changed:
    """A function: the folder with its weights changed."""

    def change(edit: Callable[[State], State]) -> Path:
        (tmp_path / "config.json").write_text((whole / "config.json").read_text())
        save_file(edit(load_file(whole / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path

    return change


def settings(folder: Path, *allowed: str) -> ModelSettings:
    return tiny.model_settings(config=None, path=str(folder), allow_missing=allowed)


def without(part: str) -> Callable[[State], State]:
    return lambda state: {name: weight for name, weight in state.items() if part not in name}


def adapted(state: State) -> State:
    return {f"base_model.model.{name}": weight for name, weight in state.items()}


def with_head(state: State) -> State:
    return state | {"value_head.weight": torch.zeros(1, 64)}


def as_codes(dtype: torch.dtype) -> Callable[[State], State]:
    """An edit: the projections down of the MLPs as quantised weights are stored, without their scales."""
    return lambda state: {
        name: (weight.clamp(-1, 1) * 100).to(dtype) if "down_proj" in name else weight for name, weight in state.items()
    }


def narrower(state: State) -> State:
    return {name: weight[:-1].contiguous() if "down_proj" in name else weight for name, weight in state.items()}


def test_whole_files_fit(whole: Path) -> None:
    names = load_file(whole / "model.safetensors")
    assert "lm_head.weight" not in names
    assert check_weights(settings(whole)) == ""


@pytest.mark.parametrize(
    ("edit", "messages"),
    [
        (without("visual."), ("31 missing from the files", "model.visual.blocks.*.attn.proj.weight (2 times)")),
        (without("layers.1.mlp.down_proj"), ("1 missing from the files, which would be drawn at random: " + DOWN,)),
        (adapted, ("58 missing", "57 in the files that the model does not have: base_model.model.", "merge it into")),
        (with_head, ("1 in the files that the model does not have: value_head.weight. Remedy", "model.allow_missing")),
        (
            as_codes(torch.int8),
            (
                "2 stored as integers or in 8 bits without what turns them into weights: ",
                "model.language_model.layers.*.mlp.down_proj.weight (2 times)",
                "give the model in bf16, fp16 or fp32",
            ),
        ),
        (as_codes(torch.float8_e4m3fn), ("2 stored as integers or in 8 bits",)),
        (as_codes(torch.bool), ("2 stored as integers or in 8 bits",)),
        (narrower, ("2 of another shape: ", "[63, 96] instead of [64, 96]", "another model's")),
    ],
    ids=[
        "no vision tower",
        "no layer's part",
        "an adapter's prefix",
        "another head",
        "int8",
        "fp8",
        "bool",
        "another width",
    ],
)
def test_files_that_do_not_fit(changed: Changed, edit: Callable[[State], State], messages: tuple[str, ...]) -> None:
    folder = changed(edit)
    for judge in (check_weights, build_model):
        with pytest.raises(UserError) as error:
            judge(settings(folder))
        for message in messages:
            assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_other_plain_numbers_fit(changed: Changed, whole: Path) -> None:
    """Files in fp16, and numbers that are integers in the model, too."""
    folder = changed(lambda state: {name: weight.half() for name, weight in state.items()})
    assert check_weights(settings(folder)) == ""
    stored = weights_module.stored_weights(str(whole), download=False)

    def counting() -> PreTrainedModel:
        model = empty_model(settings(whole))
        model.register_buffer("seen", torch.zeros((), dtype=torch.int64, device="meta"))
        return model

    counted = stored | {"seen": StoredWeight((), "I64")}
    assert weights_module.fit(counting, counted) == weights_module.fit(partial(empty_model, settings(whole)), stored)


def test_who_means_it_says_so(changed: Changed, caplog: pytest.LogCaptureFixture) -> None:
    folder = changed(lambda state: with_head(without("down_proj")(state)))
    meant = settings(folder, "model.language_model.layers.*.mlp.down_proj.*", "value_head.weight")
    with caplog.at_level(logging.WARNING, "mmray"):
        model = build_model(meant)
    assert model.get_parameter(DOWN).std().item() == pytest.approx(0.02, rel=0.1)
    (said,) = (record.getMessage() for record in caplog.records if record.name == "mmray")
    assert "2 drawn at random: model.language_model.layers.*.mlp.down_proj.weight (2 times)" in said
    assert "1 left out: value_head.weight" in said
    with pytest.raises(UserError, match="1 in the files that the model does not have"):
        build_model(settings(folder, "*down_proj*"))


def test_a_pattern_of_no_weight_is_a_mistake(whole: Path) -> None:
    with pytest.raises(UserError, match=r"'lm_haed\.\*' is the name of no weight"):
        check_weights(settings(whole, "lm_haed.*"))
    with pytest.raises(ValueError, match="with config all are drawn at random"):
        tiny.model_settings(allow_missing=("*",))


def test_sharded_files_and_those_of_torch(changed: Changed, whole: Path) -> None:
    folder = changed(lambda state: state)
    state = load_file(whole / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert check_weights(settings(folder)) == ""
    torch.save(without("layers.1.mlp.down_proj")(state), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="1 missing"):
        build_model(settings(folder))
    (folder / "pytorch_model.bin").unlink()
    half = list(state)[: len(state) // 2]
    shards = {"model-1.safetensors": half, "model-2.safetensors": [name for name in state if name not in half]}
    for file, names in shards.items():
        save_file({name: state[name] for name in names}, folder / file, {"format": "pt"})
    places = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert check_weights(settings(folder)) == ""
    (folder / "model-2.safetensors").write_bytes((folder / "model-2.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot read the weights in .*model-2\.safetensors: .* copy the file anew"):
        build_model(settings(folder))


def test_weights_of_the_hub_are_judged_from_their_headers(changed: Changed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fetching them."""
    folder = changed(without("visual.blocks.1."))
    header = load_file(folder / "model.safetensors")
    tensors = {name: SimpleNamespace(shape=list(weight.shape), dtype="F32") for name, weight in header.items()}
    told = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})
    monkeypatch.setattr(weights_module, "get_safetensors_metadata", lambda name: told)
    found = weights_module.stored_weights("owner/nowhere", download=False)
    assert found == {name: StoredWeight(tuple(weight.shape), "F32") for name, weight in header.items()}


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(name: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(weights_module, "get_safetensors_metadata", silent)
    with pytest.raises(UnknownWeights, match=r"owner/nowhere is not on this machine, .* no route"):
        weights_module.stored_weights("owner/nowhere", download=False)


@pytest.mark.parametrize("text", ["{", "", "{}", '{"weight_map": null}'])
def test_a_broken_index_is_told(whole: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(text)
    for use in (check_weights, build_model):
        with pytest.raises(
            UserError, match=r"^the list of the files of .* \(\*\.index\.json\) cannot be read: .*; copy it"
        ):
            use(settings(tmp_path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_config": {"num_attention_heads": 3}}, r"no model can be made by .*: hidden_size must be divisible by"),
        ({"text_config": {"vocab_size": "many"}}, r"cannot read a model configuration .* expected int, got str"),
        ({"text_config": {"num_hidden_layers": -1}}, r"cannot read a model configuration .* \(-1\) must be equal"),
        ({"model_type": "llama"}, r"no model can be made by the configuration of .* give the config.json that belongs"),
    ],
)
def test_a_configuration_that_fits_no_model_is_one_line(
    whole: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    content = json.loads((whole / "config.json").read_text())
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").symlink_to(whole / "model.safetensors")
    for use in (check_weights, build_model):
        with pytest.raises(UserError, match=said) as caught:
            use(settings(tmp_path))
        assert "\n" not in str(caught.value)
