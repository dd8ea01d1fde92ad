"""What nodes say of themselves before work starts: each thing that may be wrong there is one line."""

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from jobs import probe
from jobs.probe import Answer, check_nodes, check_shared_memory, look, packages_of, problem
from jobs.room import Node, cluster_nodes
from mmray.config import Job
from mmray.errors import UserError
from tests.conftest import ROOT, RayHead
from tests.mmray.test_docs_jobs import LEAST

OWN = Answer({"python": "3.11.9", "ray": "2.60.0", "torch": "2.8.0", "transformers": "5.23.0"}, [], [], [], 10**10)
NODE = Node("10.0.0.7", {"CPU": 8, "GPU": 1, "object_store_memory": 2e9})
OUTPUTS = {"output.run": "/shared/run"}


def job(**output: str) -> Job:
    content = yaml.safe_load(LEAST)
    content["output"] |= output
    return Job.model_validate(content)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (OWN, None),
        (replace(OWN, versions=OWN.versions | {"python": "3.11.2", "torch": "2.8.0+cu128"}), None),
        (replace(OWN, versions=OWN.versions | {"python": "3.12.1"}), "runs Python 3.12.1, this process 3.11.9; start"),
        (
            replace(OWN, versions=OWN.versions | {"transformers": "5.1.0"}),
            "has transformers 5.1.0, this process has 5.23.0; install the same there: pip install transformers==5.23.0",
        ),
        (replace(OWN, versions=OWN.versions | {"torch": None}), "has no torch, this process has 2.8.0; install"),
        (replace(OWN, versions=OWN.versions | {"torch": "2.8.0+cpu"}), "has GPUs, and torch 2.8.0+cpu, which knows"),
        (replace(OWN, missing=["pipelines", "jobs"]), "cannot import pipelines; submit the job, `ray job submit"),
        (replace(OWN, missing=["deepspeed"]), "has no deepspeed; install there what is installed here: pip install"),
        (replace(OWN, unseen=["output.run"]), "does not see what this process writes there; give a folder that all"),
        (replace(OWN, closed=["output.run"]), "may not write there"),
    ],
)
def test_what_is_wrong_with_a_node_is_one_line(answer: Answer, message: str | None) -> None:
    found = problem(NODE, answer, OWN, OUTPUTS, gpus=True)
    assert (found is None) == (message is None)
    assert message is None or f"node 10.0.0.7 {message}" in str(found)
    assert "\n" not in str(found)


def test_little_shared_memory_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mmray"):
        check_shared_memory(NODE, 3 * 10**9)
        check_shared_memory(NODE, None)
        assert caplog.messages == []
        check_shared_memory(NODE, 64 * 10**6)
    (line,) = caplog.messages
    assert line.startswith("node 10.0.0.7: /dev/shm has 0.1 GB and Ray's object store 2.0 GB")


def test_packages_are_those_the_job_needs() -> None:
    content = yaml.safe_load(LEAST) | {"tracking": {"mlflow": "pages"}}
    assert packages_of(Job.model_validate(content), trains=True) == ["deepspeed", "mlflow"]
    assert packages_of(Job.model_validate(content), trains=False) == []
    assert packages_of(job(prepared="s3://bucket/prepared"), trains=False) == ["s3fs"]


def test_the_nodes_of_a_cluster_are_asked(ray_head: RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder they share passes and is left as it was; one that they see otherwise, and a missing module, do not."""
    outputs = {"output.prepared": str(tmp_path / "new" / "prepared"), "output.run": "s3://bucket/run"}
    nodes = cluster_nodes()
    check_nodes(job(), nodes, {}, outputs, modules=["deepspeed"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=rf"^node {nodes[0].address} has no nowhere_to_be_found; install"):
        check_nodes(job(), nodes, {}, outputs, modules=["nowhere_to_be_found"])
    check_nodes(job(), nodes, {"kind": "other"}, outputs, modules=["nowhere_to_be_found"])

    @contextlib.contextmanager
    def elsewhere(_: object) -> Iterator[dict[str, str]]:
        yield {"output.prepared": str(tmp_path / "other" / "mark")}

    monkeypatch.setattr(probe, "_marks", elsewhere)
    with pytest.raises(UserError, match=rf"^output\.prepared {tmp_path}/new/prepared: node \S+ does not see what"):
        check_nodes(job(), nodes, {}, outputs)


def test_a_mark_is_there_only_while_nodes_look(tmp_path: Path) -> None:
    with probe._marks({"output.run": str(tmp_path / "a" / "b")}) as marks:
        assert [str(path) for path in tmp_path.iterdir()] == list(marks.values())
        assert look(marks, []).unseen == []
    assert list(tmp_path.iterdir()) == []
    assert look(marks, []).unseen == ["output.run"]


def python(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", ["prepare", "train", "demo"])
def test_a_job_without_ray_is_one_line(script: str) -> None:
    done = python(
        f"import sys, runpy; sys.modules['ray'] = None; runpy.run_path('jobs/{script}.py', run_name='__main__')"
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ray not installed in ")
    assert done.stderr.endswith("pip install -c constraints.txt -e '.[cluster]'\n")
    assert len(done.stderr.splitlines()) == 1


def test_a_cluster_of_another_ray_is_one_line_with_both_versions(ray_head: RayHead) -> None:
    done = python(
        "import ray._private.utils as utils; utils.compute_version_info = lambda: ('1.2.3', '3.4.5')\n"
        "from jobs.common import connect, run_main\n"
        f"def main() -> None: connect('{ray_head.address}', cpus=1)\n"
        "run_main(main)",
        **ray_head.environment,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: the cluster at {ray_head.address} runs Ray 2.")
    assert "this process Ray 1.2.3 with Python 3.4.5; run this where both are the same" in line
