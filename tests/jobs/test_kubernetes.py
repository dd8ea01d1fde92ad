"""The Kubernetes manifests hold together with KubeRay's schema, with Ray's autoscaler and with cluster.yaml.

SCHEMAS has names, types and enums of the fields that the manifests use, as KubeRay's custom resource definitions have
them (release 1.7, "KubeRay CRD API reference" in Ray's documentation); any other field is an error. So what passes here
passes there. Pod templates are checked by Kubernetes' own schema, which the package kubernetes-validate brings.
"""

import copy
import re
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


def manifest(name: str) -> Manifest:
    return yaml.safe_load((ROOT / "kubernetes" / name).read_text())


def groups(resource: Manifest) -> list[Manifest]:
    """Head and worker groups of a RayCluster or a RayJob."""
    spec = resource["spec"].get("rayClusterSpec", resource["spec"])
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def validate(resource: Manifest) -> None:
    jsonschema.validate(resource, SCHEMAS[resource["kind"]])
    for group in groups(resource):
        template = {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}
        kubernetes_validate.validate(template, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", ["ray_cluster.yaml", "ray_job.yaml"])
def test_manifests_are_what_kuberay_and_kubernetes_define(name: str) -> None:
    validate(manifest(name))


def test_the_shared_claim_is_what_kubernetes_defines_and_every_pod_mounts_it() -> None:
    claim = manifest("shared.yaml")
    kubernetes_validate.validate(claim, KUBERNETES, strict=True)
    for group in groups(manifest("ray_cluster.yaml")):
        pod = group["template"]["spec"]
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert {"name": pod["volumes"][0]["name"], "mountPath": "/shared"} in pod["containers"][0]["volumeMounts"]


def test_the_volume_of_the_docs_is_one_that_the_shared_claim_can_have() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text()
    (volume,) = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(apiVersion.*?)```", text, flags=re.DOTALL))
    kubernetes_validate.validate(volume, KUBERNETES, strict=True)
    claim = manifest("shared.yaml")
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
    resource = copy.deepcopy(manifest("ray_job.yaml"))
    MISTAKES[mistake](resource["spec"]["rayClusterSpec"])
    with pytest.raises(jsonschema.ValidationError):
        validate(resource)


def test_the_autoscaler_sees_the_groups_of_cluster_yaml() -> None:
    resource = manifest("ray_cluster.yaml")
    resource["metadata"]["namespace"] = "default"
    seen = _derive_autoscaling_config_from_ray_cr(resource)
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
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


def test_pods_are_placed_on_the_machines_of_cluster_yaml_and_fit_there() -> None:
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    for group in groups(manifest("ray_cluster.yaml"))[1:]:
        node, pod = types[group["groupName"].replace("-", "_")], group["template"]["spec"]
        assert pod["nodeSelector"]["node.kubernetes.io/instance-type"] == node["node_config"]["InstanceType"]
        spot = node["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        assert pod["nodeSelector"].get("karpenter.sh/capacity-type") == spot
        requests, limits = (pod["containers"][0]["resources"][kind] for kind in ("requests", "limits"))
        assert requests["cpu"] < node["resources"]["CPU"]
        assert requests["memory"] == limits["memory"]
        gpus = node["resources"].get("GPU")
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu") == gpus
        assert bool(gpus) == any(toleration["key"] == "nvidia.com/gpu" for toleration in pod.get("tolerations", []))


def test_the_cluster_is_closed_to_strangers() -> None:
    spec = manifest("ray_cluster.yaml")["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert (spec["headGroupSpec"]["serviceType"], spec["headGroupSpec"]["enableIngress"]) == ("ClusterIP", False)


def test_the_job_has_the_cluster_and_the_words_of_everywhere() -> None:
    job = manifest("ray_job.yaml")["spec"]
    assert job["rayClusterSpec"] == manifest("ray_cluster.yaml")["spec"]
    assert re.fullmatch(r"python jobs/prepare\.py /shared/jobs/\w+\.yaml", job["entrypoint"])
    runtime_env = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())
    assert yaml.safe_load(job["runtimeEnvYAML"]) == {"env_vars": runtime_env["env_vars"]}


def test_the_job_that_trains_is_the_one_that_prepares_but_for_two_words() -> None:
    text = (ROOT / "kubernetes" / "ray_job.yaml").read_text()
    edits = re.search(r"sed '(.+)'", text)
    assert edits
    assert edits[0] in (ROOT / "docs" / "cluster.md").read_text()
    trains = text
    for edit in edits[1].split("; "):
        _, old, new, _ = edit.split("/")
        trains = trains.replace(old, new)
    done, expected = yaml.safe_load(trains), manifest("ray_job.yaml")
    expected["metadata"]["name"] = "mmray-train"
    expected["spec"]["entrypoint"] = expected["spec"]["entrypoint"].replace("prepare", "train")
    assert done == expected


def test_the_image_is_the_one_of_cluster_yaml_with_the_same_installation() -> None:
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    text = (ROOT / "kubernetes" / "Dockerfile").read_text()
    assert f"FROM {cluster['docker']['image']}\n" in text
    install = cluster["setup_commands"][-1].split("pip install ")[1]
    assert install in text
    spec = manifest("ray_cluster.yaml")["spec"]
    assert f":{spec['rayVersion']}-py3" in cluster["docker"]["image"]
    images = {group["template"]["spec"]["containers"][0]["image"] for group in groups(manifest("ray_cluster.yaml"))}
    (image,) = images
    assert image.endswith(f":{__version__}")
    assert f"-t {image} ." in text
    kept = re.findall(r"^!(.+)$", (ROOT / "kubernetes" / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert {"jobs", "mmray", "pipelines", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == set(kept)
