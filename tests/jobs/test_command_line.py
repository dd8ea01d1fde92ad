"""A mistake in a job file is told at once: before torch and Ray, whose import takes seconds."""

import os
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mmray import cli
from mmray.base.command_help import PlainCommand
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


SCRIPTS = ["jobs/prepare.py", "jobs/train.py", "jobs/evaluate.py", "jobs/verify.py", "jobs/demo.py"]
COMMANDS = ["report", "estimate", "from-huggingface", "from-pdf", "verify", "inspect", "export", "doctor", "schema"]


@pytest.mark.parametrize("command", [*COMMANDS, *SCRIPTS])
def test_help_names_each_value_and_shows_no_types(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if command in COMMANDS:
        app, words = cli.app, [command]
    else:
        main = runpy.run_path(str(ROOT / command), run_name=command)["main"]
        app, words = typer.Typer(), []
        app.command(cls=PlainCommand)(main)
    monkeypatch.setenv("COLUMNS", "100")
    done = CliRunner().invoke(app, [*words, "--help"])
    assert done.exit_code == 0, done.output
    assert "--help" in done.output
    for sign in ("<", "--no-", "None"):
        assert sign not in done.output, done.output
    lines = [line.strip() for line in done.output.splitlines()]
    broken = [line for line, after in pairwise(lines) if after and line.endswith((" the", " a", " in", " of"))]
    assert all(len(line) > 80 or line.startswith("│") for line in broken), "paragraphs are broken by the terminal alone"
