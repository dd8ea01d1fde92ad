"""The Kubernetes manifests hold together with KubeRay's schema, with Ray's autoscaler and with cluster.yaml.

SCHEMAS has names, types and enums of the fields that the manifests use, as KubeRay's custom resource definitions have
them (release 1.7, "KubeRay CRD API reference" in Ray's documentation); any other field is an error. So what passes here
passes there. Pod templates are checked by Kubernetes' own schema, which the package kubernetes-validate brings.
"""

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from mmray import __version__
from tests.conftest import ROOT

KUBERNETES = "1.35"
Manifest = dict[str, Any]


def fields(required: str, **properties: Manifest) -> Manifest:
    names = required.split()
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


STRING, FLAG, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
STRINGS = {"type": "object", "additionalProperties": STRING}  # Ray's amounts too: "8", not 8
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}  # it becomes part of pods' names
GROUP = {"resources": STRINGS, "labels": STRINGS, "template": {"type": "object"}}
CLUSTER = fields(
    "headGroupSpec",
    rayVersion=STRING,
    authOptions=fields("", mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields("", version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT),
    headGroupSpec=fields("template", serviceType=STRING, enableIngress=FLAG, **GROUP),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            "groupName minReplicas maxReplicas template",
            **GROUP,
            groupName=NAME,
            minReplicas=COUNT,
            maxReplicas=COUNT,
        ),
    },
)
JOB = fields(
    "rayClusterSpec",
    entrypoint=STRING,
    runtimeEnvYAML=STRING,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    rayClusterSpec=CLUSTER,
)
SCHEMAS = {
    kind: fields(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=fields("name", name=NAME),
        spec=spec,
    )
    for kind, spec in (("RayCluster", CLUSTER), ("RayJob", JOB))
}


CLOUDS = {"eks": "cluster.yaml", "gke": "cluster-gcp.yaml"}
EACH_CLOUD = pytest.mark.parametrize("cloud", CLOUDS)


def manifests(cloud: str, name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((ROOT / "kubernetes" / cloud / name).read_text()))


def manifest(cloud: str, name: str) -> Manifest:
    (single,) = manifests(cloud, name)
    return single


def machines(cloud: str) -> Manifest:
    """Ray's own file for the same cluster on the same cloud's machines."""
    return yaml.safe_load((ROOT / CLOUDS[cloud]).read_text())


def groups(resource: Manifest) -> list[Manifest]:
    """Head and worker groups of a RayCluster or a RayJob."""
    spec = resource["spec"].get("rayClusterSpec", resource["spec"])
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def validate(resource: Manifest) -> None:
    jsonschema.validate(resource, SCHEMAS[resource["kind"]])
    for group in groups(resource):
        template = {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}
        kubernetes_validate.validate(template, KUBERNETES, strict=True)


@EACH_CLOUD
@pytest.mark.parametrize("name", ["ray_cluster.yaml", "ray_job.yaml"])
def test_manifests_are_what_kuberay_and_kubernetes_define(cloud: str, name: str) -> None:
    validate(manifest(cloud, name))


