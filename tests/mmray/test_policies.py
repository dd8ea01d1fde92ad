"""`mmray estimate`: policies side by side, against what preparing makes with the same settings."""

import json
from collections import Counter

import pytest

from mmray.config.job import load_job
from mmray.errors import UserError
from mmray.prepared.policies import compare, policies
from tests.here import prepare_here

GRID, TOKENS = "images.grid=[1, 1]", "packing.token_capacity=1024"


@pytest.fixture
def job_file(inputs, tmp_path):
    """A job all of whose rows are looked at, so that estimates are exact."""
    content = inputs.job(tmp_path)
    content["packing"]["token_capacity"] = 128
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(content))
    return path


def test_policies_are_what_preparing_makes_of_them(job_file, tmp_path):
    compared = list(compare(policies(job_file, [], [GRID, TOKENS, f"{GRID}; {TOKENS}"])))
    assert [each.policy.name for each in compared] == ["the job as it is", GRID, TOKENS, f"{GRID}; {TOKENS}"]
    for number, (each, settings) in enumerate(zip(compared, ([], [GRID], [TOKENS], [GRID, TOKENS]), strict=True)):
        output = f"output.prepared={tmp_path}/prepared-{number}"
        job = load_job(job_file, [*settings, output, "data.max_rejected_share=1"])
        facts = prepare_here(job).statistics
        assert (each.estimate.bins, each.estimate.tokens) == (facts["bins"], facts["tokens"])
        assert each.estimate.visual_tokens == facts["visual_tokens"]
        assert each.estimate.lost == pytest.approx(facts["rows_rejected"])
        reasons = Counter[str]()
        for of_set in each.estimate.sets:
            reasons.update(of_set.rejected)
        assert reasons == facts["rejected_by_reason"]
        assert each.fills == pytest.approx((facts["token_fill"], facts["visual_fill"]), abs=1e-3)
        assert each.steps == -(-facts["bins"] // job.training.global_batch_bins)
    assert compared[0].estimate.lost > compared[2].estimate.lost


def test_a_name_that_is_no_setting_is_an_error_before_any_work(job_file, monkeypatch):
    monkeypatch.setattr("mmray.prepared.policies.count_sets", None)
    with pytest.raises(
        UserError, match=r"(?s)--try 'images.tile_sise=\[448,448\]'.*tile_sise.*did you mean 'tile_size'"
    ):
        policies(job_file, [], [TOKENS, "images.tile_sise=[448,448]"])
    with pytest.raises(UserError, match=r"--try 'packing.token_capacity': .*write key.path=value"):
        policies(job_file, [], ["packing.token_capacity"])
    with pytest.raises(UserError, match="--try is empty"):
        policies(job_file, [], [TOKENS, " "])


def test_a_policy_that_the_model_cannot_train_with_is_named(job_file, inputs):
    content = json.loads(job_file.read_text())
    content["model"]["processor"] = str(inputs.folder / "data")
    job_file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="the job as it is: "):
        next(iter(compare(policies(job_file, [], [TOKENS]))))
