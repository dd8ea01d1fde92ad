"""The files that put mmray on a cluster hold together with Ray's own checks, with the clouds' own and with each other.

Ray's launcher itself reads cluster.yaml: against a fake AWS (moto), whose requests boto3 checks by AWS's own model, and
with Google's client, whose package has the description of Compute Engine's requests.
"""

import copy
import json
import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import jsonschema
import pytest
import yaml
from cfnlint import api as cfnlint
from cfnlint.config import ManualArgs
from googleapiclient.discovery_cache import get_static_doc
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.gcp.node import GCPCompute
from ray.autoscaler._private.util import fillout_defaults, validate_config
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND

from mmray import __version__
from mmray.config.job import load_job
from tests.conftest import ROOT

CLUSTERS = ("cluster.yaml", "cluster-gcp.yaml")
Config = dict[str, Any]


def cluster(name: str = "cluster.yaml") -> Config:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_accepts_the_file(name: str) -> None:
    config = fillout_defaults(cluster(name))
    validate_config(config)
    assert {type.get("min_workers", 0) for type in config["available_node_types"].values()} == {0}


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_cluster_is_closed_to_strangers(name: str) -> None:
    config = cluster(name)
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert config["provider"]["use_internal_ips"]
    assert config["auth"]["ssh_proxy_use_node_id"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_temporary_files_and_models_have_room(name: str) -> None:
    config = cluster(name)
    for option in ("-v /scratch:/tmp", "-e TMPDIR=/tmp", "-v /shared:/shared", "-e HF_HOME=/shared/huggingface"):
        assert option in config["docker"]["run_options"]
    assert config["setup_commands"] == []


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A fake AWS, as a client of its EC2."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray's launcher writes its key there
    with mock_aws():
        yield boto3.client("ec2", region_name="us-east-1")


def made_on(ec2: Any) -> Config:
    """cluster.yaml with what its placeholders stand for, made in a fake AWS."""
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/20", AvailabilityZone="us-east-1a")["Subnet"]["SubnetId"]
    group = ec2.create_security_group(GroupName="mmray", Description="nodes", VpcId=vpc)["GroupId"]
    image = ec2.describe_images()["Images"][0]["ImageId"]
    iam = boto3.client("iam")
    for name in ("mmray-head", "mmray-worker"):
        iam.create_instance_profile(InstanceProfileName=name)
    text = (ROOT / "cluster.yaml").read_text()
    for kind, value in (("subnet", subnet), ("sg", group), ("ami", image)):
        assert f"{kind}-0123456789abcdef0" in text
        text = text.replace(f"{kind}-0123456789abcdef0", value)
    return yaml.safe_load(text)


def test_rays_launcher_starts_each_kind_of_node_on_aws(aws: Any) -> None:
    written = made_on(aws)
    groups_before = aws.describe_security_groups()["SecurityGroups"]
    config = bootstrap_aws(fillout_defaults(written))
    assert aws.describe_security_groups()["SecurityGroups"] == groups_before, (
        "a group of Ray opens port 22 to the world"
    )
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    machines = {}
    for name, type in config["available_node_types"].items():
        made = provider.create_node(type["node_config"], {TAG_RAY_NODE_KIND: NODE_KIND_WORKER}, 1)
        (machine,) = aws.describe_instances(InstanceIds=list(made))["Reservations"][0]["Instances"]
        machines[name] = machine
        assert machine["InstanceType"] == written["available_node_types"][name]["node_config"]["InstanceType"]
        profile = "mmray-head" if name == "head" else "mmray-worker"
        assert machine["IamInstanceProfile"]["Arn"].endswith(f"/{profile}")
        assert {group["GroupId"] for group in machine["NetworkInterfaces"][0]["Groups"]} == {
            written["available_node_types"]["head"]["node_config"]["SecurityGroupIds"][0]
        }
        (disk,) = aws.describe_volumes(Filters=[{"Name": "attachment.instance-id", "Values": list(made)}])["Volumes"]
        assert disk["Size"] == 300
    assert machines["cpu_workers"]["InstanceLifecycle"] == "spot"
    assert written["available_node_types"]["gpu_workers"]["node_config"]["Placement"]["GroupName"] == "mmray-placement"


def test_each_network_card_of_the_gpu_machines_has_an_efa(aws: Any) -> None:
    """As AWS documents it for P5: the first with IP at device 0, one for each further card at device 1."""
    interfaces = cluster()["available_node_types"]["gpu_workers"]["node_config"]["NetworkInterfaces"]
    cards = [(each["NetworkCardIndex"], each["DeviceIndex"], each["InterfaceType"]) for each in interfaces]
    assert cards == [(0, 0, "efa"), *((card, 1, "efa-only") for card in range(1, 32))]


def test_the_reservation_that_cluster_yaml_shows_is_a_request_of_aws(aws: Any) -> None:
    """boto3 refuses a wrong name before it asks."""
    (line,) = re.findall(r"# (CapacityReservationSpecification: .*)", (ROOT / "cluster.yaml").read_text())
    request = {"ImageId": aws.describe_images()["Images"][0]["ImageId"], "MinCount": 1, "MaxCount": 1}
    aws.run_instances(**request, **yaml.safe_load(line))
    aws.run_instances(**request, InstanceMarketOptions={"MarketType": "capacity-block"})


def test_the_stack_is_what_cloudformation_defines_and_has_what_cluster_yaml_names() -> None:
    text = (ROOT / "clouds" / "aws.yaml").read_text()
    assert cfnlint.lint(text, config=ManualArgs(regions=["us-east-1"])) == []
    assert [each.rule.id for each in cfnlint.lint(text.replace("Strategy: cluster", "Strategy: close"))] == ["E3030"]
    names = set(re.findall(r"(?:InstanceProfileName|RepositoryName): ([\w-]+)", text))
    assert names == {"mmray-head", "mmray-worker", "mmray", "mmray-efa"}
    config = cluster()
    types = config["available_node_types"]
    assert types["head"]["node_config"]["IamInstanceProfile"]["Name"] in names
    assert types["gpu_workers"]["node_config"]["IamInstanceProfile"]["Name"] in names
    images = config["docker"]["image"], types["gpu_workers"]["docker"]["worker_image"]
    assert [image.split("/")[-1] for image in images] == [f"mmray:{__version__}", f"mmray-efa:{__version__}"]


@cache
def google_validator(name: str) -> jsonschema.Draft202012Validator:
    """Checks a message of Compute Engine by Google's description of it. Unknown fields are errors."""
    schemas = json.loads(get_static_doc("compute", "v1"))["schemas"]
    definitions: Config = {}

    def converted(part: Config) -> Config:
        if "$ref" in part:
            if part["$ref"] not in definitions:
                definitions[part["$ref"]] = {}  # a message may hold itself
                definitions[part["$ref"]] = converted(schemas[part["$ref"]])
            return {"$ref": f"#/$defs/{part['$ref']}"}
        result: Config = {"type": part["type"]} if part["type"] != "any" else {}
        if part.get("format") in ("int64", "uint64"):  # these may be written as numbers
            result["type"] = ["string", "integer"]
        result |= {key: part[key] for key in ("enum",) if key in part}
        if "items" in part:
            result["items"] = converted(part["items"])
        if "properties" in part:
            result["properties"] = {key: converted(value) for key, value in part["properties"].items()}
            result["additionalProperties"] = False
        elif isinstance(part.get("additionalProperties"), dict):
            result["additionalProperties"] = converted(part["additionalProperties"])
        return result

    return jsonschema.Draft202012Validator({**converted({"$ref": name}), "$defs": definitions})


INSERTS = json.loads(get_static_doc("compute", "v1"))["resources"]["instances"]["methods"]["insert"]


class FakeCompute:
    """Compute Engine's client as far as Ray starts nodes with it."""

    def __init__(self) -> None:
        self.requests: list[Config] = []
        self._http = SimpleNamespace(credentials=None)

    def instances(self) -> "FakeCompute":
        return self

    def insert(self, **request: Any) -> "FakeCompute":
        self.requests.append(request)
        return self

    def execute(self, **_: object) -> Config:
        return {"name": "operation"}


def google_request(node_config: Config) -> Config:
    """The request by which Ray starts a node of cluster-gcp.yaml."""
    provider, compute = cluster("cluster-gcp.yaml")["provider"], FakeCompute()
    place = provider["project_id"], provider["availability_zone"], "mmray"
    GCPCompute(compute, *place).create_instance(
        node_config, {"ray-node-name": "mmray-worker"}, wait_for_operation=False
    )  # type: ignore[no-untyped-call]
    return compute.requests[0]


@pytest.mark.parametrize("kind", ["head", "cpu_workers", "gpu_workers"])
def test_rays_requests_to_google_are_what_google_defines(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GCPCompute, "get_new_authorized_http", lambda *_: None)
    node_config = cluster("cluster-gcp.yaml")["available_node_types"][kind]["node_config"]
    request = google_request(node_config)
    validator = google_validator(INSERTS["request"]["$ref"])
    validator.validate(request["body"])
    assert set(request) - {"body"} <= set(INSERTS["parameters"])
    assert not any("accessConfigs" in each for each in request["body"]["networkInterfaces"]), "no public address"
    wrong = copy.deepcopy(request["body"])
    wrong["disks"][0]["initializeParams"]["diskSizeGB"] = 300
    with pytest.raises(jsonschema.ValidationError, match="diskSizeGB"):
        validator.validate(wrong)
    wrong = copy.deepcopy(request["body"]) | {"scheduling": {"provisioningModel": "spot"}}
    with pytest.raises(jsonschema.ValidationError, match="'spot' is not one of"):
        validator.validate(wrong)


def test_the_reservation_that_cluster_gcp_yaml_shows_is_what_google_defines() -> None:
    text = (ROOT / "cluster-gcp.yaml").read_text()
    (lines,) = re.findall(r"((?: *# (?:reservationAffinity|  \w+):.*\n)+)", text)
    shown = yaml.safe_load(re.sub(r"^ *# ", "", lines, flags=re.MULTILINE))
    assert set(shown) == {"reservationAffinity"}
    google_validator("ReservationAffinity").validate(shown["reservationAffinity"])


def test_both_clouds_have_the_same_cluster() -> None:
    aws, google = (cluster(name) for name in CLUSTERS)
    for key in (
        "cluster_name",
        "max_workers",
        "idle_timeout_minutes",
        "head_node_type",
        "file_mounts",
        "setup_commands",
    ):
        assert aws[key] == google[key]
    assert aws["docker"]["run_options"] == google["docker"]["run_options"]
    assert aws["head_start_ray_commands"] == google["head_start_ray_commands"]
    assert [
        command.replace("jobs.notices gcp --seconds=120", "jobs.notices aws")
        for command in google["worker_start_ray_commands"]
    ] == (aws["worker_start_ray_commands"])
    for key in ("labels", "max_workers"):
        assert [type.get(key) for type in aws["available_node_types"].values()] == [
            type.get(key) for type in google["available_node_types"].values()
        ]


FAKES = {
    "sudo": 'exec "$@"',
    "mountpoint": 'grep -qx "$2" {folder}/mounted',
    "mount": 'echo "mount $*" >> {folder}/done; echo "${{@: -1}}" >> {folder}/mounted',
    "mdadm": 'echo "mdadm $*" >> {folder}/done',
    "mkfs.xfs": 'echo "mkfs.xfs $*" >> {folder}/done',
}


@pytest.mark.parametrize(
    ("name", "disk", "num_disks", "mounted", "done"),
    [
        ("cluster.yaml", "nvme-Amazon_EC2_NVMe_Instance_Storage_AWS", 0, [], []),
        ("cluster.yaml", "nvme-Amazon_EC2_NVMe_Instance_Storage_AWS", 1, [], ["mdadm", "mkfs.xfs", "mount"]),
        ("cluster.yaml", "nvme-Amazon_EC2_NVMe_Instance_Storage_AWS", 8, [], ["mdadm", "mkfs.xfs", "mount"]),
        ("cluster.yaml", "nvme-Amazon_EC2_NVMe_Instance_Storage_AWS", 8, ["/opt/dlami/nvme"], ["mount --bind"]),
        ("cluster.yaml", "nvme-Amazon_EC2_NVMe_Instance_Storage_AWS", 8, ["/scratch"], []),
        ("cluster-gcp.yaml", "google-local-nvme-ssd-", 0, [], []),
        ("cluster-gcp.yaml", "google-local-nvme-ssd-", 16, [], ["mdadm", "mkfs.xfs", "mount"]),
        ("cluster-gcp.yaml", "google-local-nvme-ssd-", 16, ["/scratch"], []),
    ],
)  # fmt: skip
def test_all_fast_disks_become_one_folder(
    name: str, disk: str, num_disks: int, mounted: list[str], done: list[str], tmp_path: Path
) -> None:
    """The command runs with tools that only write down what they are asked; each disk has two names, as udev gives."""
    (command,) = (each for each in cluster(name)["initialization_commands"] if "/scratch" in each)
    links, tools = tmp_path / "by-id", tmp_path / "bin"
    links.mkdir()
    tools.mkdir()
    for number in range(num_disks):
        (tmp_path / f"nvme{number}n1").touch()
        for ending in ("", "-ns-1"):
            (links / f"{disk}{number}{ending}").symlink_to(tmp_path / f"nvme{number}n1")
    for tool, text in FAKES.items():
        (tools / tool).write_text("#!/bin/bash\n" + text.format(folder=tmp_path) + "\n")
        (tools / tool).chmod(0o755)
    command = command.replace("/dev/disk/by-id", str(links)).replace("/scratch", f"{tmp_path}/scratch")
    (tmp_path / "mounted").write_text(
        "".join(f"{each}\n".replace("/scratch", f"{tmp_path}/scratch") for each in mounted)
    )
    (tmp_path / "done").touch()
    path = {"PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", f"true && ({command})"], check=True, env=path)  # as Ray runs it
    lines = (tmp_path / "done").read_text().splitlines()
    assert len(lines) == len(done)
    assert all(line.startswith(begin) for line, begin in zip(lines, done, strict=True))
    if "mdadm" in done:
        disks = sorted(str(tmp_path / f"nvme{number}n1") for number in range(num_disks))
        assert f"--raid-devices={num_disks} {' '.join(disks)}" in lines[0]
    assert (tmp_path / "scratch").stat().st_mode & 0o7777 == 0o1777


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_command_is_one_that_bash_reads(name: str) -> None:
    config = cluster(name)
    commands = [command for key in config if key.endswith("_commands") for command in config[key]]
    assert len(commands) >= 9
    for command in commands:
        subprocess.run(["bash", "-n", "-c", f"true && ({command})"], check=True)


def test_nodes_run_the_image_that_has_what_constraints_pin() -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    text = (ROOT / "Dockerfile").read_text()
    assert pinned
    assert f"FROM rayproject/ray:{pinned[1]}-py3" in text
    assert "pip install --no-cache-dir -c constraints.txt" in text
    assert f":{__version__} ." in text
    for name in CLUSTERS:
        assert cluster(name)["docker"]["image"].endswith(f"/mmray:{__version__}")
    kept = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert {"jobs", "mmray", "pipelines", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == set(kept)


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


@pytest.mark.parametrize("name", CLUSTERS)
def test_labels_of_the_cluster_are_those_its_page_tells(name: str) -> None:
    types = cluster(name)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["cpu_workers"]["labels"] != types["gpu_workers"]["labels"]
    text = (ROOT / "docs" / "cluster.md").read_text()
    for kind, setting in (("cpu_workers", "prepare_labels"), ("gpu_workers", "train_labels")):
        labels = ", ".join(f"{key}: {value}" for key, value in types[kind]["labels"].items())
        assert f"{setting}: {{{labels}}}" in text
