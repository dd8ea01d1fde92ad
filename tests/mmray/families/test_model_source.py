"""A model's folder that is missing is said to be missing, at once, and no hub name is made of it."""

from pathlib import Path

import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from mmray.errors import UserError
from mmray.families import load_processor, model_source
from mmray.families.model_source import source_problem
from mmray.training.model import load_config
from mmray.training.settings import ModelSettings


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("/nowhere/qwen", "no such folder"),
        ("./qwen", "no such folder"),
        ("~/qwen", "no such folder"),
        ("models/qwen/base", "no such folder"),
        ("qwen with spaces", "no such folder"),
        ("model/config.json", "no such file"),
    ],
)
def test_what_can_be_no_hub_name_is_missing(name: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "_hub_problem", lambda name: pytest.fail("the hub was asked"))
    assert source_problem(name) == problem


def test_what_is_there_can_be_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "_hub_problem", lambda name: pytest.fail("the hub was asked"))
    (tmp_path / "config.json").write_text("{}")
    assert source_problem(str(tmp_path)) is None
    assert source_problem(str(tmp_path / "config.json")) is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("no route"), "no such folder, and the Hugging Face hub cannot be reached"),
        (RepositoryNotFoundError, "no such folder, and the Hugging Face hub has no such model"),
    ],
)
def test_a_hub_name_is_looked_up_once(error: object, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def model_info(self: object, name: str, timeout: float) -> None:
        asked.append((name, timeout))
        if isinstance(error, type):
            raise error.__new__(error)
        raise error  # type: ignore[misc]

    monkeypatch.setattr(model_source.HfApi, "model_info", model_info)
    name = f"someone/{words.split()[-1]}"
    for _ in range(2):
        with pytest.raises(UserError, match=rf"^model\.path: cannot read a model configuration from {name}: {words}$"):
            load_config(ModelSettings(path=name))
        with pytest.raises(UserError, match=words):
            load_processor(name)
    assert asked == [(name, model_source.REACH_SECONDS)]
