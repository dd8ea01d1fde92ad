"""A number of workers that follows the cluster leaves room for what feeds them."""

import pytest

from jobs.capacity import shared_gpu_problem, too_few_cpus_problem, train_pools
from mmray.config.job import Job, load_job
from mmray.errors import UserError
from pipelines.nodes import Node
from tests.mmray.config.test_docs_jobs import LEAST


def job(tmp_path, *overrides: str) -> Job:
    (tmp_path / "job.yaml").write_text(LEAST)
    return load_job(tmp_path / "job.yaml", [f"resources.{each}" for each in overrides])


def test_checks_count_the_fewest_workers(tmp_path) -> None:
    elastic = job(tmp_path, "workers=[2, 8]", "cpus_per_worker=3")
    assert (elastic.resources.min_workers, elastic.resources.max_workers) == (2, 8)
    assert elastic.resources.is_elastic
    assert train_pools(elastic, gpus=False) == train_pools(job(tmp_path, "workers=2", "cpus_per_worker=3"), gpus=False)
    fixed = job(tmp_path, "workers=5").resources
    assert (fixed.min_workers, fixed.max_workers, fixed.is_elastic) == (5, 5, False)


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ("[8, 2]", r"resources\.workers: write \[min, max\], the smaller number first, not \[8, 2\]"),
        ("[0, 2]", r"resources\.workers\.0: .* greater than 0"),
        ("0", r"resources\.workers: .* greater than 0"),
    ],
)
def test_numbers_of_workers_that_mean_nothing_are_refused(tmp_path, workers: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        job(tmp_path, f"workers={workers}")


@pytest.mark.parametrize(
    ("nodes", "problem"),
    [
        ([{"CPU": 5}, {"CPU": 3}], None),  # 2 workers, 2 CPUs left
        ([{"CPU": 6}, {"CPU": 3}], "beside 3 workers, 0 of the CPUs are left, but rendering and masking take 2"),
        ([{"CPU": 64}], None),  # the maximum leaves enough
        ([{"CPU": 2}], None),  # no worker fits: another check's matter
        ([{}, {"CPU": 4}, {"GPU": 1}], "beside 1 worker, 1 of the CPUs are left"),
    ],
)
def test_workers_must_leave_cpus_for_the_actors_that_feed_them(tmp_path, nodes, problem: str | None) -> None:
    cluster = [Node("here", resources) for resources in nodes]
    found = too_few_cpus_problem(job(tmp_path, "workers=[1, 8]", "cpus_per_worker=3"), cluster, gpus=False)
    assert (found is None) if problem is None else (problem in found)


@pytest.mark.parametrize(
    ("share", "gpus", "refused"), [(0.1, 8, False), (0.2, 8, True), (0.1, 10, True), (0.3, 1, False)]
)
def test_a_node_never_counts_for_more_workers_than_it_has_gpus(
    tmp_path, share: float, gpus: int, refused: bool
) -> None:
    nodes = [Node("one", {"CPU": 64, "GPU": float(gpus)}), Node("two", {"CPU": 8})]
    elastic = job(tmp_path, "workers=[1, 16]", f"gpu_share={share}")
    assert (gpus // (1 - share) > gpus) == refused, "what Ray Train would count"
    found = shared_gpu_problem(elastic, nodes)
    assert (found is not None) == refused
    if found:
        assert f"than the {gpus} GPUs of a node; with resources.workers [min, max] set it below" in found
        assert too_few_cpus_problem(elastic, nodes, gpus=True) is None
