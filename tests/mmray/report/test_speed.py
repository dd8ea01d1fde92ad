"""The time that a run takes, from the time of a step or from another run."""

import pytest

from mmray.config.job import Job
from mmray.errors import UserError
from mmray.report.speed import Speed
from tests.mmray.report.reported import write_run


def job(inputs, folder, workers=2):
    return Job.model_validate(inputs.job(folder, resources={"workers": workers}))


def test_steps_of_a_time_that_is_given(inputs, tmp_path):
    text = Speed.of("1.5").text(job(inputs, tmp_path), 4800, bin_tokens=400)
    assert text.startswith("about 2 h: 4,800 steps of 1.5 s (as given)")


def test_a_run_tells_the_time_by_its_tokens_on_each_worker(inputs, tmp_path):
    """0.5 s and 0.25 s of waiting for 1,000 tokens on 4 workers; here 4 bins of 500 tokens on 2: four times as long."""
    run = write_run(tmp_path / "run", 12, workers=lambda step: 4, step_seconds=lambda step: 60 if step < 4 else 0.5)
    speed = Speed.of(str(run))
    assert (speed.step_seconds, speed.tokens, speed.workers) == (0.75, 1000, 4)
    text = speed.text(job(inputs, tmp_path), 1200, bin_tokens=500)
    assert text.startswith("about 1 h: 1,200 steps of 3 s")
    assert "0.75 s for 1,000 tokens on 4 workers, here 2,000 tokens" in text
    elastic = speed.text(job(inputs, tmp_path, workers=[2, 8]), 1200, bin_tokens=500)
    assert elastic.startswith("about 15 min on 8 workers: 1,200 steps of 0.75 s; 1 h on 2 workers: 1,200 steps of 3 s")


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "fast"])
def test_what_is_no_time_and_no_run_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=f"--step-seconds {text}: give the seconds of a step"):
        Speed.of(text)


def test_a_run_of_few_steps_tells_nothing(tmp_path):
    with pytest.raises(UserError, match="3 steps, too few to tell its speed"):
        Speed.of(str(write_run(tmp_path / "run", 3, workers=lambda step: 1)))
