"""The node types of cluster.yaml under Ray's autoscaler: nodes come for preparing and for training, and go.

Only the provider is another one: Ray's own for tests, whose nodes are raylets on this machine, with GPUs in name alone.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.util.state import list_actors, list_nodes

from mmray.prepared import PreparedDataset
from tests.conftest import ROOT, Inputs, RayHead, free_port, running_head

HEAD_ID = "f" * 51 + "00000"
"""What Ray's local provider takes its head's node id to be."""

NODE_CPUS = {"cpu_workers": {"CPU": 1}, "gpu_workers": {"CPU": 4, "GPU": 1}}
"""Nodes smaller than those of cluster.yaml, so that two actors need two of them."""

WAIT_SECONDS = 300


def on_this_machine(cluster: dict[str, Any], port: int, folder: str) -> dict[str, Any]:
    """cluster.yaml with nodes on this machine. port: of the head. folder: for the folders of the nodes."""
    types = cluster["available_node_types"]
    head = types.pop(cluster["head_node_type"])
    types = {name: {**kind, "resources": NODE_CPUS[name], "node_config": {}} for name, kind in types.items()}
    return {
        **{key: cluster[key] for key in ("cluster_name", "max_workers", "upscaling_speed")},
        "idle_timeout_minutes": 0.15,
        "provider": {
            "type": "external",
            "module": "tests.jobs.node_provider.NodesWithFolders",
            "folder": folder,
            "head_node_id": HEAD_ID,
            "gcs_address": f"127.0.0.1:{port}",
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": head["resources"], "node_config": {}, "max_workers": 0}, **types,
        },
        "head_node_type": "ray.head.default",
        **{f"{what}_commands": [] for what in ("setup", "head_setup", "worker_setup", "worker_start_ray")},
        "cluster_synced_files": [],
        "file_mounts": {},
        "auth": {},
    }  # fmt: skip


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """A head with no CPU of its own, that starts and stops nodes."""
    folder = tmp_path_factory.mktemp("autoscaling")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as nodes:
        config = on_this_machine(yaml.safe_load((ROOT / "cluster.yaml").read_text()), port, nodes)
        (folder / "cluster.yaml").write_text(json.dumps(config))
        with running_head(
            folder,
            "--num-cpus=0",
            f"--autoscaling-config={folder / 'cluster.yaml'}",
            port=port,
            PYTHONPATH=str(ROOT),  # for the provider
            RAY_FAKE_CLUSTER="1",
            RAY_enable_autoscaler_v2="1",
            RAY_CLOUD_INSTANCE_ID=HEAD_ID,
            RAY_OVERRIDE_NODE_ID_FOR_TESTING=HEAD_ID,
            AUTOSCALER_UPDATE_INTERVAL_S="1",
        ) as running:
            yield running


def workers(head: RayHead) -> dict[str, dict[str, str]]:
    """Labels of the nodes that are up, by their ids; the head left out."""
    nodes = list_nodes(address=head.dashboard, detail=True)
    return {node.node_id: node.labels for node in nodes if node.state == "ALIVE" and not node.is_head_node}


TRAINING = """
import json, sys
import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from jobs.capacity import check_growth, train_pools, uses_gpus, worker_needs
from jobs.common import connect
from mmray.config.job import load_job
from pipelines.nodes import alive_nodes

job = load_job(sys.argv[1])
connect(None, cpus=1)
nodes = alive_nodes()
assert uses_gpus(job, nodes)
check_growth(job, nodes)
_, mask_pool, render_pool = train_pools(job, gpus=True)

@ray.remote
def place():
    return ray.get_runtime_context().get_node_id()

def worker(config):
    places = {"worker": [ray.get_runtime_context().get_node_id()]}
    if ray.train.get_context().get_world_rank() == 0:  # as the data's actors, which come after the workers
        for pool in config["pools"]:
            options = {"num_cpus": pool.needs.get("CPU", 0), "num_gpus": pool.needs.get("GPU", 0)}
            options["label_selector"] = config["labels"]
            places[pool.name] = ray.get([place.options(**options).remote() for _ in range(pool.count)])
    print(json.dumps(places), file=open(config["out"], "a"))

