"""Every kind of model in shards: loaded from files as they were saved, and trained by ranks with other pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmray.training.model import build_model
from mmray.training.settings import ModelSettings
from tests.mmray.families import sharded
from tests.mmray.families.zoo import ZOO
from tests.mmray.training.ranks import RankGroup

MEMBERS = [name for name, member in ZOO.items() if not member.missing and not member.missing_for_model]
"""Those whose model and processor can be built here."""


@pytest.fixture(scope="module")
def saved_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By member: its folder, with a model as transformers saves it and its weights beside."""
    folders = {}
    for name in MEMBERS:
        member, folder = ZOO[name], tmp_path_factory.mktemp("saved")
        member.write_processor(folder)
        config = member.config(folder).to_dict()
        model = build_model(ModelSettings(config=config, dtype="fp32", attention=member.attentions[0], seed=7))
        model.save_pretrained(folder / "model")
        torch.save({name: weight.data for name, weight in model.named_parameters()}, folder / "saved.pt")
        folders[name] = folder
    return folders


@pytest.fixture(scope="module")
def differences(saved_folders: dict[str, Path]) -> dict[str, str]:
    """By member: what `sharded.loaded` of two ranks says of its folder."""
    first, second = RankGroup(2, sharded.loaded, saved_folders).results()
    assert first == second
    return first


@pytest.fixture(scope="module")
def steps(saved_folders: dict[str, Path]) -> dict[str, str]:
    """By member: what `sharded.stepped` says of its folder."""
    return RankGroup(1, sharded.stepped, saved_folders).results()[0]


@pytest.fixture(scope="module")
def frozen_steps(saved_folders: dict[str, Path]) -> dict[str, str]:
    """By member: what `sharded.stepped_frozen` says of its folder."""
    return RankGroup(1, sharded.stepped_frozen, saved_folders).results()[0]


@pytest.mark.parametrize("name", MEMBERS)
def test_frozen_parts_stay_and_the_others_train_under_every_zero_stage(name: str, frozen_steps: dict[str, str]) -> None:
    assert frozen_steps[name] == ""


@pytest.mark.parametrize("name", MEMBERS)
def test_saved_weights_train_under_zero_2(name: str, steps: dict[str, str]) -> None:
    assert steps[name] == ""


@pytest.mark.parametrize("name", MEMBERS)
def test_saved_weights_are_loaded_whole_and_in_shards(name: str, differences: dict[str, str]) -> None:
    assert differences[name] == ""


@pytest.mark.parametrize("name", ["paddleocr_vl", "qwen3_vl_moe"])
def test_ranks_with_other_numbers_of_pictures_train_as_one(name: str, zoo_folder: Callable[[str], Path]) -> None:
    """5, 1 and no pictures on three ranks of ZeRO-3; all on one rank of stage 0."""
    three = RankGroup(3, sharded.trained, name, zoo_folder(name), 3)
    (alone,) = RankGroup(1, sharded.trained, name, zoo_folder(name), 0).results()
    ranks: list[Any] = three.results(timeout_seconds=120)
    assert ranks[0] == ranks[1] == ranks[2]
    for found, expected in zip(ranks[0]["all"] + ranks[0]["frozen"], alone["all"] + alone["frozen"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert found["trained_tokens"] == expected["trained_tokens"] > 0
        if name == "qwen3_vl_moe":
            assert found["router_loss"] == pytest.approx(expected["router_loss"], rel=1e-5)
            assert 1 < found["router_loss"] < 4
        else:
            assert found["router_loss"] is None
    assert alone["all"][-1]["loss"] < alone["all"][0]["loss"] - 0.1
    assert alone["frozen"][0]["loss"] == pytest.approx(alone["all"][0]["loss"], rel=1e-6)
    assert alone["frozen"][-1]["grad_norm"] < alone["all"][-1]["grad_norm"], "of what is trained alone"
