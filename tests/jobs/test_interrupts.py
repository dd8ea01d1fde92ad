"""Ctrl-C and `ray job stop`: one line, nothing left running; the same command continues, also after `kill -9`."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray._private.ray_logging import LogDeduplicator
from ray.job_submission import JobStatus, JobSubmissionClient

from mmray.config.job import Job
from mmray.prepared import PreparedDataset
from mmray.run.checkpoints import newest_looking_whole
from mmray.run.history import read_history
from mmray.run.metrics import read_metrics
from tests.conftest import ROOT, START_SECONDS, Inputs, RayHead
from tests.faults import pictures
from tests.faults.machines import OneMachine, wait_for
from tests.faults.preparing import Preparing, digests, many_rows
from tests.faults.runs import TARGETS, TrainingRun
from tests.faults.stops import STOPPED
from tests.here import prepare_here
from tests.jobs.test_submit import RUNTIME_ENV, printed_twice, submit

ROWS = 2500
MESSAGE = "interrupted; the same command continues"
BUSY = "worker processes have been started on node"
"""What Ray says to all drivers of a node that has more processes than it likes, at any time."""


@pytest.fixture(autouse=True)
def _ctrl_c_arrives() -> Iterator[None]:
    """Also where these tests run behind `&` of a script, which makes all its children deaf to SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def assert_one_line(output: str, message: str = MESSAGE) -> None:
    """An interrupted job's output is ours, ends with one line, and says nothing twice."""
    lines = [line for line in output.strip().splitlines() if BUSY not in line]
    assert lines[-1] == message, output
    assert len(lines) == len(set(lines)), output
    assert not [line for line in lines if "Traceback" in line or "*** SIG" in line or "Received SIG" in line], output


KILLING = """
import sys, time
from jobs.common import connect
import ray
from ray.exceptions import RayActorError

@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Actor:
    def work(self, seconds):
        time.sleep(seconds)

connect(sys.argv[1], cpus=1)
actor = Actor.remote()
ray.get(actor.work.remote(0))
tasks = [actor.work.remote(600) for _ in range(3)]
ray.kill(actor)
try:
    ray.get(tasks)
except RayActorError as error:
    print("error:", error)
time.sleep(2)
"""
"""What Ray Data does to its actors when a job is interrupted."""