TorchTrainer(
    worker,
    train_loop_config={"pools": [mask_pool, render_pool], "labels": job.resources.train_labels, "out": sys.argv[2]},
    torch_config=TorchConfig(backend="gloo"),
    scaling_config=ScalingConfig(
        num_workers=job.resources.workers, use_gpu=True, label_selector=job.resources.train_labels,
        resources_per_worker=worker_needs(job, True),
    ),
).fit()
"""


def test_gpu_nodes_come_for_training_and_go(head: RayHead, inputs: Inputs, tmp_path: Path) -> None:
    """GPU nodes alone, 0 -> 2 -> 0: Ray Train asks for a job's workers, then these for its actors, on logical GPUs."""
    resources = {"workers": 2, "autoscaling": True, "use_gpu": True, "train_labels": {"mmray": "train"}}
    (tmp_path / "job.yaml").write_text(json.dumps(inputs.job(tmp_path, resources=resources)))
    wait_for_no_workers(head)
    training = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path / "job.yaml"), str(tmp_path / "places")],
        cwd=ROOT, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    seen: dict[str, dict[str, str]] = {}
    deadline = time.monotonic() + WAIT_SECONDS
    while training.poll() is None and time.monotonic() < deadline:
        seen |= workers(head)
        time.sleep(0.5)
    training.kill()
    output = training.communicate()[0]
    assert training.returncode == 0, output
    places = [json.loads(line) for line in (tmp_path / "places").read_text().splitlines()]
    assert sorted(name for each in places for name in each) == ["mask actors", "render actors", "worker", "worker"]
    assert {node for each in places for nodes in each.values() for node in nodes} == set(seen)
    assert len(seen) == 2
    assert {labels["mmray"] for labels in seen.values()} == {"train"}
    wait_for_no_workers(head)


def wait_for_no_workers(head: RayHead) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while left := workers(head):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def test_nodes_come_for_preparing_and_go(head: RayHead, inputs: Inputs, tmp_path: Path) -> None:
    """CPU nodes alone, 0 -> 2 -> 0, with all actors on them; the GPU nodes, which would have room too, stay away."""
    resources = {"encode_actors": 2, "autoscaling": True, "prepare_labels": {"mmray": "prepare"}}
    (tmp_path / "job.yaml").write_text(json.dumps(inputs.job(tmp_path, resources=resources)))
    wait_for_no_workers(head)
    words = ["job", "submit", "--address", head.dashboard, "--working-dir", ".", "--runtime-env"]
    words += ["jobs/runtime_env.yaml", "--", "python", "jobs/prepare.py", str(tmp_path / "job.yaml")]
    job = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", *words],
        cwd=ROOT, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    seen, placed = {}, {}
    deadline = time.monotonic() + WAIT_SECONDS
    ended = False
    while not ended and time.monotonic() < deadline:
        ended = job.poll() is not None  # Ray lists actors that have ended too: look once more
        seen |= workers(head)
        actors = list_actors(address=head.dashboard, detail=True)
        placed |= {actor.actor_id: actor.node_id for actor in actors if "MapWorker" in actor.class_name}
        time.sleep(0.5)
    output = job.communicate(timeout=WAIT_SECONDS)[0]
    assert job.returncode == 0, output
    assert "needs 2 CPU (it has 0) on nodes labelled mmray: prepare; waiting for the cluster to grow" in output
    assert "71 read = 60 packed + 11 rejected" in output
    assert len(PreparedDataset(f"{tmp_path}/prepared/train")) > 0
    assert len(seen) == 2
    assert {labels["mmray"] for labels in seen.values()} == {"prepare"}
    assert len(placed) == 2
    assert set(placed.values()) == set(seen)
    wait_for_no_workers(head)
