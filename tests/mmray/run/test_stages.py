"""A run in stages: one command from the first to the last, stopped and resumed around a border with other workers."""

from pathlib import Path
from typing import Any

import pytest

from mmray.errors import UserError
from mmray.run.checkpoints import newest_looking_whole
from mmray.run.history import in_words, read_history
from mmray.training.part_report import check_resumed
from tests.conftest import Inputs
from tests.here import prepare_here, train_here
from tests.mmray.run.test_loop import Diary, StopsAt, job_in

PROJECTOR = {"vision": "frozen", "language": "frozen", "embeddings": "frozen", "projector": {"learning_rate": 1e-3}}
STAGED = {
    "training__steps": 5, "training__stages": [{"steps": 3, "parts": PROJECTOR}],
    "training__parts": {"vision": "frozen"}, "training__eval_every_steps": 3, "training__checkpoint_every_steps": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    for split in ("train", "eval"):
        prepare_here(job_in(inputs, folder, "unused"), split)
    return folder


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_goes_through_its_stages_and_resumes_at_a_border(inputs: Inputs, folder: Path, tmp_path: Path) -> None:
    diary = Diary(tmp_path / "diary")
    whole = train_here(job_in(inputs, folder, "whole", **STAGED), diary, ranks=2)
    steps = [line for line in whole if "loss" in line]
    assert [line["stage"] for line in steps] == [1, 1, 1, 2, 2]
    assert [set(line.get("lr_by_part", {})) for line in steps] == [{"projector"}] * 3 + [set()] * 2
    events = [(event["event"], event["step"]) for event in read_history(folder / "whole")]
    assert events == [
        ("start", 0), ("stage", 0), ("checkpoint", 3), ("stage", 3), ("checkpoint", 5), ("finish", 5),
    ]  # fmt: skip
    told = [in_words(event) for event in read_history(folder / "whole") if event["event"] == "stage"]
    assert (
        told[0]
        == "stage 1 of 2 begins after step 0: vision frozen, projector trained, language frozen, embeddings frozen"
    )
    assert (
        told[1]
        == "stage 2 of 2 begins after step 3: vision frozen, projector trained, language trained, embeddings trained"
    )
    assert [name for name, *_ in diary.entries()].count("at_start") == 1, "callbacks live through a border"

    job = job_in(inputs, folder, "stopped", **STAGED)
    train_here(job, StopsAt(3, "after"), ranks=2)
    resumed = train_here(job_in(inputs, folder, "stopped", **STAGED | {"training__max_failures": 5}), ranks=3)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)
    assert [line["eval_loss"] for line in resumed if "eval_loss" in line] == pytest.approx(
        [line["eval_loss"] for line in whole if "eval_loss" in line], rel=1e-6
    )
    history = read_history(folder / "stopped")
    events = [(event["event"], event["step"]) for event in history]
    assert events[-5:] == [("stop", 3), ("resume", 3), ("stage", 3), ("checkpoint", 5), ("finish", 5)]
    assert history[-4]["changed"] == {"training.max_failures": [3, 5]}, "what a person changes is kept"
    assert in_words(history[-4]).endswith("with 3 workers; training.max_failures was 3, is 5")


def test_other_parts_are_refused_before_a_worker_starts(inputs: Inputs, folder: Path) -> None:
    checkpoint = newest_looking_whole(folder / "whole")
    assert checkpoint is not None
    job = job_in(inputs, folder, "whole", **STAGED)
    check_resumed(checkpoint, job.model, job.training, 9)
    other = job_in(inputs, folder, "whole", **STAGED | {"training__parts": {"language": "frozen"}})
    with pytest.raises(
        UserError, match=r"trained other weights in step 5 than training\.parts says \(now frozen: .*lang"
    ):
        check_resumed(checkpoint, other.model, other.training, 9)
    stages = [*STAGED["training__stages"], {"steps": 2, "parts": {"vision": "frozen"}}]
    longer = STAGED | {"training__steps": 9, "training__stages": stages, "training__parts": {"language": "frozen"}}
    job = job_in(inputs, folder, "whole", **longer)
    check_resumed(checkpoint, job.model, job.training, 9)
