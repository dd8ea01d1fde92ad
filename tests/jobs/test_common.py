"""The edges of a job: exit codes and what is refused before anything starts."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray.util.state import get_actor

from jobs import common, evaluating, train, training
from jobs.command_line import run_main
from jobs.common import connect
from mmray.config.job import Job
from mmray.errors import UserError
from tests.conftest import ROOT, START_SECONDS, Inputs, RayHead, free_port


def interrupted() -> None:
    raise KeyboardInterrupt


def mistaken() -> None:
    raise UserError("wrong [here]; do that")


def done() -> None:
    pass


@pytest.mark.parametrize(
    ("main", "code", "message"),
    [
        (interrupted, 130, "the same command continues"),
        (mistaken, 2, "error: wrong [here]; do that"),
        (done, 0, ""),
    ],
)
def test_exit_codes(
    main: object, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["job"])
    with pytest.raises(SystemExit) as exit_:
        run_main(main)  # type: ignore[arg-type]
    assert exit_.value.code == code
    assert message in capsys.readouterr().err


def test_the_address_for_submitting_is_no_cluster_to_join() -> None:
    with pytest.raises(UserError, match=r"is the address for `ray job submit`"):
        connect("http://127.0.0.1:8265", cpus=2)


def test_an_address_where_no_ray_answers_is_refused_at_once() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(
        UserError, match=rf"^no Ray answers at {address}; start one there \(ray start --head\), or leave"
    ):
        common._join(address, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"}, "lets this process in; if one runs there that was"),
        ({"RAY_AUTH_TOKEN": ""}, "there is no token here; copy ~/.ray/auth_token of the cluster's head"),
    ],
    ids=["not asked for", "missing"],
)
def test_a_process_without_the_token_of_a_cluster_is_told_where_it_is(
    ray_head: RayHead, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    environment = ray_head.environment | {"HOME": str(tmp_path), "RAY_NUM_REDIS_GET_RETRIES": "1"} | changes
    joining = (
        "import sys; from jobs.command_line import run_main; from jobs.common import connect\n"
        "address = sys.argv.pop(); run_main(lambda: connect(address, cpus=1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", joining, ray_head.address], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__processor": "/nowhere"}, "processor: no processor could be loaded"),
        ({"model__config": {"model_type": "idefics3"}}, "processor: the model is a idefics3"),
    ],
)
def test_a_job_that_does_not_fit_is_refused_before_ray_is_joined(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], message: str
) -> None:
    """The cheap part of the doctor, before any worker takes a GPU."""
    monkeypatch.setattr(training, "connect", lambda *_, **__: pytest.fail("Ray was joined"))
    (tmp_path / "job.yaml").write_text(json.dumps(inputs.job(tmp_path, **changes)))
    with pytest.raises(UserError, match=message):
        train.main(tmp_path / "job.yaml", [])


CONNECTING = """
import os, sys
import psutil, ray
from jobs.common import RAY_CORE_LEVEL, connect

connect(sys.argv[2] if sys.argv[2:] else None, cpus=1, verbose=sys.argv[1] == "verbose")
started = psutil.Process().children(recursive=True)
print("levels", {process.environ().get(RAY_CORE_LEVEL) for process in [psutil.Process(), *started]})

@ray.remote(max_restarts=1, num_cpus=0)
class Actor:
    def __init__(self, argument): ...
    def ready(self): ...

actor = Actor.remote(ray.put("an argument in the object store"))
ray.get(actor.ready.remote())
ray.shutdown()
"""


def connecting(*words: str) -> str:
    """What a process prints that connects to Ray and makes an actor with an argument: quiet or verbose, to which."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", CONNECTING, *words], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "levels {None}" in done.stdout
    return done.stdout + done.stderr


def test_ray_does_not_tell_of_each_pool_that_its_actors_need_their_arguments(ray_head: RayHead) -> None:
    """Its other processes log as they would: none of those that it starts has the setting. Asked to, it tells."""
    printed = connecting("quiet")
    assert "the actor restart will fail" not in printed
    assert "RAY_BACKEND_LOG_LEVEL" not in printed
    assert "the actor restart will fail" in connecting("verbose", ray_head.address)


def test_what_is_written_while_ray_starts_comes_after_it(capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(RuntimeError), common._stderr_without("noise"):
        os.write(2, b"of C++\nnoise of C++\n")
        print("of Python", file=sys.__stderr__)
        assert capfd.readouterr().err == ""
        raise RuntimeError
    assert capfd.readouterr().err == "of C++\nof Python\n"


def test_an_evaluation_without_a_good_row_ends_with_a_refusal(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table is printed before."""
    (tmp_path / "bad.jsonl").write_text('{"text": "<image>\\n12", "images": ["nowhere.png"]}\n')
    job = Job.model_validate(inputs.job(tmp_path))
    what = {
        "model": "base", "checkpoint": None, "data": str(tmp_path / "bad.jsonl"), "image_root": None, "limit": None,
        "replace": False,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"none of the rows can be used: .*nowhere.png: no such file.*--replace"):
        evaluating.run(job, **what, verbose=False, address=None)  # type: ignore[arg-type]
    assert "1 bad row (1 image_missing)" in capsys.readouterr().out


def test_an_evaluation_says_which_sets_it_leaves_out_and_what_is_to_be_done_with_bad_rows(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": "good", "text": "hello"}, {"id": "lost", "text": "<image>\n12", "images": ["nowhere.png"]}]
    names = ("a", "b", "c")
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sets = [{"files": str(tmp_path / f"{name}.jsonl"), "kind": "pretrain"} for name in names]
    job = Job.model_validate(inputs.job(tmp_path, data__eval=sets, evaluation={"sets": [2, 0]}))
    what = {"model": "base", "checkpoint": None, "data": "eval", "image_root": None, "replace": False}
    for limit, said in (
        (None, ""),
        (None, ": evaluated already; --replace does it anew, when its bad rows are mended too"),
    ):
        evaluating.run(job, **what, limit=limit, verbose=False, address=None)  # type: ignore[arg-type]
        printed = capsys.readouterr().out
        folder = f"{tmp_path}"
        assert (
            f"of data.eval, evaluation.sets chooses set 2 ({folder}/c.jsonl), set 0 ({folder}/a.jsonl) and leaves out "
            f"set 1 ({folder}/b.jsonl)"
        ) in printed
        assert said in printed
        assert "takes its place" not in printed
    job = job.model_copy(update={"images": job.images.model_copy(update={"grid": (2, 2)})})
    evaluating.run(job, **what, limit=None, verbose=False, address=None)  # type: ignore[arg-type]
    assert "base holds an evaluation of other rows, settings or weights; this one takes its place" in (
        capsys.readouterr().out
    )


def test_actors_ask_the_cluster_they_are_in(ray_head: RayHead, tmp_path: Path) -> None:
    """Where the machine remembers a cluster that has ended: Ray Train asks so whether its controller lives."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text(f"127.0.0.1:{free_port()}")

    @ray.remote(num_cpus=0)
    class Asking:
        def state(self) -> str:
            state = get_actor(ray.get_runtime_context().get_actor_id(), timeout=START_SECONDS)
            assert state is not None
            return state.state

    asking = Asking.options(runtime_env={"env_vars": {"RAY_TMPDIR": str(tmp_path)}}).remote()  # type: ignore[attr-defined]
    assert ray.get(asking.state.remote()) == "ALIVE"
