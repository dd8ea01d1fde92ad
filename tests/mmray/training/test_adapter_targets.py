"""What an adapter touches, and what is told where a name means nothing."""

import copy

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from pydantic import ValidationError

from mmray.errors import UserError
from mmray.families import model_parts
from mmray.training.adapter import Adapter
from mmray.training.adapter_settings import AdapterSettings
from mmray.training.adapter_targets import AdapterTargets
from mmray.training.base_weights import BaseFiles
from mmray.training.model import build_model, empty_model
from mmray.training.settings import ModelSettings, check_quantised
from tests.mmray.training import tiny

LAYER = "model.language_model.layers.0"


@pytest.fixture(scope="module")
def model():
    return empty_model(tiny.model_settings())


def test_a_part_stands_for_its_linear_layers_and_a_pattern_for_names(model):
    language = AdapterTargets.of(model, AdapterSettings())
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name.rsplit(".", 1)[-1] for name in language.modules} == set(layers)
    assert len(language.modules) == 14
    for pattern, expected in {
        "q_proj": 2, f"{LAYER}.self_attn.q_proj": 1, "layers.0.mlp": 3, "model.visual.*.qkv": 2, "mlp.0": 1,
    }.items():  # fmt: skip
        assert len(AdapterTargets.of(model, AdapterSettings(parts=(pattern,))).modules) == expected, pattern
    both = AdapterTargets.of(model, AdapterSettings(parts=("q_proj", "vision"), save_whole=("projector", "*norm2")))
    assert len(both.modules) == 2 + 8
    assert {name.rsplit(".", 2)[-2] for name in both.whole} == {"ln_q", "0", "2", "norm2"}


def test_a_name_that_matches_nothing_is_told_with_the_nearest(model):
    for changes, said in {
        ("parts", "languge"): "parts: 'languge' is no part of the model and matches no name in it; did you mean 'lang",
        ("parts", "qproj"): "did you mean 'q_proj' or",
        ("parts", "norm1"): "norm1 (2 times), but an adapter cannot be put on a LayerNorm; name linear layers, or",
        ("parts", "audio"): "audio of a Qwen2VLForConditionalGeneration has no linear layer to adapt",
        ("parts", "embeddings"): "embed_tokens and lm_head share one weight",
        ("parts", "zzz"): "matches no name in it; parts are vision, projector, language, embeddings",
        ("save_whole", "projectr"): "save_whole: 'projectr' is no part of the model and matches no name in it; did you",
        (
            "save_whole",
            "lm_head",
        ): "'lm_head' is one weight with model.language_model.embed_tokens.weight (lm_head.weight",
        ("save_whole", "rotary_emb"): "save_whole: 'rotary_emb' has no weights to train; name modules or weights",
        ("save_whole", "down_proj"): "down_proj.weight (2 times) would be adapted (parts) and trained whole",
    }.items():
        setting, name = changes
        with pytest.raises(UserError) as caught:
            AdapterTargets.of(model, AdapterSettings(**{setting: (name,)}))
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_touched_is_listed_for_a_person(model):
    settings = AdapterSettings(parts=("language",), save_whole=("ln_q",))
    text = AdapterTargets.of(model, settings).in_words(model, model_parts(model))
    assert "adapted in language: q_proj (2), k_proj (2)" in text
    assert "trained whole: ln_q (1), ln_q.bias (1)" in text
    assert "other weights stay as they are: 25 of vision, 4 of projector, 1 of embeddings, 11 of language" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 0}, "greater than or equal to 1"),
        ({"dropout": 1.0}, "less than 1"),
        ({"parts": []}, "at least 1 item"),
        ({"parts": ["vision"], "save_whole": ["vision"]}, "it is either adapted or trained whole"),
        ({"kind": "ia3"}, "'lora' or 'dora'"),
    ],
)
def test_settings_that_cannot_be(changes, said):
    with pytest.raises(ValidationError, match=said):
        AdapterSettings(**changes)


