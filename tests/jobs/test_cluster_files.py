"""The files that put mmray on a cluster hold together with Ray's own checks and with each other."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import fillout_defaults, validate_config

from mmray.config.job import load_job
from tests.conftest import ROOT


def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_cluster_yaml_passes_rays_validation() -> None:
    config = fillout_defaults(cluster())
    validate_config(config)
    assert config["available_node_types"]["cpu_workers"]["min_workers"] == 0


def test_cluster_yaml_is_closed_to_strangers() -> None:
    config = cluster()
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_job_files_are_valid(path: Path) -> None:
    if path.name == "runtime_env.yaml":
        from ray.runtime_env import RuntimeEnv

        assert RuntimeEnv(**yaml.safe_load(path.read_text()))["excludes"]
    else:
        assert load_job(path).name == path.stem


def test_the_wheel_holds_the_library_alone() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'include = \["mmray", "mmray\.\*"\]', text)


def test_labels_of_the_cluster_are_those_its_page_tells() -> None:
    types = cluster()["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["cpu_workers"]["labels"] != types["gpu_workers"]["labels"]
    text = (ROOT / "docs" / "cluster.md").read_text()
    for kind, setting in (("cpu_workers", "prepare_labels"), ("gpu_workers", "train_labels")):
        labels = ", ".join(f"{key}: {value}" for key, value in types[kind]["labels"].items())
        assert f"{setting}: {{{labels}}}" in text


def test_nodes_install_what_constraints_pin() -> None:
    config = cluster()
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert f":{pinned[1]}-py3" in config["docker"]["image"]
    assert "-c constraints.txt" in config["setup_commands"][-1]
