"""A mistake in a job file is told at once: before torch and Ray, whose import takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

RUN = """
import atexit, runpy, sys

atexit.register(lambda: print("imported:", *sorted({"torch", "transformers", "ray"} & sys.modules.keys())))
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
if script.endswith(".py"):
    runpy.run_path(script, run_name="__main__")
else:
    runpy.run_module(script, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["jobs/prepare.py", "JOB"],
        ["jobs/prepare.py", "JOB", "--dry-run"],
        ["jobs/train.py", "JOB"],
        ["jobs/train.py", "JOB", "--trace", "3"],
        ["mmray", "doctor", "JOB"],
        ["mmray", "inspect", "JOB", "--rows", "3"],
        ["mmray", "verify", "JOB"],
        ["jobs/verify.py", "JOB"],
        ["jobs/evaluate.py", "JOB"],
        ["mmray", "estimate", "JOB", "--try", "packing.token_capacity=512"],
    ],
    ids=" ".join,
)
def test_a_typo_is_told_before_torch_and_ray_are_imported(words: list[str], tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("name: x\nmodle: {}\n")
    script = [str(ROOT / word) if word.endswith(".py") else str(job) if word == "JOB" else word for word in words]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *script], capture_output=True, text=True, cwd=ROOT, check=False, env=env
    )
    assert done.returncode == 2, done.stderr
    assert "modle: unknown key; did you mean 'model'?" in done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"