def test_the_random_matrices_depend_on_the_seed_alone():
    def drawn(seed, noise):
        torch.manual_seed(noise)
        model = build_model(tiny.model_settings())
        Adapter.of(tiny.model_settings(), AdapterSettings(), None).put_into(model, seed)
        return model.get_parameter(f"{LAYER}.self_attn.q_proj.lora_A.default.weight").detach()

    assert torch.equal(drawn(1, 5), drawn(1, 6))
    assert not torch.equal(drawn(1, 5), drawn(2, 5))


# ---- In four bits ----


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """The settings of a quantised model: widths of 64 and 96, and one of 70."""
    config = copy.deepcopy(tiny.TINY_QWEN2_VL)
    config["text_config"]["intermediate_size"] = 70
    folder = tmp_path_factory.mktemp("quantised")
    build_model(tiny.model_settings(config=config)).save_pretrained(folder)
    return ModelSettings(path=str(folder), dtype="fp32", quantize="nf4")


def test_the_language_model_alone_is_quantised_at_any_width(quantised):
    model = build_model(quantised)
    layers = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    plain = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert len(layers) == 14
    assert all(name.startswith("model.language_model.layers.") for name in layers)
    assert "lm_head" in plain
    assert all(name.startswith("model.visual.") for name in plain - {"lm_head"})


def test_evaluation_computes_as_training_does_and_training_goes_on(quantised):
    """bitsandbytes has a way of its own for evaluation on CPUs, after which weights cannot be trained beside."""
    settings = quantised.model_copy(update={"attention": "sdpa"})
    model = build_model(settings)
    Adapter.of(settings, AdapterSettings(), None).put_into(model)
    ids = torch.arange(3, 40)[None]

    def loss():
        return model(input_ids=ids, use_cache=False).logits.pow(2).mean()

    training = loss()
    model.eval()
    with torch.no_grad():
        assert loss().item() == pytest.approx(training.item(), rel=1e-6)
    model.train()
    again = loss()
    again.backward()
    assert again.item() == training.item()
    weight = model.get_parameter(f"{LAYER}.self_attn.q_proj.lora_B.default.weight")
    assert weight.grad is not None
    assert weight.grad.any()
    assert not any(".weight." in name for name in model.state_dict() if "base_layer" in name), "scales are of the base"


def test_what_quantised_weights_cannot_do_is_told(quantised):
    with pytest.raises(ValidationError, match="quantize is about the weights of path"):
        tiny.model_settings(quantize="nf4")
    adapter = tiny.training_settings(adapter={"rank": 2})
    check_quantised(quantised, adapter)
    for model, training, said in (
        (quantised, tiny.training_settings(), "weights in 4 bits cannot be trained themselves; set training.adapter"),
        (quantised, tiny.training_settings(adapter={"rank": 2}, zero_stage=3), "set zero_stage: 2"),
        (quantised.model_copy(update={"allow_missing": ("x",)}), adapter, "does not go with model.allow_missing"),
    ):
        with pytest.raises(UserError, match=said):
            check_quantised(model, training)
    with pytest.raises(UserError, match="would be quantised"):
        Adapter.of(quantised, AdapterSettings(parts=("vision",), save_whole=("q_proj",)), None)


# ---- The base ----


def test_a_base_is_known_by_its_files(quantised, tmp_path):
    files = BaseFiles.of(quantised.path)
    assert set(files.digests) == {"model.safetensors", "config.json"}
    assert BaseFiles.of(quantised.path) == files
    other = BaseFiles({**files.digests, "config.json": "0", "more.safetensors": "1"})
    with pytest.raises(UserError, match=r"x belongs to another base model: config.json, more.safetensors differ"):
        files.check_equal(other, "x")
    with pytest.raises(UserError, match="cannot find the weights"):
        BaseFiles.of(str(tmp_path))
