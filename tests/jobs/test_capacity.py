"""Whether pools fit on nodes: by totals, and node by node."""

import pytest
import yaml
from ray.autoscaler._private.resource_demand_scheduler import get_bin_pack_residual

from jobs.capacity import Pool, check_capacity, check_growth, lack, train_pools, uses_gpus
from mmray.config.job import Job
from mmray.errors import UserError
from pipelines.nodes import Node
from tests.mmray.config.test_docs_jobs import LEAST


def nodes(*resources: dict[str, float], **labels: str) -> list[Node]:
    return [Node(f"10.0.0.{number}", each, labels) for number, each in enumerate(resources)]


def job(**resources: object) -> Job:
    return Job.model_validate(yaml.safe_load(LEAST) | {"resources": resources})


EIGHT, GPU = {"CPU": 8}, {"CPU": 8, "GPU": 1}


@pytest.mark.parametrize(
    ("resources", "gpus", "on", "message"),
    [
        ({"workers": 4, "cpus_per_worker": 3}, False, [EIGHT, EIGHT], ""),
        ({"workers": 4, "cpus_per_worker": 4}, False, [EIGHT, EIGHT], "18 CPU (it has 16)"),
        (
            {"workers": 2, "cpus_per_worker": 6}, False, [{"CPU": 4}] * 4,
            "nodes that hold 2 training workers of 6 CPU each; its own (4 × 4 CPU) hold 0",
        ),
        (
            {"workers": 3, "cpus_per_worker": 5}, False, [EIGHT, EIGHT, {"CPU": 4}],
            "nodes that hold 3 training workers of 5 CPU each; its own (2 × 8 CPU, 4 CPU) hold 2",
        ),
        # Each GPU that trains computes labels on its own share, whatever the number of actors for CPUs.
        ({"workers": 2, "mask_actors": 9}, True, [GPU, GPU], ""),
        ({"workers": 3, "gpu_share": 0.4}, True, [{"CPU": 8, "GPU": 3}], ""),
        ({"workers": 3}, True, [GPU, GPU], "3 GPU (it has 2)"),
        ({"workers": 2, "mask_actors": 5, "gpu_share": 0}, True, [GPU, {"CPU": 4, "GPU": 1}], ""),
        (
            {"workers": 2, "mask_actors": 2, "gpu_share": 0, "cpus_per_worker": 6}, True, [GPU, {"CPU": 6, "GPU": 1}],
            "15 CPU (it has 14)",
        ),
        ({"workers": 2, "cpus_per_worker": 2, "mask_actors": 9}, False, [EIGHT], ""),  # never more than workers
        ({"workers": (1, 9), "cpus_per_worker": 6}, False, [EIGHT], ""),
    ],
)  # fmt: skip
def test_pools_of_a_training(
    resources: dict[str, object], gpus: bool, on: list[dict[str, float]], message: str
) -> None:
    assert lack(train_pools(job(**resources), gpus), nodes(*on), {}) == message


def test_only_nodes_with_the_labels_count() -> None:
    pools = [Pool("actors", 2, {"CPU": 1})]
    both = [*nodes({"CPU": 1}, kind="cpu"), *nodes({"CPU": 9})]
    assert lack(pools, both, {}) == ""
    assert lack(pools, both, {"kind": "cpu"}) == "2 CPU (it has 1) on nodes labelled kind: cpu"


def test_a_label_that_no_node_has_is_told_with_those_that_nodes_have() -> None:
    pools = [Pool("actors", 2, {"CPU": 1})]
    both = [*nodes({"CPU": 9}, mmray="prepare", zone="a"), *nodes({"CPU": 9})]
    with pytest.raises(UserError) as error:
        check_capacity(job(), pools, "preparing", {"mmray": "prepair"}, both)
    assert str(error.value) == (
        "preparing needs nodes labelled mmray: prepair, and none of 2 nodes is; others have mmray: prepare. Correct "
        "the labels under `resources`, or start nodes with these: ray start --labels mmray=prepair"
    )
    with pytest.raises(UserError, match=r"none of 1 node is\. Correct the labels"):
        check_capacity(job(), pools, "preparing", {"mmray": "prepare"}, nodes({"CPU": 9}))
    line = check_capacity(job(autoscaling=True), pools, "preparing", {"mmray": "prepair"}, both)
    assert line == "preparing needs 2 CPU (it has 0) on nodes labelled mmray: prepair; waiting for the cluster to grow"


