"""Mixtures by the jobs: what is refused before work starts and what a dry run says, without a cluster; and a run under
Ray Train, with another number of workers and other weights, against the same without Ray."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

from jobs import dry_run
from jobs import train as train_command
from jobs.checks import open_prepared
from jobs.training import train, with_data
from mmray import doctor
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.prepared.joined import PreparedMixture
from mmray.run.history import read_history
from mmray.run.metrics import read_metrics
from mmray.training.bins_log import read_trained
from tests.conftest import Inputs, RayHead
from tests.here import prepare_here, train_here

NAMES = ("pages", "chats", "texts")
FIRST, SECOND = (5, 3, 2), (1, 1, 2)


def rows_of(inputs: Inputs, folder: Path, name: str) -> dict[str, object]:
    data = inputs.folder / "data"
    files = {"pages": data / "pages.jsonl", "chats": data / "chat.jsonl", "texts": folder / "texts.jsonl"}
    return {"train": [{"files": str(files[name]), "kind": "chat" if name == "chats" else "pretrain"}]}


@pytest.fixture(scope="module")
def folder(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three prepared datasets, each in the folder of its name."""
    folder = tmp_path_factory.mktemp("mixtures")
    lines = [{"id": str(number), "text": f"Total {number} " * (number % 9 + 20)} for number in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in NAMES:
        output = {"prepared": str(folder / name / "prepared"), "run": "unused"}
        prepare_here(Job.model_validate(inputs.job(folder, data=rows_of(inputs, folder, name), output=output)))
    return folder


def content(inputs: Inputs, folder: Path, run: str, weights: tuple[float, ...], **changes: Any) -> dict[str, Any]:
    mixture = [{"prepared": str(folder / name / "prepared"), "weight": weight} for name, weight in zip(NAMES, weights)]
    return inputs.job(folder, **{"output__run": str(folder / run), "mixture": mixture, **changes})


def test_datasets_that_do_not_fit_are_refused_with_what_differs(inputs: Inputs, folder: Path, tmp_path: Path) -> None:
    """The mixture's own rows are not the job's: only what training shares with preparing is compared."""
    data = open_prepared(Job.model_validate(content(inputs, folder, "any", FIRST)))["train"]
    assert isinstance(data, PreparedMixture)
    assert [dataset.name for dataset in data.mixture.datasets] == list(NAMES)
    for changes, difference in (
        ({"packing__visual_capacity": 300}, r"packing\.visual_capacity: 256 -> 300"),
        ({"loss": {"roles": ["assistant"]}}, r"loss: 'sampled' -> "),
        ({"images": {"grid": [1, 1], "tile_size": [112, 112]}}, r"tiling\."),
    ):
        with pytest.raises(UserError, match=rf"(?s)pages/prepared/train cannot be mixed in: .*{difference}"):
            open_prepared(Job.model_validate(content(inputs, folder, "any", FIRST, **changes)))  # type: ignore[arg-type]
    window = Job.model_validate(content(inputs, folder, "any", FIRST, packing__window_rows=32))
    assert len(open_prepared(window)["train"]) == len(data), "how rows were put into windows is no matter"
    missing = [{"prepared": str(tmp_path), "weight": 1}]
    with pytest.raises(UserError, match=r"train is no prepared dataset: it has no manifest\.json"):
        open_prepared(Job.model_validate(content(inputs, folder, "any", FIRST, mixture=missing)))


def test_continue_on_takes_the_jobs_mixture_or_a_folder(inputs: Inputs, folder: Path) -> None:
    job = Job.model_validate(content(inputs, folder, "any", FIRST))
    assert with_data(job, "mixture") == job
    alone = with_data(job, str(folder / "pages" / "prepared"))
    assert (alone.mixture, alone.output.prepared) == ((), str(folder / "pages" / "prepared"))
    with pytest.raises(UserError, match=r"--continue-on mixture: the job has none; write mixture into the job file"):
        with_data(alone, "mixture")


def test_a_dry_run_tells_shares_and_epochs(
    inputs: Inputs, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dry_run.console, "_width", 400)
    monkeypatch.setattr(doctor, "examine_model", lambda *_: iter(()))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    stages = [{"until": 6, "weights": [1, 0, 0]}]
    job = content(inputs, folder, "planned", FIRST, stages=stages, training__steps=16)
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    with pytest.raises(typer.Exit):
        train_command.main(tmp_path / "job.yaml", [], dry_run=True)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    data = open_prepared(Job.model_validate(job))["train"]
    assert isinstance(data, PreparedMixture)
    pages, chats, _ = data.parts
    assert f"pages 100.00% of the bins now, {(6 * 4 + 20) / len(pages):.3g} epochs of its {len(pages)} bins" in shown
    assert f"chats 0.00% of the bins now, {12 / len(chats):.3g} epochs of its {len(chats)} bins in all steps" in shown
    assert "stage until step 6: weights 1, 0, 0" in shown
    assert "steps 16 " in shown


def test_a_mixture_goes_on_under_ray_as_in_one_go(ray_head: RayHead, inputs: Inputs, folder: Path) -> None:
    """A run of two ranks without Ray goes on under Ray with three workers and other weights: the same bins and losses
    as on two ranks. How a mixture goes on after a kill, and on other numbers of ranks, is shown there; that a worker of
    Ray is killed, in test_train.py."""
    train_here(Job.model_validate(content(inputs, folder, "whole", FIRST, training__steps=5)), ranks=2)
    shutil.copytree(folder / "whole", folder / "chained")
    second = Job.model_validate(content(inputs, folder, "whole", SECOND, training__steps=10))
    whole = train_here(second, ranks=2, continue_on=True)

    run = folder / "chained"

    resources = {"workers": 3, "cpus_per_worker": 0.5, "encode_actors": 2}
    job = Job.model_validate(content(inputs, folder, "chained", SECOND, training__steps=10, resources=resources))
    with pytest.raises(UserError, match=r"(?s)pages: share 50\.0000% -> 25\.0000%.*give --continue-on mixture"):
        train(job, open_prepared(job))
    train(job, open_prepared(job), continue_on=True)

    ours, theirs = read_trained(run), read_trained(folder / "whole")
    assert [step.named_bins for step in ours] == [step.named_bins for step in theirs]
    assert [step.workers for step in ours] == [2] * 5 + [3] * 5
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))
    for number, (line, expected) in enumerate(zip(lines, whole, strict=True)):
        tolerance = 1e-6 if number < 5 else 1e-3
        assert line["loss"] == pytest.approx(expected["loss"], rel=tolerance)
        losses, expected_losses = (
            {name: loss for name, loss in each["loss_by_set"].items() if loss is not None} for each in (line, expected)
        )
        assert losses == pytest.approx(expected_losses, rel=10 * tolerance)
        assert line["bins_by_dataset"] == expected["bins_by_dataset"]
    changes = [event["step"] for event in read_history(run) if event["event"] == "continue_on"]
    assert changes == [5]