def test_tasks_of_a_killed_actor_are_not_told_as_failed(ray_head: RayHead) -> None:
    environment = {key: value for key, value in ray_head.environment.items() if key != "RAY_DEDUP_LOGS_SKIP_REGEX"}
    done = subprocess.run(
        [sys.executable, "-c", KILLING, ray_head.address], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=START_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "error: " in done.stdout
    assert "infinite retries" not in done.stdout + done.stderr


def test_the_log_of_a_node_that_is_lost_is_left_out_and_its_death_is_told() -> None:
    deduplicator = LogDeduplicator(5, None, os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"])
    dead = "The node with node id: 5f1f and address: 10.0.0.7 has been marked dead because the detector has missed"
    log = "Raylet is terminated. Termination is unexpected. Last 20 lines of the Raylet logs:\n    [state-dump] \n"
    batch = {"lines": [log, dead], "pid": "raylet", "is_err": False}
    assert [line for part in deduplicator.deduplicate(batch) for line in part["lines"]] == [dead]


@pytest.mark.parametrize("problem", ["Socket closed", "recvmsg:Connection reset by peer"])
def test_a_task_whose_actor_s_connection_closed_is_left_out_and_the_death_of_its_process_is_told(problem: str) -> None:
    """As Ray 2.60.0 writes them; both come for an actor that was killed and for one that crashed."""
    deduplicator = LogDeduplicator(5, None, os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"])
    dead = "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot the "
    task = (
        "Task Actor.work failed. There are infinite retries remaining, so the task will be retried. Error: The actor "
        f"is temporarily unavailable: RpcError: RPC error: {problem} rpc_code: 14"
    )
    batch = {"lines": [task, dead], "pid": "raylet", "is_err": False}
    assert [line for part in deduplicator.deduplicate(batch) for line in part["lines"]] == [dead]


def test_preparing_is_interrupted_and_continued_by_ray_job_submit(
    ray_head: RayHead, inputs: Inputs, tmp_path: Path
) -> None:
    machine = OneMachine(ray_head.pid, ray_head.address)
    whole, broken = (Preparing(machine, inputs, tmp_path, name) for name in ("whole", "broken"))  # type: ignore[arg-type]
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(many_rows(inputs, tmp_path).read_text().splitlines(keepends=True)[:ROWS]))
    for each in (whole, broken):
        each.content["data"]["train"][0]["files"] = str(fewer)
        each.content["packing"]["window_rows"] = 64
    job = broken.start()
    broken.begun(job)
    assert job.interrupt() == 130
    assert_one_line(job.output)
    for actors in ("EncodeChunk", "PackWindow"):
        wait_for(lambda actors=actors: not machine.processes(actors), f"the end of {actors}")  # type: ignore[misc]
    assert not (broken.prepared / "manifest.json").exists()
    before, committed = broken.written(), len(list(broken.prepared.glob("window-*")))
    assert 0 < committed <= len(before)  # the file of a window may be there, and the window not yet committed
    done = submit(ray_head, "python", "jobs/prepare.py", str(broken.folder / "job.yaml"), options=RUNTIME_ENV)
    assert done.returncode == 0, done.stdout + done.stderr
    assert printed_twice(done.stdout) == []
    assert broken.again(before) == f"{len(before) - committed} of {len(before)} windows"
    facts = prepare_here(Job.model_validate(whole.content)).statistics
    assert digests(broken.prepared) == digests(whole.prepared)
    assert f"{ROWS:,} read = {facts['rows_packed']:,} packed + {facts['rows_rejected']:,} rejected" in done.stdout


def test_training_with_broken_pictures_is_killed_and_stopped_and_continued(
    ray_head: RayHead, inputs: Inputs, tmp_path: Path
) -> None:
    """First by `kill -9` of its driver, then as a submitted job by `ray job stop`, then to its end as one submitted
    with `--set`; steps done again give the same losses, and after a planned stop none is done again. The set it
    evaluates on has the same pictures. Ctrl-C asks a run to stop as `ray job stop` does (test_stopping.py)."""
    machine = OneMachine(ray_head.pid, ray_head.address)
    rows = [{"files": str(tmp_path / "run/inputs/data/pages.jsonl"), "kind": "pretrain"}]
    run = pictures.with_own_pictures(
        machine, inputs, tmp_path, "run", data__max_skipped_share=1.0, data__eval=rows,
        training__steps=100_000, training__eval_every_steps=6,
    )  # fmt: skip
    broken = pictures.break_some(run)
    driver = run.start()
    run.reach(7)
    wait_for(lambda: newest_looking_whole(run.run), "a checkpoint")
    driver.kill()
    first = _losses(run)

    client = JobSubmissionClient(ray_head.dashboard)
    environment = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())
    command = ("python", "jobs/train.py", str(tmp_path / "run" / "job.yaml"))
    submitted = client.submit_job(entrypoint=" ".join(command), runtime_env=environment | {"working_dir": str(ROOT)})

    def has_ended() -> bool:
        return client.get_job_status(submitted).is_terminal()

    wait_for(lambda: run.resumes() or has_ended(), "the resume")  # for a while the workers of the killed may go on
    wait_for(lambda: run.step >= max(first) + 5 or has_ended(), "five more steps")
    client.stop_job(submitted)
    wait_for(has_ended, "the end of the job")
    output = client.get_job_logs(submitted)
    assert client.get_job_status(submitted) == JobStatus.STOPPED, output
    (resume,) = run.resumes()
    assert resume["step"] >= 5
    assert f"resumed from {resume['checkpoint']} at step {resume['step']} with 2 workers" in output
    second = _losses_when_stopped(run)
    assert_stopped(run, max(second), "SIGTERM")
    assert_one_line(output, STOPPED.format(max(second)))

    steps = max(second) + 3
    done = submit(ray_head, *command, "--set", f"training.steps={steps}", options=RUNTIME_ENV)
    assert done.returncode == 0, done.stdout + done.stderr
    assert printed_twice(done.stdout) == []
    assert [each["event"] for each in read_history(run.run)][-1] == "finish"
    assert [event["step"] for event in run.resumes()] == [resume["step"], max(second)]
    row = pictures.judged(run, broken, "", "")
    assert row.holds, row
    assert run.audit().step == steps
    epochs, wrong = run.epochs()
    assert epochs > 0
    assert wrong == 0
    losses = _losses(run)
    for before in (first, second):
        assert before == {step: losses[step] for step in before}
    assert_evaluated(run, broken, steps)


def assert_stopped(run: TrainingRun, step: int, who: str) -> None:
    """Its history ends with a planned stop, whose checkpoint is whole."""
    *_, checkpoint, stop = read_history(run.run)
    assert (checkpoint["event"], checkpoint["step"]) == ("checkpoint", step)
    assert (stop["event"], stop["step"], stop["reason"]) == ("stop", step, who)
    assert newest_looking_whole(run.run) == run.run / checkpoint["name"]


def assert_evaluated(run: TrainingRun, broken: set[str], steps: int) -> None:
    """Every six steps, without the samples whose pictures are broken."""
    evaluated = PreparedDataset(run.job.prepared_path("eval"))
    skipped = pictures.samples_with(broken, evaluated, range(len(evaluated)))
    assert skipped > 0
    lines = [line for line in read_metrics(run.run / "metrics.jsonl") if "eval_loss" in line]
    assert [(line["step"], line["eval_skipped_samples"]) for line in lines] == [
        (step, skipped) for step in range(6, steps + 1, 6)
    ]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]


def _losses_when_stopped(run: TrainingRun) -> dict[int, float]:
    """Waits until no worker of it is left; the loss of each step so far."""
    wait_for(lambda: not run.machines.processes(TARGETS["a train worker"]), "the end of the workers", seconds=120)
    return _losses(run)


def _losses(run: TrainingRun) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in run.metrics}
