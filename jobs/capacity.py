"""A check that a cluster has room for all pools of a job at once. Without it, they would wait for each other forever.

Totals are not enough: a worker's CPUs, and a share of one GPU, must be free on one node. So workers and actors are
placed on the nodes as Ray would place them, the largest first, each on the first node that holds it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mmray.base.words import counted
from mmray.config.job import Job
from mmray.config.resources import ResourceSettings
from mmray.errors import UserError
from pipelines.nodes import Node, amount, labelled

_TINY = 1e-6
SHOWN_NODES = 4
USUAL_GPUS = (1, 2, 4, 8)
"""GPUs that a node may have while none is up yet."""
SMALLER_SHARES = (0.1, 0.05, 0.02, 0.01, 0.005, 0.001)
"""Shares of a GPU, one of which fits on nodes of up to 998 GPUs."""


@dataclass(frozen=True)
class Pool:
    """A group of identical workers or actors.

    name: its plural, for messages; needs: resources of each worker or actor.
    """

    name: str
    count: int
    needs: Mapping[str, float]


def prepare_cpus(job: Job) -> int:
    """Number of CPUs that preparing uses when all its actors run."""
    return job.resources.encode_actors + job.resources.pack_actors


def prepare_pools() -> list[Pool]:
    """The fewest actors that prepare rows: its pools begin with as many as fit, and grow."""
    return [Pool("encode actors", 1, {"CPU": 1}), Pool("pack actors", 1, {"CPU": 1})]


def uses_gpus(job: Job, nodes: Sequence[Node]) -> bool:
    """True if training uses GPUs: as the job says, otherwise where the cluster has any."""
    has_gpus = amount(nodes, "GPU") > 0
    if job.resources.use_gpu and not has_gpus and not job.resources.autoscaling:
        raise UserError("resources.use_gpu is true but the cluster has no GPU; add GPU nodes or set it to false")
    return has_gpus if job.resources.use_gpu is None else job.resources.use_gpu


def worker_needs(job: Job, gpus: bool) -> dict[str, float]:
    """Resources of one training worker."""
    resources = job.resources
    return {"CPU": resources.cpus_per_worker} | ({"GPU": 1 - resources.gpu_share} if gpus else {})


def train_pools(job: Job, gpus: bool) -> list[Pool]:
    """The pools of a training: all workers, or the fewest of an elastic run, and all actors."""
    resources = job.resources
    return [
        Pool("training workers", resources.min_workers, worker_needs(job, gpus)),
        _mask_pool(job, gpus),
        Pool("render actors", resources.render_actors, {"CPU": 1}),
    ]


def _mask_pool(job: Job, gpus: bool) -> Pool:
    """The actors that compute labels: one on each GPU that trains, or on CPUs."""
    resources = job.resources
    if resources.labels_on_gpus(gpus):
        return Pool("mask actors", resources.min_workers, {"GPU": resources.gpu_share})
    return Pool("mask actors", min(resources.mask_actors, resources.min_workers), {"CPU": 1})


def train_cpus(job: Job) -> int:
    """Number of logical CPUs that training uses without a GPU."""
    return math.ceil(needs(train_pools(job, gpus=False))["CPU"])


def evaluate_pools(job: Job, gpus: bool) -> list[Pool]:
    """The fewest actors with which `jobs/evaluate.py` evaluates."""
    resources = job.resources
    model = {"CPU": resources.cpus_per_worker} | ({"GPU": 1.0} if gpus else {})
    return [
        Pool("models", resources.min_workers, model),
        Pool("encode actors", 1, {"CPU": 1}),
        Pool("render actors", resources.render_actors, {"CPU": 1}),
    ]


def evaluate_cpus(job: Job) -> int:
    """Number of logical CPUs that evaluating uses without a GPU."""
    return math.ceil(needs(evaluate_pools(job, gpus=False))["CPU"])


def needs(pools: Sequence[Pool]) -> dict[str, float]:
    """Total resources of some pools."""
    total: Counter[str] = Counter()
    for pool in pools:
        for name, needed in pool.needs.items():
            total[name] += pool.count * needed  # type: ignore[assignment]
    return dict(total)


def lack(pools: Sequence[Pool], nodes: Sequence[Node], labels: Mapping[str, str]) -> str:
    """The resources that pools need and the nodes with these labels lack, in words; "" where all pools fit."""
    labelled_nodes = labelled(nodes, labels)
    on = f" on nodes labelled {_label_words(labels.items())}" if labels else ""
    short = [
        f"{needed:g} {name} (it has {amount(labelled_nodes, name):g})"
        for name, needed in needs(pools).items()
        if amount(labelled_nodes, name) + _TINY < needed
    ]
    if short:
        return ", ".join(short) + on
    free = [_Free(node) for node in labelled_nodes]
    for pool in sorted(pools, key=lambda pool: (pool.needs.get("GPU", 0), pool.needs.get("CPU", 0)), reverse=True):
        placed = sum(any(node.take(pool.needs) for node in free) for _ in range(pool.count))
        if placed < pool.count:
            of = ", ".join(f"{needed:g} {name}" for name, needed in pool.needs.items())
            nodes_shown = _shown(labelled_nodes)
            return f"nodes that hold {pool.count} {pool.name} of {of} each; its own ({nodes_shown}) hold {placed}{on}"
    return ""


def _label_words(labels: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in labels)


class _Free:
    """The free resources of a node, GPU by GPU: a share must come from one GPU."""

    def __init__(self, node: Node) -> None:
        self.cpus = node.resources.get("CPU", 0.0)
        self.gpus = [1.0] * int(node.resources.get("GPU", 0))

    def take(self, wanted: Mapping[str, float]) -> bool:
        """Takes these resources from the node; returns whether they were free."""
        cpus, share = wanted.get("CPU", 0.0), wanted.get("GPU", 0.0)
        gpu = next((number for number, left in enumerate(self.gpus) if left + _TINY >= share), None)
        if self.cpus + _TINY < cpus or (share and gpu is None):
            return False
        self.cpus -= cpus
        if share and gpu is not None:
            self.gpus[gpu] -= share
        return True


def _shown(nodes: Sequence[Node]) -> str:
    """The resources of nodes in words, such as `2 × 8 CPU, 16 CPU + 1 GPU`."""
    kinds = Counter(
        " + ".join(f"{node.resources[name]:g} {name}" for name in ("CPU", "GPU") if node.resources.get(name))
        or "no CPU"
        for node in nodes
    )
    parts = [kind if count == 1 else f"{count} × {kind}" for kind, count in kinds.most_common(SHOWN_NODES)]
    return ", ".join(parts) + (", …" if len(kinds) > SHOWN_NODES else "")


def check_capacity(
    job: Job, pools: Sequence[Pool], what: str, labels: Mapping[str, str], nodes: Sequence[Node]
) -> str | None:
    """Raises UserError when the cluster cannot run all of these pools at once.

    Args:
        what: the work, for the message.
        labels: labels of the nodes that count; {}: all nodes.

    Returns a text on what the job waits for, where `resources.autoscaling` will add nodes.
    """
    lacks = lack(pools, nodes, labels)
    if not lacks:
        return None
    if job.resources.autoscaling:
        return f"{what} needs {lacks}; waiting for the cluster to grow"
    if not labelled(nodes, labels):
        values = sorted({(key, node.labels[key]) for node in nodes for key in labels if key in node.labels})
        others = f"; others have {_label_words(values)}" if values else ""
        options = ",".join(f"{key}={value}" for key, value in labels.items())
        raise UserError(
            f"{what} needs nodes labelled {_label_words(labels.items())}, and none of {counted(len(nodes), 'node')} "
            f"is{others}. Correct the labels under `resources`, or start nodes with these: ray start --labels {options}"
        )
    raise UserError(
        f"{what} needs {lacks}. Lower the pools under `resources`, add nodes, or set resources.autoscaling where "
        "the cluster grows by itself; on one machine a Ray can have more logical CPUs than cores: "
        "ray start --head --num-cpus=N"
    )


def check_elastic(job: Job, gpus: bool, nodes: Sequence[Node]) -> None:
    """Checks that an elastic run leaves CPUs and GPU shares for its render and label actors; raises UserError
    otherwise.

    Ray Train counts how many workers fit on each node and starts as many, without regard to the other needs of the run.
    """
    problem = shared_gpu_problem(job, nodes) if gpus else None
    problem = problem or too_few_cpus_problem(job, nodes, gpus)
    if problem:
        raise UserError(problem)


def check_growth(job: Job, nodes: Sequence[Node]) -> None:
    """Raises UserError where the autoscaler would start too few nodes with GPUs for a training.

    It counts the GPUs of a node as one number, and Ray gives each worker a share of one GPU: for ten workers of 0.8 the
    autoscaler starts one node of 8 GPUs, where Ray places eight, and two would wait forever.
    """
    resources = job.resources
    gpus_per_node = {int(node.resources.get("GPU", 0)) for node in labelled(nodes, resources.train_labels)} - {0}
    for gpus in sorted(gpus_per_node or USUAL_GPUS):
        if problem := _growth_problem(resources, resources.gpu_share, gpus):
            smaller = next(share for share in SMALLER_SHARES if not _growth_problem(resources, share, gpus))
            raise UserError(f"resources.gpu_share is {resources.gpu_share:g}: {problem}; set it to {smaller:g}")


def _growth_problem(resources: ResourceSettings, share: float, gpus: int) -> str | None:
    """The problem with what the autoscaler starts for the workers, of nodes with so many GPUs; None for none. The
    shares on which labels are computed are those that workers leave."""
    workers, needed = resources.max_workers, 1 - share
    on_each = int((gpus + _TINY) / needed)  # as the autoscaler counts
    count = -(-workers // on_each)
    placed = min(workers, count * gpus)
    if placed == workers:
        return None
    return (
        f"for {counted(workers, 'worker')} the autoscaler would start {counted(count, 'node')} of "
        f"{counted(gpus, 'GPU')}, where Ray can place {placed} of them"
    )


def shared_gpu_problem(job: Job, nodes: Sequence[Node]) -> str | None:
    """The problem with a worker's share of a GPU, with which Ray Train counts one worker too many on a node; None for
    none."""
    share = job.resources.gpu_share
    most = max(int(node.resources.get("GPU", 0)) for node in nodes) or max(USUAL_GPUS)
    if share * (most + 1) < 1:
        return None
    return (
        f"resources.gpu_share is {share:g}: Ray Train would count more workers than the {most} GPUs of a node; with "
        f"resources.workers [min, max] set it below {1 / (most + 1):.3f}"
    )


def too_few_cpus_problem(job: Job, nodes: Sequence[Node], gpus: bool) -> str | None:
    """The problem with CPUs where as many workers as fit leave none for the actors that render images; None for none.

    The workers would wait for these actors forever.
    """
    wanted, resources = worker_needs(job, gpus), job.resources
    fit = sum(int(min(node.resources.get(name, 0) // need for name, need in wanted.items())) for node in nodes)
    workers = min(fit, resources.max_workers)
    actors = resources.render_actors + (0 if resources.labels_on_gpus(gpus) else min(resources.mask_actors, workers))
    left = amount(nodes, "CPU") - workers * wanted["CPU"]
    if left >= actors or workers == 0:
        return None
    return (
        f"resources.workers [{resources.min_workers}, {resources.max_workers}]: beside {counted(workers, 'worker')}, "
        f"{left:g} of the CPUs are left, but rendering and masking take {actors}; lower the maximum, or set "
        "cpus_per_worker so that nodes have CPUs left over beside their workers"
    )
