"""What nodes say of themselves before work starts: each thing that may be wrong there is one line."""

import contextlib
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from jobs import probe
from jobs.probe import (
    Answer,
    check_nodes,
    check_own_machine,
    check_shared_memory,
    look,
    packages_of,
    problem,
    shared_folder,
)
from mmray.config.job import Job
from mmray.errors import UserError
from pipelines.nodes import Node, alive_nodes
from tests.conftest import ROOT, START_SECONDS, RayHead, end_processes, running_head
from tests.mmray.config.test_docs_jobs import LEAST

OWN = Answer({"python": "3.11.9", "ray": "2.60.0", "torch": "2.8.0", "transformers": "5.23.0"}, [], [], [], 10**10)
NODE = Node("10.0.0.7", {"CPU": 8, "GPU": 1, "object_store_memory": 2e9})
OUTPUTS = {"output.run": "/shared/run", "data.train[0].files": "/shared/rows.jsonl"}


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
        (replace(OWN, torch_cuda=(13, 0), driver_cuda=(13, 0)), None),
        (replace(OWN, torch_cuda=(12, 8), driver_cuda=(12, 2)), None),
        (replace(OWN, torch_cuda=(12, 6), driver_cuda=(13, 1)), None),
        (
            replace(OWN, torch_cuda=(13, 0), driver_cuda=(12, 8)),
            "has GPUs, and torch 2.8.0 is built for CUDA 13.0, while the driver there knows CUDA 12.8; install",
        ),
        (
            replace(OWN, torch_cuda=(13, 0)),
            "has GPUs, and torch 2.8.0 for CUDA 13.0, but no NVIDIA driver (libcuda.so.1); install one, or start the",
        ),
        (replace(OWN, missing=["pipelines", "jobs"]), "cannot import pipelines; submit the job, `ray job submit"),
        (replace(OWN, missing=["deepspeed"]), "has no deepspeed; install there what is installed here: pip install"),
        (replace(OWN, unseen=["output.run"]), "does not see what this process writes there; give a folder that all"),
        (replace(OWN, unseen=["data.train[0].files"]), "does not see it; give a folder that all"),
        (replace(OWN, closed=["output.run"]), "may not write there"),
        (
            replace(OWN, absent=["ninja", "nvcc"]),
            "has no ninja and no nvcc, with which DeepSpeed compiles its",
        ),
    ],
)
def test_what_is_wrong_with_a_node_is_one_line(answer: Answer, message: str | None) -> None:
    found = problem(NODE, answer, OWN, OUTPUTS, gpus=True)
    assert (found is None) == (message is None)
    assert message is None or f"node 10.0.0.7 {message}" in str(found)
    assert "\n" not in str(found)


def test_a_driver_is_asked_only_where_a_job_uses_gpus() -> None:
    old = replace(OWN, torch_cuda=(13, 0), driver_cuda=(12, 8))
    remedy = "install a driver of 580 or newer, or a torch for CUDA 12: pip install torch==2.8.0 --index-url https://"
    assert remedy in str(problem(NODE, old, OWN, OUTPUTS, gpus=True))
    assert problem(NODE, old, OWN, OUTPUTS, gpus=False) is None
    assert problem(replace(NODE, resources={"CPU": 8}), old, OWN, OUTPUTS, gpus=True) is None


DRIVER = """
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
"""


ASKING_OF_CUDA = """
import json, os, sys
import jobs.probe  # with the modules of this process, before the path has another torch

folder = sys.argv[1]
sys.path.insert(0, folder)
answers = []
for library in ("", "libcuda.so.1"):
    if library:
        os.rename(f"{folder}/not-yet", f"{folder}/{library}")
    answer = jobs.probe._looker()({}, [], [], "/dev/shm", [], {})
    answers.append([answer["torch_cuda"], answer["driver_cuda"]])
print(json.dumps(answers))
"""


