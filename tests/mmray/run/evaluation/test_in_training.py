"""Evaluation during training: its numbers and files, and that training's own numbers know nothing of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from mmray.cli import app
from mmray.config.job import Job
from mmray.prepared import PreparedDataset
from mmray.run.callback import Callback, Evaluation, Loop
from mmray.run.evaluation.callback import PROGRESS_FILE
from mmray.run.evaluation.in_training import chosen_rows, dealt_rows
from mmray.run.evaluation.model import EvaluatedModel
from mmray.run.evaluation.rows import EvaluationData
from mmray.run.evaluation.standalone import EvaluationPlan, evaluate
from mmray.run.evaluation.warnings import evaluation_warnings
from mmray.run.export import export_finished
from mmray.run.history import read_history
from mmray.run.scoring.settings import EvaluationSettings
from mmray.training.model import build_model
from tests.conftest import Inputs
from tests.here import prepare_here, train_here

EVALUATION = {"every_steps": 2, "generate": {"rows": 6, "max_new_tokens": 4, "batch_rows": 2}}


@pytest.fixture(scope="module")
def folder(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluating")
    for split in ("train", "eval"):
        prepare_here(job_in(inputs, folder, "unused"), split)
    return folder


def job_in(inputs: Inputs, folder: Path, run: str, **changes: object) -> Job:
    data = inputs.folder / "data"
    rows = [
        {"files": str(data / "pages.jsonl"), "kind": "pretrain"}, {"files": str(data / "chat.jsonl"), "kind": "chat"},
    ]  # fmt: skip
    settings = {
        "training__steps": 5, "training__checkpoint_every_steps": None, "data__eval": rows,
        "output__run": str(folder / run), **changes,
    }  # fmt: skip
    return Job.model_validate(inputs.job(folder, **settings))


def train_numbers(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines if "loss" in line]


class _ProgressIsGone(Callback):
    """The file with the progress of an evaluation, which the driver shows, is gone when rank 0 is done with it."""

    def __init__(self, run: Path) -> None:
        self.file = run / PROGRESS_FILE

    def on_evaluation(self, loop: Loop, evaluation: Evaluation) -> None:
        assert torch.distributed.get_rank() or not self.file.exists()


@pytest.mark.parametrize(("stage", "ranks"), [(2, 1), (3, 2)])
def test_training_s_numbers_are_equal_to_the_bit(inputs: Inputs, folder: Path, stage: int, ranks: int) -> None:
    """Also where ranks read in step, under ZeRO-3."""
    name = f"stage-{stage}"
    without = train_here(job_in(inputs, folder, f"{name}-off", training__zero_stage=stage), ranks=ranks)
    job = job_in(inputs, folder, f"{name}-on", training__zero_stage=stage, evaluation=EVALUATION)
    lines = train_here(job, _ProgressIsGone(folder / f"{name}-on"), ranks=ranks)
    assert train_numbers(lines) == train_numbers(without)
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [2, 4, 5], "every two steps, and at the end"
    run = folder / f"{name}-on"
    for line in evaluations:
        by_set = line["eval_loss_by_set"]
        assert set(by_set) == {"0", "1"}
        assert min(by_set.values()) < line["eval_loss"] < max(by_set.values())
        shares = line["eval_token_accuracy_by_set"].values()
        assert 0 <= min(shares) <= line["eval_token_accuracy"] <= max(shares) <= 1
        assert line["eval_seconds"] > 0
        results = run / "evaluations" / f"{line['step']:08d}"
        values = json.loads((results / "metrics.json").read_text())
        assert values["all"]["cer"] == line["eval_cer"]
        assert values["all"]["texts"] == values["all"]["rows"] == 6
        rows = pq.read_table(results / "predictions.parquet").to_pylist()
        assert len({row["id"] for row in rows}) == 6
        assert {row["set"] for row in rows} == {"0", "1"}
        assert all(row["reference"] for row in rows)
        assert any(row["picture"] for row in rows)
        assert "data:image/jpeg" in (results / "report.html").read_text()


def test_what_training_reads_is_what_the_checkpoint_reads(inputs: Inputs, folder: Path) -> None:
    """The same rows of the last step, by `jobs/evaluate.py`'s own way from the row files."""
    job = job_in(inputs, folder, "stage-2-on", evaluation=EVALUATION)
    data = EvaluationData.of(job, "eval")
    plan = EvaluationPlan(
        job, EvaluatedModel.find(job), data, EvaluationSettings.model_validate({**EVALUATION, "normalisation": {}})
    )
    before = pq.read_table(Path(plan.folder) / "predictions.parquet").to_pylist()
    values, _ = evaluate(plan)
    after = {row["id"]: row for row in pq.read_table(Path(plan.folder) / "predictions.parquet").to_pylist()}
    assert len(before) == 6
    for row in before:
        assert after[row["id"]]["reference"] == row["reference"]
        assert after[row["id"]]["prediction"] == row["prediction"]
    (last,) = (
        line for line in map(json.loads, (folder / "stage-2-on" / "metrics.jsonl").read_text().splitlines())
        if "eval_loss" in line and line["step"] == 5
    )  # fmt: skip
    assert values["all"]["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


def test_a_run_with_an_adapter_is_evaluated_resumed_and_exported(inputs: Inputs, folder: Path) -> None:
    """On a base of files, in four bits: what training reads is what its best checkpoint reads, from its export too."""
    base = folder / "base"
    shutil.copytree(inputs.folder / "processor", base)
    build_model(job_in(inputs, folder, "unused").model).save_pretrained(base)
    changes = {
        "model__path": str(base), "model__config": None, "model__quantize": "nf4", "evaluation": EVALUATION,
        "training__adapter": {"rank": 4, "parts": ["language"], "save_whole": ["projector"], "dropout": 0.1},
        "keep_best": {"metric": "eval_loss"},
    }  # fmt: skip
    whole = train_here(job_in(inputs, folder, "adapter-whole", **changes))
    train_here(job_in(inputs, folder, "adapter", **changes | {"training__steps": 3}))
    job = job_in(inputs, folder, "adapter", **changes)
    lines = train_here(job)
    assert train_numbers(lines) == train_numbers(whole), "dropout's draws go on"
    evaluations = {line["step"]: line for line in lines if "eval_loss" in line}
    best = min(evaluations, key=lambda step: evaluations[step]["eval_loss"])
    settings = EvaluationSettings.model_validate({**EVALUATION, "normalisation": {}})
    model = EvaluatedModel.find(job, checkpoint="best")
    assert model.step == best
    values, _ = evaluate(EvaluationPlan(job, model, EvaluationData.of(job, "eval"), settings), replace=True)
    assert values["all"]["loss"] == pytest.approx(evaluations[best]["eval_loss"], rel=1e-5)
    exported = export_finished(job.output.run, job.model)
    assert exported.step == 5
    base_model = EvaluatedModel.find(job, folder="base").load(job, torch.device("cpu"))
    assert type(base_model.model.language_model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


def test_rows_are_chosen_by_sets_and_dealt_in_rounds_of_one_kind(inputs: Inputs, folder: Path) -> None:
    prepared = PreparedDataset(str(folder / "prepared" / "eval"))
    rows = chosen_rows(prepared, 12, None)
    assert {row.set for row in rows} == {0, 1}
    assert abs(len(rows) - 12) <= 1
    assert len(set(rows)) == len(rows)
    assert {row.set for row in chosen_rows(prepared, 5, [1])} == {1}
    assert chosen_rows(prepared, 0, None) == []
    for world_size in (1, 2, 3):
        rounds = dealt_rows(rows, world_size, 4)
        assert {row for number in rounds for rank in number for row in rank} == set(rows)
        for number in rounds:
            assert len(number) == world_size
            assert len({len(rank) for rank in number}) == 1
            assert len({row.has_images for rank in number for row in rank}) == 1


def test_the_best_checkpoint_is_kept_across_a_resume_and_a_run_ends_early(inputs: Inputs, folder: Path) -> None:
    """The rate is so high that later evaluations are worse than the first."""
    changes: dict[str, object] = {
        "training__steps": 8, "training__learning_rate": 2.0, "training__keep_checkpoints": 1,
        "training__max_grad_norm": None,
        "evaluation": {"every_steps": 1, "generate": {"rows": 0}}, "keep_best": {"metric": "eval_loss"},
    }  # fmt: skip
    train_here(job_in(inputs, folder, "best", **{**changes, "training__steps": 3}), ranks=2)
    early = {"metric": "eval_loss", "patience": 4}
    job = job_in(inputs, folder, "best", **changes, early_stopping=early)
    lines = train_here(job, ranks=1)
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    steps = sorted(int(path.name.split("_")[1]) for path in (folder / "best").glob("checkpoint_*"))
    assert steps == sorted({best, max(losses)})
    assert EvaluatedModel.find(job, checkpoint="best").step == best
    weights = []
    for name, choice in (("best", ["--best"]), ("step", ["--step", str(best)]), ("last", [])):
        out = folder / f"exported-{name}"
        done = CliRunner().invoke(app, ["export", str(folder / "best"), str(out), *choice])
        assert f"{out}: step {max(losses) if name == 'last' else best}, " in done.output
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    refused = CliRunner().invoke(app, ["export", str(folder / "best"), str(folder / "none"), "--best", "--step", "1"])
    assert "give --step or --best, not both" in f"{refused.output}{refused.exception}"
    last = read_history(folder / "best")[-1]
    assert last["event"] == "finish"
    if max(losses) < 8:
        assert last["reason"].startswith("early_stopping: 4 evaluations")
        assert losses[max(losses)] > losses[best]


def test_evaluations_that_never_come_and_rows_that_are_trained_on_are_told(
    inputs: Inputs, folder: Path, tmp_path: Path
) -> None:
    """By the files' names, and in a copy of a file by the rows themselves."""
    job = job_in(inputs, folder, "unused", evaluation={"every_steps": 9})
    told = list(evaluation_warnings(job, 5))
    assert told[0] == "evaluation.every_steps is 9, and the run has 5 steps: there will be one, at the end"
    assert "data.eval names files that are trained on" in told[1]
    assert "chat.jsonl and 1 more" in told[1]
    assert not list(evaluation_warnings(job_in(inputs, folder, "unused"), 5)), "nothing is evaluated"

    lines = (inputs.folder / "data" / "pages.jsonl").read_text().splitlines()
    (copy := tmp_path / "copy.jsonl").write_text("\n".join(lines[:8]) + "\n")
    rows = [{"files": str(copy), "kind": "pretrain", "image_root": str(inputs.folder / "data")}]
    other = job_in(inputs, tmp_path, "unused", evaluation={"every_steps": 5}, data__eval=rows)
    for split in ("train", "eval"):
        prepare_here(other, split)
    (only,) = evaluation_warnings(other, 5)
    tested = PreparedDataset(str(tmp_path / "prepared" / "eval")).statistics["rows_packed"]
    assert f"{tested} of {tested} rows of data.eval are also rows of data.train (all)" in only


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"keep_best": {"metric": "eval_loss"}}, "keep_best compares evaluations, but there are none"),
        (
            {"early_stopping": {"metric": "eval_cer"}, "training__eval_every_steps": 2},
            "eval_cer, which is not measured",
        ),
        (
            {"evaluation": {"every_steps": 2}, "training__eval_every_steps": 3},
            "evaluation.every_steps is 2 and training.eval_every_steps is 3",
        ),
        ({"evaluation": {"sets": [2]}}, "evaluation.sets: 2, but data.eval has 2 sets"),
        ({"evaluation": {"sets": [1, 0, 1]}}, "names a set twice"),
        ({"evaluation": {"every_steps": 2}, "data__eval": []}, "data.eval has no rows"),
    ],
)
def test_settings_that_contradict_each_other(
    inputs: Inputs, folder: Path, changes: dict[str, object], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        job_in(inputs, folder, "unused", **changes)
