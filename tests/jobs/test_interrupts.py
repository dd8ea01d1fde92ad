"""Ctrl-C, SIGTERM and `ray job stop`: one line, nothing left running, and the same command continues."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from mmray.config import Job
from mmray.training.history import read_history
from tests.conftest import ROOT, Inputs, RayHead
from tests.faults.machines import OneMachine, wait_for
from tests.faults.preparing import Preparing, digests, many_rows
from tests.faults.runs import TARGETS, TrainingRun
from tests.here import prepare_here
from tests.jobs.test_submit import RUNTIME_ENV, printed_twice, submit

ROWS = 4000
MESSAGE = "interrupted; the same command continues"
BUSY = "worker processes have been started on node"
"""What Ray says to all drivers of a node that has more processes than it likes, at any time."""


@pytest.fixture(autouse=True)
def _ctrl_c_arrives() -> Iterator[None]:
    """Also where these tests run behind `&` of a script, which makes all its children deaf to SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def assert_one_line(output: str) -> None:
    """An interrupted job's output is ours, ends with one line, and says nothing twice."""
    lines = [line for line in output.strip().splitlines() if BUSY not in line]
    assert lines[-1] == MESSAGE
    assert len(lines) == len(set(lines)), output
    assert not [line for line in lines if "Traceback" in line or "SIGTERM" in line or "SIGINT" in line], output


def test_preparing_is_interrupted_twice_and_continued(ray_head: RayHead, inputs: Inputs, tmp_path: Path) -> None:
    machine = OneMachine(ray_head.pid, ray_head.address)
    whole, broken = (Preparing(machine, inputs, tmp_path, name) for name in ("whole", "broken"))  # type: ignore[arg-type]
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(many_rows(inputs, tmp_path).read_text().splitlines(keepends=True)[:ROWS]))
    for each in (whole, broken):
        each.content["data"]["train"][0]["files"] = str(fewer)
        each.content["packing"]["window_rows"] = 128
    for number in (signal.SIGINT, signal.SIGTERM):
        job = broken.start()
        broken.begun(job, windows=len(broken.written()) + 2)
        assert job.interrupt(number) == 130
        assert_one_line(job.output)
        assert not (broken.prepared / "manifest.json").exists()
    before = broken.written()
    prepare_here(Job.model_validate(broken.content))
    assert broken.again(before) == f"0 of {len(before)} windows"
    prepare_here(Job.model_validate(whole.content))
    assert digests(broken.prepared) == digests(whole.prepared)


def test_training_is_interrupted_and_stopped_and_continued(ray_head: RayHead, inputs: Inputs, tmp_path: Path) -> None:
    """First by Ctrl-C, then as a submitted job by `ray job stop`, then to its end as one submitted with `--set`; steps
    done again give the same losses."""
    machine = OneMachine(ray_head.pid, ray_head.address)
    run = TrainingRun(machine, inputs, tmp_path, "run", training__steps=100_000, training__checkpoint_every_steps=7)
    prepare_here(run.job)
    driver = run.start()
    run.reach(10)
    assert driver.interrupt() == 130
    assert_one_line(driver.output)
    first = _losses_when_stopped(run)

    client = JobSubmissionClient(ray_head.dashboard)
    environment = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())
    command = ("python", "jobs/train.py", str(tmp_path / "run" / "job.yaml"))
    submitted = client.submit_job(entrypoint=" ".join(command), runtime_env=environment | {"working_dir": str(ROOT)})
    wait_for(lambda: run.step >= max(first) + 10 or client.get_job_status(submitted).is_terminal(), "ten more steps")
    client.stop_job(submitted)
    wait_for(lambda: client.get_job_status(submitted).is_terminal(), "the end of the job")
    output = client.get_job_logs(submitted)
    assert client.get_job_status(submitted) == JobStatus.STOPPED, output
    assert_one_line(output)
    resume = run.resumes()[0]
    assert f"resumed from {resume['checkpoint']} at step {resume['step']} with 2 workers" in output
    second = _losses_when_stopped(run)

    steps = max(second) + 3
    done = submit(ray_head, *command, "--set", f"training.steps={steps}", options=RUNTIME_ENV)
    assert done.returncode == 0, done.stdout + done.stderr
    assert printed_twice(done.stdout) == []
    assert [each["event"] for each in read_history(run.run)][-1] == "finish"
    assert run.resumes()[-1]["step"] > resume["step"]
    audit = run.audit()
    assert (audit.step, audit.lost, audit.doubled) == (steps, 0, 0)
    losses = {line["step"]: line["loss"] for line in run.metrics}
    for before in (first, second):
        assert before == {step: losses[step] for step in before}


def _losses_when_stopped(run: TrainingRun) -> dict[int, float]:
    """Waits until no worker of it is left; the loss of each step so far."""
    wait_for(lambda: not run.machines.processes(TARGETS["a train worker"]), "the end of the workers", seconds=120)
    return {line["step"]: line["loss"] for line in run.metrics}