def test_the_answer_has_the_cuda_of_torch_and_of_the_driver(tmp_path: Path) -> None:
    """A torch of another build and a driver's library, both of them found as the real ones are; first no library."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler makes the driver's library")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('torch is large and is not imported')")
    (tmp_path / "torch" / "version.py").write_text("cuda: str | None = '13.0'\nhip = None\n")
    (tmp_path / "driver.c").write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-o", tmp_path / "not-yet", tmp_path / "driver.c"], check=True)
    done = python(ASKING_OF_CUDA, str(tmp_path), LD_LIBRARY_PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[[13, 0], None], [[13, 0], [12, 8]]]


def test_a_machine_of_ones_own_is_asked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "look", lambda *_: replace(OWN, torch_cuda=(13, 0), driver_cuda=(12, 8)))
    check_own_machine([NODE], gpus=False)
    with pytest.raises(UserError, match=r"^this machine has GPUs, and torch 2\.8\.0 is built for CUDA 13\.0"):
        check_own_machine([NODE], gpus=True)


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
    assert packages_of(Job.model_validate(content), "training") == ["deepspeed", "mlflow"]
    assert packages_of(Job.model_validate(content), "preparing") == []
    content["training"]["adapter"], content["model"]["quantize"] = {"rank": 4}, "nf4"
    adapting = Job.model_validate(content)
    assert packages_of(adapting, "training") == ["deepspeed", "peft", "bitsandbytes", "mlflow"]
    assert packages_of(adapting, "evaluating") == ["bitsandbytes"]
    del content["training"]["adapter"], content["model"]["quantize"]
    content["training"] |= {"optimizer": "adamw_8bit", "fused_loss": "liger"}
    packages = packages_of(Job.model_validate(content), "training")
    assert packages == ["deepspeed", "bitsandbytes", "liger_kernel", "mlflow"]


@pytest.mark.parametrize("place", ["prepared", "run", "train", "eval"])
def test_a_node_without_s3fs_is_told_where_the_job_has_an_address_of_s3(place: str) -> None:
    content = yaml.safe_load(LEAST)
    if place in content["output"]:
        content["output"][place] = "s3://bucket/folder"
    else:
        content["data"][place] = [{"files": "s3a://bucket/rows.jsonl", "kind": "pretrain"}]
    needed = packages_of(Job.model_validate(content), "preparing")
    assert needed == ["s3fs"]
    found = problem(NODE, replace(OWN, missing=needed), OWN, OUTPUTS)
    assert found == "node 10.0.0.7 has no s3fs; install there what is installed here: pip install s3fs"


def test_the_nodes_of_a_cluster_are_asked(ray_head: RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder they share passes and is left as it was; one that they see otherwise, and a missing module, do not."""
    outputs = {"output.prepared": str(tmp_path / "new" / "prepared"), "output.run": "s3://bucket/run"}
    nodes = alive_nodes()
    check_nodes(nodes, {}, outputs, modules=["deepspeed"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=rf"^node {nodes[0].address} has no nowhere_to_be_found; install"):
        check_nodes(nodes, {}, outputs, modules=["nowhere_to_be_found"])
    check_nodes(nodes, {"kind": "other"}, outputs, modules=["nowhere_to_be_found"])

    @contextlib.contextmanager
    def elsewhere(_: object) -> Iterator[dict[str, str]]:
        yield {"output.prepared": str(tmp_path / "other" / "mark")}

    rows, gone = tmp_path / "rows.jsonl", tmp_path / "gone.jsonl"
    rows.touch()
    check_nodes(nodes, {}, outputs, inputs={"data.train[0].files": str(rows)})
    inputs = {"data.train[0].files": str(rows), "data.train[1].files": str(gone)}
    with pytest.raises(UserError, match=rf"^data\.train\[1\]\.files {gone}: node \S+ does not see it; give a folder"):
        check_nodes(nodes, {}, outputs, inputs=inputs)
    monkeypatch.setattr(probe, "_marks", elsewhere)
    with pytest.raises(UserError, match=rf"^output\.prepared {tmp_path}/new/prepared: node \S+ does not see what"):
        check_nodes(nodes, {}, outputs)


def test_a_mark_is_there_only_while_nodes_look(tmp_path: Path) -> None:
    with probe._marks({"output.run": str(tmp_path / "a" / "b")}) as marks:
        assert [str(path) for path in tmp_path.iterdir()] == list(marks.values())
        assert look(marks, []).unseen == []
    assert list(tmp_path.iterdir()) == []
    assert look(marks, []).unseen == ["output.run"]


NO_ANSWER = ("timed out during startup", "Failed to connect to GCS")


@contextlib.contextmanager
def joined_node(head: RayHead, log: Path, *options: str, inside: tuple[str, ...] = ()) -> Iterator[None]:
    """`ray start --address` on this machine, for the time of the block. inside: a command that runs another.

    Started anew where `ray start` gives up for want of an answer of a busy head: within 30 s, which no setting changes.
    """
    command = [*inside, sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={head.address}", "--block"]
    command += ["--num-cpus=1", "--num-gpus=0", "--disable-usage-stats", "--dashboard-agent-listen-port=0", *options]
    environment = {key: value for key, value in head.environment.items() if key != "RAY_ADDRESS"}
    with log.open("wb") as output:
        start = functools.partial(
            subprocess.Popen,
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            start_new_session=True,
        )
        node = start()
        try:
            deadline = time.monotonic() + START_SECONDS
            while "Ray runtime started" not in log.read_text():
                if node.poll() is not None and any(each in log.read_text() for each in NO_ANSWER):
                    node = start()
                assert node.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield
        finally:
            end_processes(node.pid)


ASKING = """
import json, sys
import ray
import yaml
from jobs import evaluating
from jobs.common import connect
from mmray.config.job import Job
from jobs.probe import _ask, check_nodes
from pipelines.nodes import alive_nodes
from mmray.errors import UserError
from mmray.run.evaluation.model import EvaluatedModel
from mmray.run.evaluation.rows import EvaluationData
from mmray.run.evaluation.standalone import EvaluationPlan
from mmray.run.scoring.settings import EvaluationSettings
from tests.mmray.config.test_docs_jobs import LEAST

address, shared = sys.argv[1:]

def told(**options):
    outputs = {"output.run": shared + "/run"} if options.pop("writes", False) else {}
    try:
        check_nodes(alive_nodes(), options.pop("labels", {}), outputs, **options)
    except UserError as error:
        return str(error)

connect(address, cpus=1)
answers = _ask(alive_nodes(), {}, ["only_here"], [], {})
found = {"missing": sorted((node.address, answer.missing) for node, answer in answers)}
found["package"] = told(modules=["only_here"])
found["folder"] = told(writes=True)
found["rows"] = told(inputs={"data.train[0].files": shared + "/only_here.py"})
found["others"] = told(modules=["only_here"], writes=True, labels={"disk": "shared"})
ray.shutdown()
outputs = {"prepared": "out/prepared", "run": shared + "-not/run"}
job = Job.model_validate(yaml.safe_load(LEAST) | {"output": outputs})
rows = EvaluationData.of(job, shared + "/rows.jsonl")
try:
    plan = EvaluationPlan(job, EvaluatedModel("base", "base"), rows, EvaluationSettings())
    evaluating._on_cluster(plan, address, False)
except UserError as error:
    found["evaluating"] = str(error)
ray.shutdown()
ray.init(address, runtime_env={"working_dir": shared}, log_to_driver=False)
found["submitted"] = told()
print(json.dumps(found))
"""


def test_each_node_of_a_cluster_is_asked(tmp_path: Path) -> None:
    """A head, a node beside it, and one that has another disk: an empty file system is in the place of a folder."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "only_here.py").touch()
    (shared / "rows.jsonl").write_text('{"text": "A page."}\n')
    mount = f'mount -t tmpfs none {shared} && "$@"'
    another_disk = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh")
    if subprocess.run([*another_disk, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system lets no process mount a folder of its own")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())  # short, as the paths of sockets must be
        head = stack.enter_context(running_head(tmp_path, "--num-cpus=1", "--labels=disk=shared"))
        stack.enter_context(joined_node(head, tmp_path / "near.log", "--labels=disk=shared"))
        far = ("--labels=disk=own", "--node-ip-address=127.0.0.3", f"--temp-dir={folder}")
        stack.enter_context(joined_node(head, tmp_path / "far.log", *far, inside=another_disk))
        done = python(ASKING, head.address, str(shared), **head.environment | {"PYTHONPATH": str(shared)})
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
    assert [missing for _, missing in found["missing"]] == [["only_here"], [], []]
    assert found["package"].startswith("node 127.0.0.3 has no only_here; install")
    assert found["folder"].startswith(f"output.run {shared}/run: node 127.0.0.3 does not see what this process writes")
    assert found["evaluating"].startswith(f"set rows.jsonl.files {shared}/rows.jsonl: node 127.0.0.3 does not see it")
    assert found["rows"].startswith(f"data.train[0].files {shared}/only_here.py: node 127.0.0.3 does not see it; give")
    assert found["others"] is None
    assert "2 nodes on " in found["submitted"]
    assert "start each with a folder of its own" in found["submitted"]


def test_nodes_of_one_machine_have_folders_of_their_own() -> None:
    def node(address: str, folder: str, number: str = "") -> Node:
        return Node(address, {}, socket=f"{folder}/session_2026/sockets/raylet{number}")

    head = node("10.0.0.7", "/tmp/ray")
    assert shared_folder([head, node("10.0.0.8", "/tmp/ray"), node("10.0.0.7", "/tmp/ray-2")]) is None
    assert shared_folder([head, node("10.0.0.7", "/tmp/ray")]) is None, "two containers, one address"
    found = shared_folder([head, node("10.0.0.8", "/tmp/ray"), node("10.0.0.7", "/tmp/ray", ".1")])
    assert found is not None
    assert found.startswith("2 nodes on 10.0.0.7 share /tmp/ray, where Ray would replace the submitted code")
    assert found.endswith("start each with a folder of its own: ray start --address=… --temp-dir=/tmp/ray-2")


def python(code: str, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, *words],
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
        "from jobs.command_line import run_main; from jobs.common import connect\n"
        f"def main() -> None: connect('{ray_head.address}', cpus=1)\n"
        "run_main(main)",
        **ray_head.environment,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: the cluster at {ray_head.address} runs Ray 2.")
    assert "this process Ray 1.2.3 with Python 3.4.5; run this where both are the same" in line
