"""Published configurations made small: the same classes and kinds of layers, and a model can be built of each."""

import pytest
import torch
from transformers import AutoConfig

from mmray.doctor.shrink import shrunken
from mmray.families import FAMILIES
from mmray.training.model import _model_class
from tests.mmray.families.zoo import ZOO

MODEL_TYPES = sorted({member.model_type for member in ZOO.values() if not member.missing + member.missing_for_model})
MAX_PARAMETERS = 1.2e9
"""The default vision tower of Qwen2.5-VL in transformers is as wide as its text model."""


def published(model_type):
    """The defaults of the configuration's class, which are a published model's."""
    config = AutoConfig.for_model(model_type)
    config._attn_implementation = "sdpa"
    return config


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_copy_is_small_and_of_the_same_kind(model_type):
    config = published(model_type)
    small = shrunken(config)
    assert type(small) is type(config)
    assert small._attn_implementation == "sdpa"
    with torch.device("meta"):
        model = _model_class(small).from_config(small)
    assert sum(parameter.numel() for parameter in model.parameters()) < MAX_PARAMETERS
    text, small_text = config.get_text_config(), small.get_text_config()
    assert small_text.vocab_size == text.vocab_size
    assert 2 <= small_text.num_hidden_layers < text.num_hidden_layers
    assert small_text.hidden_size <= text.hidden_size
    if hasattr(text, "layer_types"):
        assert set(small_text.layer_types) == set(text.layer_types)
        assert len(small_text.layer_types) == small_text.num_hidden_layers


@pytest.mark.parametrize(
    "name", [name for name, member in ZOO.items() if not member.missing + member.missing_for_model]
)
def test_small_models_stay_what_they_are(name, tmp_path):
    """A configuration that is small already still gives a model, for the same tokens."""
    ZOO[name].write_processor(tmp_path)
    config = ZOO[name].config(tmp_path)
    small = shrunken(config)
    with torch.device("meta"):
        _model_class(small).from_config(small)
    assert small.get_text_config().vocab_size == config.get_text_config().vocab_size


def test_every_family_is_tried():
    known = {model_type for family in FAMILIES for model_type in family.model_types}
    missing = {member.model_type for member in ZOO.values() if member.missing + member.missing_for_model}
    assert known - missing <= set(MODEL_TYPES)
