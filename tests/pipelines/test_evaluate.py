"""Evaluating on a cluster gives what one process gives, and continues after a mistake."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mmray.config.job import Job
from mmray.errors import UserError
from mmray.run.evaluation.model import EvaluatedModel
from mmray.run.evaluation.rows import EvaluationData
from mmray.run.evaluation.standalone import EvaluationPlan, evaluate
from mmray.run.scoring.settings import EvaluationSettings
from pipelines.evaluate import run_batches
from tests.conftest import Inputs, RayHead


def on_cluster(plan: EvaluationPlan) -> dict[str, Any]:
    return evaluate(plan, run_batches=partial(run_batches, gpus=False))[0]


def test_a_cluster_reads_what_one_process_reads(ray_head: RayHead, inputs: Inputs, tmp_path: Path) -> None:
    rows = [{"files": str(inputs.folder / "data" / "pages.jsonl"), "kind": "pretrain"}]
    job = Job.model_validate(inputs.job(tmp_path, data__eval=rows))
    settings = EvaluationSettings.model_validate({"generate": {"max_new_tokens": 4}})
    here = EvaluationPlan(job, EvaluatedModel("here", "base"), EvaluationData.of(job, "eval"), settings)
    there = dataclasses.replace(here, model=EvaluatedModel("there", "base"))
    expected = json.loads(json.dumps(evaluate(here)[0]))
    values = json.loads(json.dumps(on_cluster(there)))
    for key in ("all", "by_set", "by_file", "by_bucket"):
        groups, expected_groups = ({"": v[key]} if key == "all" else v[key] for v in (values, expected))
        assert groups.keys() == expected_groups.keys()
        for name, numbers in groups.items():
            assert numbers == pytest.approx(expected_groups[name]), (key, name)
    assert values["bad_rows"] == expected["bad_rows"]
    assert values["bad_rows"]["count"] > 0
    assert values["all"]["texts"] > 20

    gone = job.model.model_copy(update={"config": str(tmp_path / "gone")})
    one = job.resources.model_copy(update={"workers": 1})
    bad_job = job.model_copy(update={"model": gone, "resources": one})
    with pytest.raises(UserError, match="gone"):
        on_cluster(dataclasses.replace(there, job=bad_job, model=EvaluatedModel("gone", "base")))
