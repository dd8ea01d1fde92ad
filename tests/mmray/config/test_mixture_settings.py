"""`mixture` and `stages` of a job file: what is read, and each mistake in one line that says where and what to do."""

from pathlib import Path

import pytest
import yaml

from mmray.config.job import load_job
from mmray.errors import UserError
from tests.mmray.config.test_job import LEAST

A, B = {"prepared": "/data/pages/prepared", "weight": 0.7}, {"prepared": "s3://bucket/texts/output", "weight": 3}


def load(folder: Path, **changes: object) -> object:
    content = yaml.safe_load(LEAST) | changes
    (folder / "job.yaml").write_text(yaml.safe_dump(content))
    return load_job(folder / "job.yaml")


def test_a_mixture_is_read_with_its_paths_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parts = [A, B, {"prepared": "chats/prepared", "weight": 1}, {"prepared": "/x/train", "weight": 0, "name": "later"}]
    stages = [{"until": 5, "weights": [1, 0, 0, 0]}, {"until": 9, "weights": [0, 0, 0, 1]}]
    job = load(tmp_path, mixture=parts, stages=stages)
    assert [part.shown_name for part in job.mixture] == ["pages", "texts", "chats", "later"]  # type: ignore[attr-defined]
    assert job.trained_paths("train") == (  # type: ignore[attr-defined]
        "/data/pages/prepared/train", "s3://bucket/texts/output/train", f"{tmp_path}/chats/prepared/train",
        "/x/train/train",
    )  # fmt: skip
    assert job.trained_paths("eval") == (f"{tmp_path}/out/prepared/eval",)  # type: ignore[attr-defined]
    assert load(tmp_path).trained_paths("train") == (f"{tmp_path}/out/prepared/train",)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": [A | {"weight": -1}]}, r"mixture.0.weight: Input should be greater than or equal to 0"),
        ({"mixture": [A | {"weight": float("nan")}]}, r"mixture.0.weight: Input should be"),
        ({"mixture": [A | {"weights": 1}]}, r"mixture.0.weights: unknown key; did you mean 'weight'\?"),
        ({"mixture": [A | {"weight": 0}]}, r"mixture: one weight must be above 0"),
        (
            {"mixture": [A, B | {"weight": 1e-9}]},
            r"mixture: weight 1e-09 is a share of 1.4e-09, below one bin in a mil",
        ),
        ({"mixture": [A, A]}, r"two datasets have the prepared '/data/pages/prepared'; write it once, with the sum"),
        ({"mixture": [A, B | {"name": "pages"}]}, r"mixture: two datasets have the name 'pages'; give each a name"),
        ({"stages": [{"until": 5, "weights": [1]}]}, r"stages are those of a mixture, and the job has none"),
        (
            {"mixture": [A, B], "stages": [{"until": 5, "weights": [1]}]},
            r"stages.0.weights has 1 weights, and mixture 2",
        ),
        (
            {"mixture": [A, B], "stages": [{"until": 5, "weights": [0, 0]}]},
            r"stages.0.weights: one weight must be above",
        ),
        (
            {"mixture": [A], "stages": [{"until": 5, "weights": [1]}, {"until": 5, "weights": [1]}]},
            r"stages: the steps in until must grow from stage to stage, got \[5, 5\]",
        ),
        (
            {"mixture": [A], "training": {"epochs": 1}},
            r"training.epochs: the datasets of a mixture end their epochs at",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as mistake:
        load(tmp_path, **changes)
    assert len(str(mistake.value).splitlines()) == 2
