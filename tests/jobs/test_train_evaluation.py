"""Evaluation in a training on Ray, in a cluster that the training fits exactly: two workers and two actors on four
CPUs."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.capacity import train_cpus
from jobs.checks import open_prepared
from jobs.training import train
from mmray.config.job import Job
from mmray.run.history import read_history
from mmray.run.metrics import read_metrics
from tests.conftest import Inputs, RayHead
from tests.here import prepare_here, train_here


def test_a_training_that_fits_exactly_evaluates_as_one_without_ray(
    ray_head: RayHead, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses, texts and files; training's own render actors decode what is read. It goes through the border of two
    stages, and ends early, with its export."""
    rows = [{"files": str(inputs.folder / "data" / "pages.jsonl"), "kind": "pretrain"}]
    changes: dict[str, object] = {
        "data__eval": rows, "training__steps": 5, "training__zero_stage": 3,
        "training__stages": [{"steps": 3, "parts": {"vision": "frozen"}}],
        "evaluation": {"every_steps": 2, "generate": {"rows": 6, "max_new_tokens": 4, "batch_rows": 2}},
        "keep_best": {"metric": "eval_cer"},
        "early_stopping": {"metric": "eval_exact_match", "patience": 1},  # none is exact: no better after the first
    }  # fmt: skip
    job = Job.model_validate(inputs.job(tmp_path, **changes, output__export={"at_end": True}))
    assert train_cpus(job) == 4
    for split in ("train", "eval"):
        prepare_here(job, split)
    assert train(job, open_prepared(job)) is None, "it is finished, not stopped"
    here = job.model_copy(update={"output": job.output.model_copy(update={"run": str(tmp_path / "here")})})
    expected = train_here(here, ranks=2)
    events = [event["event"] for event in read_history(tmp_path / "run")]
    assert "resume" not in events, "no rank failed, with the inputs of the next step made while texts are written"
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")

    def numbers(lines: list[dict[str, object]]) -> list[dict[str, object]]:
        measured = ("_seconds", "_per_second", "peak_memory")
        return [{key: value for key, value in line.items() if not key.endswith(measured)} for line in lines]

    assert numbers(lines) == numbers(expected)
    assert [line["stage"] for line in lines if "loss" in line] == [1, 1, 1, 2]
    assert [line["step"] for line in lines if "eval_cer" in line] == [2, 4], "the second did not improve"
    for step in (2, 4):
        ours, theirs = (
            pq.read_table(tmp_path / run / "evaluations" / f"{step:08d}" / "predictions.parquet").to_pylist()
            for run in ("run", "here")
        )
        assert ours == theirs
        assert any(row["picture"] for row in ours)
    assert json.loads((tmp_path / "run" / "model" / "mmray.json").read_text())["step"] == 4
    assert train(job, open_prepared(job)) is None
    assert "has ended after 4 steps (early_stopping" in " ".join(capsys.readouterr().out.split())
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == len(lines), "nothing more was trained"
