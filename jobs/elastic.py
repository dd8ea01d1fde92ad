"""What a run whose number of workers follows the cluster must leave room for.

Ray Train counts how many workers fit on each node and starts as many, without regard to what else the run needs.
"""

import ray

from jobs.room import worker_needs
from mmray.config.job import Job
from mmray.errors import UserError


def check_elastic(job: Job, gpus: bool) -> None:
    """Raise UserError where the workers that Ray Train would start on the cluster leave too little for the others."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    problem = shared_gpu_problem(job, nodes) if gpus else None
    problem = problem or too_few_cpus_problem(job, nodes, gpus)
    if problem:
        raise UserError(problem)


def shared_gpu_problem(job: Job, nodes: list[dict[str, float]]) -> str | None:
    """Ray Train divides a node's GPUs by a worker's part of one: with large shares it counts one worker too many."""
    share, most = job.resources.gpu_share, max(int(node.get("GPU", 0)) for node in nodes)
    if share * (most + 1) < 1:
        return None
    return (
        f"resources.gpu_share is {share:g}: Ray Train would count more workers than the {most} GPUs of a node; with "
        f"resources.workers [min, max] set it below {1 / (most + 1):.3f}"
    )


def too_few_cpus_problem(job: Job, nodes: list[dict[str, float]], gpus: bool) -> str | None:
    """As many workers as fit would leave no CPUs for the actors that render images, and wait for them forever."""
    needs, resources = worker_needs(job, gpus), job.resources
    fit = sum(int(min(node.get(name, 0) // amount for name, amount in needs.items())) for node in nodes)
    workers = min(fit, resources.max_workers)
    actors = resources.render_actors + (0 if gpus else resources.mask_actors)
    left = sum(node.get("CPU", 0) for node in nodes) - workers * needs["CPU"]
    if left >= actors or workers == 0:
        return None
    return (
        f"resources.workers [{resources.min_workers}, {resources.max_workers}]: {workers} workers fit and leave "
        f"{left:g} CPUs, but rendering and masking take {actors}; lower the maximum, or set cpus_per_worker so that "
        "nodes have CPUs left over beside their workers"
    )