def test_a_cluster_that_grows_is_waited_for_with_a_line() -> None:
    pools, three = [Pool("actors", 2, {"CPU": 4})], nodes(*[{"CPU": 3}] * 3)
    line = check_capacity(job(autoscaling=True), pools, "training", {}, three)
    assert line is not None
    assert line.startswith("training needs nodes that hold 2 actors")
    assert line.endswith("(3 × 3 CPU) hold 0; waiting for the cluster to grow")
    assert check_capacity(job(), pools, "training", {}, nodes({"CPU": 8})) is None
    with pytest.raises(UserError, match=r"^training needs nodes that hold 2 actors .* Lower the pools under"):
        check_capacity(job(), pools, "training", {}, three)


def test_gpus_are_taken_where_there_are_any() -> None:
    assert uses_gpus(job(), nodes(EIGHT, GPU))
    assert not uses_gpus(job(), nodes(EIGHT))
    assert not uses_gpus(job(use_gpu=False), nodes(GPU))
    with pytest.raises(UserError, match="the cluster has no GPU; add GPU nodes or set it to false"):
        uses_gpus(job(use_gpu=True), nodes(EIGHT))
    assert uses_gpus(job(use_gpu=True, autoscaling=True), nodes(EIGHT))


NEEDS_SMALLER_SHARES: list[tuple[dict[str, object], list[dict[str, float]], str | None]] = [
        ({"workers": 16, "mask_actors": 16}, [{"CPU": 8}], None),  # the default share; no GPU node is up yet
        ({"workers": 3, "mask_actors": 40}, [{"CPU": 8}], None),
        ({"workers": 8, "mask_actors": 2, "gpu_share": 0.2}, [], None),
        (
            {"workers": 10, "gpu_share": 0.2}, [],
            ("resources.gpu_share is 0.2: for 10 workers the autoscaler would start 2 nodes of 4 GPUs, where Ray can "
             "place 8 of them; set it to 0.1"),
        ),
        ({"workers": 10, "gpu_share": 0.2}, [{"CPU": 8, "GPU": 1}], None),
        ({"workers": 16}, [{"CPU": 8, "GPU": 16}], None),
        (
            {"workers": (1, 17)}, [{"CPU": 8}, {"CPU": 8, "GPU": 16}],
            ("resources.gpu_share is 0.1: for 17 workers the autoscaler would start 1 node of 16 GPUs, where Ray can "
             "place 16 of them; set it to 0.05"),
        ),
        ({"workers": 1, "mask_actors": 8, "gpu_share": 0.4}, [{"CPU": 8, "GPU": 4}], None),  # labels on its own GPU
        ({"workers": 17, "gpu_share": 0}, [{"CPU": 8, "GPU": 16}], None),
]  # fmt: skip


@pytest.mark.parametrize(("resources", "on", "message"), NEEDS_SMALLER_SHARES)
def test_the_autoscaler_starts_as_many_gpu_nodes_as_ray_needs(
    resources: dict[str, object], on: list[dict[str, float]], message: str | None
) -> None:
    growing = job(autoscaling=True, **resources)
    if message is None:
        check_growth(growing, nodes(*on))
        return
    with pytest.raises(UserError) as raised:
        check_growth(growing, nodes(*on))
    assert message == str(raised.value)


def test_rays_autoscaler_counts_the_gpus_of_a_node_as_one_number() -> None:
    """What the check above is there for, by Ray's own packing; when this changes, the check may go."""
    left, _ = get_bin_pack_residual([{"GPU": 8}], [{"GPU": 0.8}] * 10)
    assert left == []
