"""A model's configuration that stands in the job file: its values and keys are honoured or refused by name."""

import logging
from pathlib import Path

import pytest

from mmray.errors import UserError
from mmray.training.inline_config import check_inline_keys, inline_config
from tests.mmray.families.zoo import ZOO

SMALL = {"model_type": "qwen2_vl", "text_config": {"hidden_size": 64}, "vision_config": {"depth": 2}}


def checked(values):
    config = inline_config(values)
    check_inline_keys(config, values)
    return config


def test_values_arrive():
    config = checked(SMALL)
    assert (config.get_text_config().hidden_size, config.vision_config.depth) == (64, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2_vll"}, r"knows no model_type 'qwen2_vll'; did you mean 'qwen2_vl'\?"),
        ({"text_config": {"hidden_size": "wide"}}, r"a Qwen2VLConfig cannot be made of it: .*'hidden_size'.*'wide'"),
        ({"text_config": {"hiden_size": 64}}, r"model.config.text_config.hiden_size: unknown key; .*'hidden_size'\?"),
        ({"vision_config": {"embed_dimm": 8}}, r"model.config.vision_config.embed_dimm: unknown key; .*'embed_dim'\?"),
        ({"vision_confg": {}}, r"model.config.vision_confg: unknown key; did you mean 'vision_config'\?"),
    ],
)
def test_mistakes_are_named(changes, message):
    values = SMALL | changes
    if "vision_confg" in changes:
        del values["vision_config"]  # else it is no misspelling of what is there
    with pytest.raises(UserError, match=message):
        checked(values)


def test_what_resembles_nothing_is_told(caplog):
    with caplog.at_level(logging.WARNING, logger="mmray"):
        checked(SMALL | {"trained_by": "us"})
    assert "model.config.trained_by: transformers declares no such key" in caplog.text


@pytest.mark.parametrize("name", ZOO)
def test_a_configuration_written_out_is_taken_whole(name: str, tmp_path: Path):
    member = ZOO[name]
    for module in member.needs + member.model_needs:
        pytest.importorskip(module)
    member.write_processor(tmp_path)
    values = member.config(tmp_path).to_dict()
    assert checked(values).to_dict() == values
