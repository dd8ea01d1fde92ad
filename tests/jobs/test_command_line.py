"""A mistake in a job file is told at once: before torch and Ray, whose import takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

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

COMMANDS = [
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
        for words in COMMANDS
    ]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=ROOT, check=False, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    told = done.stdout.split("----\n")[1:]
    assert len(told) == len(COMMANDS), done.stdout
    for words, text in zip(COMMANDS, told):
        assert "modle: unknown key; did you mean 'model'?" in text, (words, text)
        assert text.splitlines()[-2:] == ["exit code 2", "imported:"], (words, text)