@EACH_CLOUD
def test_disks_are_what_kubernetes_defines_and_every_pod_mounts_them(cloud: str) -> None:
    resources = manifests(cloud, "shared.yaml")
    for resource in resources:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
    classes = {each["metadata"]["name"] for each in resources if each["kind"] == "StorageClass"}
    (claim,) = (each for each in resources if each["kind"] == "PersistentVolumeClaim")
    assert claim["spec"]["storageClassName"] in classes
    for group in groups(manifest(cloud, "ray_cluster.yaml")):
        pod = group["template"]["spec"]
        shared, scratch = pod["volumes"]
        assert shared["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        if "ephemeral" in scratch:
            assert scratch["ephemeral"]["volumeClaimTemplate"]["spec"]["storageClassName"] in classes
        else:
            assert group["groupName"] == "gpu-workers", "their nodes have disks of their own"
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {"/shared": shared["name"], "/tmp": scratch["name"]}
        environment = {each["name"]: each["value"] for each in container["env"]}
        assert environment["HF_HOME"].startswith("/shared/")
        assert environment["TMPDIR"] == "/tmp"


def test_files_of_the_shared_folder_are_of_the_pods_user() -> None:
    (shared,) = (
        each
        for each in manifests("eks", "shared.yaml")
        if each["metadata"]["name"] == "mmray-shared" and each["kind"] == "StorageClass"
    )
    owner = {"runAsUser": int(shared["parameters"]["uid"]), "runAsGroup": int(shared["parameters"]["gid"])}
    (job,) = (each for each in manifests("gke", "shared.yaml") if each["kind"] == "Job")
    assert job["spec"]["template"]["spec"]["containers"][0]["command"][1] == "{runAsUser}:{runAsGroup}".format(**owner)
    for cloud in CLOUDS:
        for group in groups(manifest(cloud, "ray_cluster.yaml")):
            assert owner.items() <= group["template"]["spec"]["securityContext"].items()
    assert f"--chown={owner['runAsUser']}:{owner['runAsGroup']} " in (ROOT / "Dockerfile").read_text()


def test_the_volume_of_the_docs_is_one_that_the_shared_claim_can_have() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text()
    (volume,) = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(apiVersion.*?)```", text, flags=re.DOTALL))
    kubernetes_validate.validate(volume, KUBERNETES, strict=True)
    (claim,) = (each for each in manifests("eks", "shared.yaml") if each["kind"] == "PersistentVolumeClaim")
    assert f"`volumeName: {volume['metadata']['name']}`" in text
    assert volume["spec"]["accessModes"] == claim["spec"]["accessModes"]
    assert volume["spec"]["capacity"]["storage"] == claim["spec"]["resources"]["requests"]["storage"]


MISTAKES: dict[str, Callable[[Manifest], Any]] = {
    "unknown field": lambda spec: spec.update(autoscaling=True),
    "unknown option": lambda spec: spec["autoscalerOptions"].update(idleTimeoutMinutes=5),
    "unknown mode": lambda spec: spec["authOptions"].update(mode="tokens"),
    "amount as a number": lambda spec: spec["headGroupSpec"]["resources"].update(CPU=0),
    "count as a string": lambda spec: spec["workerGroupSpecs"][0].update(maxReplicas="8"),
    "no name": lambda spec: spec["workerGroupSpecs"][0].pop("groupName"),
    "name no pod can have": lambda spec: spec["workerGroupSpecs"][0].update(groupName="cpu_workers"),
    "field of a pod": lambda spec: spec["workerGroupSpecs"][1]["template"]["spec"].update(toleration=[]),
    "field of a container": lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0].update(imge="x"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_manifest_is_found(mistake: str) -> None:
    resource = copy.deepcopy(manifest("eks", "ray_job.yaml"))
    MISTAKES[mistake](resource["spec"]["rayClusterSpec"])
    with pytest.raises(jsonschema.ValidationError):
        validate(resource)


@EACH_CLOUD
def test_the_autoscaler_sees_the_groups_of_the_cluster_on_machines(cloud: str) -> None:
    resource = manifest(cloud, "ray_cluster.yaml")
    resource["metadata"]["namespace"] = "default"
    seen = _derive_autoscaling_config_from_ray_cr(resource)
    cluster = machines(cloud)
    types = cluster["available_node_types"]
    head = seen["available_node_types"].pop("headgroup")
    assert head["resources"]["CPU"] == types.pop("head")["resources"]["CPU"] == 0
    assert set(seen["available_node_types"]) == {name.replace("_", "-") for name in types}
    for name, type in types.items():
        group = seen["available_node_types"][name.replace("_", "-")]
        assert group["resources"].pop("memory") > 0
        assert {key: group[key] for key in ("min_workers", "max_workers", "resources", "labels")} == {
            key: type[key] for key in ("min_workers", "max_workers", "resources", "labels")
        }
    assert seen["max_workers"] == cluster["max_workers"]
    assert seen["idle_timeout_minutes"] == cluster["idle_timeout_minutes"]


@EACH_CLOUD
def test_pods_are_placed_on_the_machines_of_the_cluster_and_fit_there(cloud: str) -> None:
    """CPU pods have a disk of their own and need no machine with one (c6i for c6id, without -lssd)."""
    types = machines(cloud)["available_node_types"]
    for group in groups(manifest(cloud, "ray_cluster.yaml"))[1:]:
        node, pod = types[group["groupName"].replace("-", "_")], group["template"]["spec"]
        config = node["node_config"]
        machine = config.get("InstanceType") or config["machineType"]
        assert pod["nodeSelector"]["node.kubernetes.io/instance-type"] == re.sub("d(?=\\.8xlarge)|-lssd$", "", machine)
        is_spot = "spot" in yaml.safe_dump([config.get("InstanceMarketOptions"), config.get("scheduling")]).lower()
        assert is_spot == ("spot" in yaml.safe_dump(pod["nodeSelector"]))
        requests, limits = (pod["containers"][0]["resources"][kind] for kind in ("requests", "limits"))
        assert requests["cpu"] < node["resources"]["CPU"]
        assert requests["memory"] == limits["memory"]
        gpus = node["resources"].get("GPU")
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu") == gpus
        assert bool(gpus) == any(toleration["key"] == "nvidia.com/gpu" for toleration in pod.get("tolerations", []))
        devices = sum("efa" in str(each.get("InterfaceType")) for each in config.get("NetworkInterfaces", []))
        assert requests.get("vpc.amazonaws.com/efa", 0) == limits.get("vpc.amazonaws.com/efa", 0) == devices


def test_a_worker_pod_that_ends_drains_its_node_first() -> None:
    """The hook is a command of this checkout, and ends before Kubernetes kills the pod."""
    pods = [group["template"]["spec"] for cloud in CLOUDS for group in groups(manifest(cloud, "ray_cluster.yaml"))[1:]]
    commands = {tuple(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]) for pod in pods}
    (command,) = commands
    assert {pod["terminationGracePeriodSeconds"] > int(command[-1].removeprefix("--seconds=")) for pod in pods} == {
        True
    }
    assert command[0] == "python"
    environment = os.environ | {"RAY_ADDRESS": ""}
    done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no cluster: give --address" in done.stderr, "all its words are understood"


@EACH_CLOUD
def test_the_cluster_is_closed_to_strangers(cloud: str) -> None:
    spec = manifest(cloud, "ray_cluster.yaml")["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert (spec["headGroupSpec"]["serviceType"], spec["headGroupSpec"]["enableIngress"]) == ("ClusterIP", False)


@EACH_CLOUD
def test_the_job_has_the_cluster_and_the_words_of_everywhere(cloud: str) -> None:
    job = manifest(cloud, "ray_job.yaml")["spec"]
    assert job["rayClusterSpec"] == manifest(cloud, "ray_cluster.yaml")["spec"]
    assert re.fullmatch(r"python jobs/prepare\.py /shared/jobs/\w+\.yaml", job["entrypoint"])
    runtime_env = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())
    assert yaml.safe_load(job["runtimeEnvYAML"]) == {"env_vars": runtime_env["env_vars"]}
    assert job["backoffLimit"] == 0, "a mistake would be made again, on a new cluster each time"


@EACH_CLOUD
def test_the_job_that_trains_is_the_one_that_prepares_but_for_two_words(cloud: str) -> None:
    text = (ROOT / "kubernetes" / cloud / "ray_job.yaml").read_text()
    edits = re.search(r"sed '(.+)'", text)
    assert edits
    assert edits[0] in (ROOT / "docs" / "cluster.md").read_text()
    trains = text
    for edit in edits[1].split("; "):
        _, old, new, _ = edit.split("/")
        trains = trains.replace(old, new)
    done, expected = yaml.safe_load(trains), manifest(cloud, "ray_job.yaml")
    expected["metadata"]["name"] = "mmray-train"
    expected["spec"]["entrypoint"] = expected["spec"]["entrypoint"].replace("prepare", "train")
    assert done == expected


@EACH_CLOUD
def test_pods_run_the_images_of_the_cluster_on_machines(cloud: str) -> None:
    cluster = machines(cloud)
    spec = manifest(cloud, "ray_cluster.yaml")["spec"]
    assert f"FROM rayproject/ray:{spec['rayVersion']}-py3" in (ROOT / "Dockerfile").read_text()
    head, cpu, gpu = (group["template"]["spec"]["containers"][0]["image"] for group in groups({"spec": spec}))
    types = cluster["available_node_types"]
    assert head == cpu == cluster["docker"]["image"]
    assert gpu == types["gpu_workers"].get("docker", {}).get("worker_image", cpu)
    assert head.endswith(f":{__version__}")
