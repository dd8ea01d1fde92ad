"""A mistake in a job file is told at once: before torch and Ray, whose import takes seconds."""

import json
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
import json, runpy, sys

for words in json.loads(sys.argv[1]):
    script, *sys.argv[1:] = words
    sys.argv[0] = script
    print("----", flush=True)
    try:
        if script.endswith(".py"):
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print("exit code", end.code)
    print("imported:", *sorted({"torch", "transformers", "ray"} & sys.modules.keys()), flush=True)
"""
"""Runs commands one after the other, each as the main program, and tells what it has imported by then."""

TYPED = [
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
]


def test_a_typo_is_told_before_torch_and_ray_are_imported(tmp_path: Path) -> None:
    """By every command; in one process, in which the first that imports them shows."""
    job = tmp_path / "job.yaml"
    job.write_text("name: x\nmodle: {}\n")
    commands = [
        [str(ROOT / word) if word.endswith(".py") else str(job) if word == "JOB" else word for word in words]
        for words in TYPED
    ]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=ROOT, check=False, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    told = done.stdout.split("----\n")[1:]
    assert len(told) == len(TYPED), done.stdout
    for words, text in zip(TYPED, told):
        assert "modle: unknown key; did you mean 'model'?" in text, (words, text)
        assert text.splitlines()[-2:] == ["exit code 2", "imported:"], (words, text)


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
