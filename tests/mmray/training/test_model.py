"""Building the model: seeds, sources, and what is switched on and off."""

import json
from pathlib import Path

import pytest
import torch

from mmray.errors import UserError
from mmray.training.model import build_model, load_config, transformers_model
from tests.mmray.training import tiny


def weights(**changes) -> dict[str, torch.Tensor]:
    return build_model(tiny.model_settings(**changes)).state_dict()


def test_random_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(11)
    expected_draw = torch.rand(1)
    torch.manual_seed(11)
    first = weights(seed=3)
    assert torch.equal(torch.rand(1), expected_draw)
    torch.testing.assert_close(weights(seed=3), first, rtol=0, atol=0)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights(seed=4)[name], first[name])
    assert first[name].std() == pytest.approx(0.02, rel=0.1)


def test_config_folder_and_files_give_the_same_model(tmp_path: Path) -> None:
    expected = build_model(tiny.model_settings())
    expected.save_pretrained(tmp_path)
    for source in ({"config": str(tmp_path)}, {"config": str(tmp_path / "config.json")}):
        torch.testing.assert_close(weights(**source), expected.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(weights(config=None, path=str(tmp_path), seed=9), expected.state_dict(), rtol=0, atol=0)


def test_cache_is_off_and_checkpointing_as_set() -> None:
    model = build_model(tiny.model_settings(gradient_checkpointing=True, dtype="bf16", attention="eager"))
    assert model.config.use_cache is False
    assert model.config.text_config.use_cache is False
    layers = [*model.model.visual.blocks, *model.model.language_model.layers]
    assert all(layer.gradient_checkpointing and layer.training for layer in layers)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen9"}, "knows no model_type 'qwen9'"),
        ({"model_type": "bert"}, "no image-text-to-text model for model_type 'bert'"),
        ("missing", "cannot read a model configuration from"),
        ("unknown", "cannot read a model configuration from"),
    ],
)
def test_a_model_that_cannot_be_built(tmp_path: Path, config: dict[str, str] | str, message: str) -> None:
    if isinstance(config, str):
        (tmp_path / "unknown").mkdir()
        (tmp_path / "unknown" / "config.json").write_text(json.dumps({"model_type": "qwen9"}))
        config = str(tmp_path / config)
    with pytest.raises(UserError, match=message):
        build_model(tiny.model_settings(config=config))


def test_a_configuration_file_of_any_name_is_the_one_that_is_read(tmp_path) -> None:
    for layers, name in ((2, "config.json"), (3, "larger.json")):
        config = json.loads(json.dumps(tiny.TINY_QWEN2_VL))
        config["text_config"]["num_hidden_layers"] = layers
        (tmp_path / name).write_text(json.dumps(config))
    found = [load_config(tiny.model_settings(config=str(tmp_path / name))) for name in ("config.json", "larger.json")]
    assert [config.get_text_config().num_hidden_layers for config in found] == [2, 3]


def test_the_model_is_found_inside_what_wraps_it() -> None:
    """With adapters the modules are those that run, the adapters among them."""
    peft = pytest.importorskip("peft")
    model = build_model(tiny.model_settings())
    assert transformers_model(model) is model
    engine = torch.nn.Module()
    engine.module = model
    assert transformers_model(engine) is model
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    engine.module = adapted
    for wrapped in (adapted, engine):
        assert transformers_model(wrapped) is model
    assert hasattr(model.get_output_embeddings(), "lora_A")
