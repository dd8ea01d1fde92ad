"""Evaluating a job's model, here or on the cluster, and what `jobs/evaluate.py` does around it."""

import logging
import os
from functools import partial
from typing import Any

from rich.markup import escape
from rich.table import Table

from jobs.capacity import check_capacity, evaluate_pools, uses_gpus
from jobs.common import connect, console
from mmray.base.words import counted
from mmray.config.job import Job
from mmray.display.progress import ProgressBar
from mmray.errors import UserError
from mmray.run.evaluation.model import EvaluatedModel
from mmray.run.evaluation.rows import EvaluationData, rows_left
from mmray.run.evaluation.standalone import EvaluationPlan, RunBatches, evaluate, run_here
from mmray.run.scoring.page import NAMES
from mmray.run.scoring.settings import EvaluationSettings

log = logging.getLogger("mmray")

ROWS_HERE = 100
"""Most rows that are evaluated in this process where no cluster is named: Ray's actors take longer to start."""


def run(
    job: Job, *, model: str | None, checkpoint: str | None, data: str, limit: int | None, replace: bool, verbose: bool,
    address: str | None,
) -> None:  # fmt: skip
    """Do what the command line of `jobs/evaluate.py` asks for; its arguments."""
    rows = EvaluationData.of(job, data)
    evaluated = EvaluatedModel.find(job, folder=model, checkpoint=checkpoint)
    plan = EvaluationPlan(job, evaluated, rows, job.evaluation or EvaluationSettings(), limit)
    count = rows_left(rows.chunks(limit), limit)
    here = count <= ROWS_HERE and not (address or os.environ.get("RAY_ADDRESS"))
    run_batches: RunBatches = run_here if here else _on_cluster(job, address, verbose)
    with ProgressBar(f"{job.name}: reading with {evaluated.name}", "rows") as bar:
        values, is_new = evaluate(plan, run_batches=run_batches, replace=replace, on_progress=bar.update)
    if not is_new:
        console.print(f"{plan.folder}: evaluated already; --replace does it anew", markup=False, soft_wrap=True)
    console.print(results_table(plan.folder, values))
    if not here:
        import ray

        ray.shutdown()
    if values["bad_rows"]["count"] and not values["all"]["rows"]:
        raise UserError(
            f"none of the rows can be used: {values['bad_rows']['rows'][0]['message']}; mend them or the job, and give "
            "--replace"
        )


def _on_cluster(job: Job, address: str | None, verbose: bool) -> RunBatches:
    """The way of running batches on the cluster at an address, or on a Ray that is started here.

    Raises UserError where it has no room, or a node cannot do its part.
    """
    from jobs.capacity import evaluate_cpus
    from jobs.probe import check_nodes, check_own_machine, packages_of
    from pipelines.evaluate import run_batches
    from pipelines.nodes import alive_nodes

    joined = connect(address, cpus=evaluate_cpus(job), verbose=verbose)
    nodes, labels = alive_nodes(), job.resources.train_labels
    gpus = uses_gpus(job, nodes)
    if note := check_capacity(job, evaluate_pools(job, gpus), "evaluating", labels, nodes):
        log.warning("%s", note)
    if joined:
        modules = packages_of(job, "evaluating")
        check_nodes(nodes, labels, {"output.run": job.output.run}, modules=modules, gpus=gpus)
    else:
        check_own_machine(nodes, gpus)
    return partial(run_batches, gpus=gpus)


def results_table(folder: str, values: dict[str, Any]) -> Table:
    """Tabulates the metrics of an evaluation: of all rows, and by set where there are several."""
    table = Table(title=escape(folder), title_justify="left", caption_justify="left")
    table.add_column("")
    for name in ("rows", "loss", *NAMES.values()):
        table.add_column(name, justify="right")
    groups = {"all": values["all"]} | (values["by_set"] if len(values["by_set"]) > 1 else {})
    for name, facts in groups.items():
        numbers = ("–" if facts[key] is None else f"{facts[key]:.4f}" for key in ("loss", *NAMES))
        table.add_row(escape(name), f"{facts['rows']:,}", *numbers)
    bad = values["bad_rows"]
    notes = [f"the page: {folder}/report.html"]
    if bad["count"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in bad["by_reason"].items())
        notes.insert(0, f"{counted(bad['count'], 'bad row')} ({reasons}), such as {bad['rows'][0]['id']}: "
                     f"{bad['rows'][0]['message']}")  # fmt: skip
    table.caption = escape("\n".join(notes))
    return table
