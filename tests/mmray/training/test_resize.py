"""Tokens that were added to the tokenizer: told before work starts, or given vectors that are saved and resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from mmray.config.compatibility import check_token_ids
from mmray.errors import UserError
from mmray.families import load_family
from mmray.synthetic.models import small_config
from mmray.synthetic.processors import write_processor
from mmray.training.model import build_model, load_config
from mmray.training.settings import ModelSettings
from tests.mmray.training import resized
from tests.mmray.training.ranks import RankGroup


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of Qwen2-VL and its processor, to whose tokenizer two tokens were added."""
    folder = tmp_path_factory.mktemp("added")
    write_processor(folder, "qwen2_vl")
    config = small_config("qwen2_vl", folder, tie_word_embeddings=True).to_dict()
    build_model(ModelSettings(config=config, dtype="fp32", seed=3)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.add_tokens(["<page>", "<line>"]) == 2
    tokenizer.save_pretrained(folder)
    return folder


def settings(folder: Path, **changes: Any) -> ModelSettings:
    return ModelSettings(path=str(folder), dtype="fp32", **changes)


def test_an_id_without_a_vector_is_told(folder: Path) -> None:
    config = load_config(settings(folder))
    rows, family = config.get_text_config().vocab_size, load_family(folder, model_type="qwen2_vl")
    with pytest.raises(UserError) as error:
        check_token_ids(config, family, settings(folder))
    assert f"ids up to {rows + 1}, the model has vectors up to {rows - 1}" in str(error.value)
    assert "'<page>', '<line>'. Set model.resize_embeddings: true" in str(error.value)
    check_token_ids(config, family, settings(folder, resize_embeddings=True))


def test_new_vectors_are_the_mean_of_the_others_and_are_saved(folder: Path, tmp_path: Path) -> None:
    before = build_model(settings(folder)).get_input_embeddings().weight
    model = build_model(settings(folder, resize_embeddings=True))
    after = model.get_input_embeddings().weight
    assert len(after) == len(before) + 2 == len(AutoTokenizer.from_pretrained(folder))
    torch.testing.assert_close(after[:-2], before, rtol=0, atol=0)
    torch.testing.assert_close(after[-2:], before.mean(0).expand(2, -1), rtol=0, atol=1e-5)
    assert model.get_output_embeddings().weight is after
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(loaded.get_input_embeddings().weight, after, rtol=0, atol=0)
    assert build_model(settings(tmp_path, processor=str(folder))).config.get_text_config().vocab_size == len(after)


def test_nothing_changes_where_every_token_has_one(tmp_path: Path) -> None:
    write_processor(tmp_path, "qwen2_vl")
    config = small_config("qwen2_vl", tmp_path).to_dict()
    random = {"config": config, "dtype": "fp32", "processor": str(tmp_path)}
    expected = build_model(ModelSettings(**random)).state_dict()
    resized_model = build_model(ModelSettings(**random, resize_embeddings=True))
    torch.testing.assert_close(resized_model.state_dict(), expected, rtol=0, atol=0)


def test_new_vectors_train_and_are_resumed(folder: Path, tmp_path: Path) -> None:
    """The same at every stage, and from a checkpoint."""
    (found,) = RankGroup(1, resized.trained_and_resumed, folder, tmp_path).results()
    for whole, resumed in found.values():
        assert whole == pytest.approx(found[0][0], rel=1e-5)
        assert resumed == pytest.approx(whole[1:], rel=1e-6)
        assert whole[-1] < whole[0] - 0.1
