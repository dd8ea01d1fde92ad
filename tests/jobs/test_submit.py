"""`ray job submit`, as a user types it, against a head with token authentication; whole jobs in test_interrupts.py."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, Inputs, RayHead

SUBMIT_SECONDS = 400
RUNTIME_ENV = ("--runtime-env", "jobs/runtime_env.yaml")


def submit(
    head: RayHead, *words: str, options: tuple[str, ...] = (), environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", head.dashboard]
    command += ["--working-dir", ".", *options, "--", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment or head.environment, capture_output=True, text=True, timeout=SUBMIT_SECONDS
    )


@pytest.fixture(scope="module")
def job_file(ray_head: RayHead, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submit")
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(inputs.job(folder)))))
    return path


def printed_twice(output: str) -> list[str]:
    """Lines that a submitted job has printed more than once; cells of a table may say the same."""
    lines = output.split("Running entrypoint for job", 1)[1].splitlines()
    return [line for line, count in Counter(lines).items() if count > 1 and line.strip() and line[0] not in "│├"]


def test_a_mistake_in_the_job_file_is_one_line_and_an_exit_code(ray_head: RayHead, job_file: Path) -> None:
    done = submit(ray_head, "python", "jobs/prepare.py", str(job_file), "--set", "packing.token_capcity=7")
    assert done.returncode != 0
    assert "failed with exit code 2" in done.stdout + done.stderr
    assert "packing.token_capcity: unknown key; did you mean 'token_capacity'?" in done.stdout
    assert "Traceback" not in done.stdout


def test_the_head_refuses_a_client_without_its_token(ray_head: RayHead, job_file: Path) -> None:
    stranger = {**ray_head.environment, "RAY_AUTH_TOKEN": "0" * 64}
    done = submit(ray_head, "python", "-c", "print('let in')", environment=stranger)
    assert done.returncode != 0
    assert "let in" not in done.stdout
