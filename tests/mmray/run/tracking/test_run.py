"""What trackers are told of a job: everything but secrets; and which ones a job asks for."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

from mmray.base.settings import Settings
from mmray.errors import UserError
from mmray.run.tracking import TrackingSettings, git_commit, public_settings


class Inner(Settings):
    secret_access_key: str = "hush"
    hf_token: str | None = "hush"
    files: tuple[str, ...] = (
        "s3://bucket/part?.jsonl",
        "https://me:hush@host/pages.jsonl",
        "https://host/pages.jsonl?signature=hush&b=hush",
    )
    token_capacity: int = 8192


class Outer(Settings):
    inner: Inner = Inner()
    options: dict[str, object]


def test_settings_are_shown_without_secrets() -> None:
    public = public_settings(Outer(options={"password": "hush", "steps": 3, "passwords": ["hush"]}))
    assert "hush" not in str(public)
    assert public == {
        "inner": {
            "secret_access_key": "(hidden)",
            "hf_token": "(hidden)",
            "files": [
                "s3://bucket/part?.jsonl",
                "https://(hidden)@host/pages.jsonl",
                "https://host/pages.jsonl?(hidden)",
            ],
            "token_capacity": 8192,
        },
        "options": {"password": "(hidden)", "steps": 3, "passwords": ["(hidden)"]},
    }


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    commit = git_commit(tmp_path)
    assert commit
    assert len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"


def test_a_tracker_is_one_line() -> None:
    tracking = TrackingSettings.model_validate({"wandb": "pages", "mlflow": {"uri": "http://host:5000"}})
    assert tracking.wandb
    assert tracking.wandb.project == "pages"
    assert list(tracking.trackers()) == ["wandb", "mlflow"]
    assert TrackingSettings().trackers() == {}


def test_a_missing_library_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    TrackingSettings().check()
    with pytest.raises(UserError, match=r"tracking.wandb: the library wandb is not installed.*pip install .*trackers"):
        TrackingSettings.model_validate({"wandb": "pages"}).check()
