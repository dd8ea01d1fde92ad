"""Evaluating a job's model, here or on the cluster, and what `jobs/evaluate.py` does around it."""

import logging
import os
from collections.abc import Sequence
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
from mmray.run.evaluation.rows import EvaluationData
from mmray.run.evaluation.standalone import EvaluationPlan, RunBatches, evaluate, run_here
from mmray.run.scoring.page import NAMES
from mmray.run.scoring.results import summary
from mmray.run.scoring.settings import EvaluationSettings

log = logging.getLogger("mmray")

ROWS_HERE = 100
"""Most rows that are evaluated in this process where no cluster is named: Ray's actors take longer to start."""


def run(
    job: Job, *, model: str | None, checkpoint: str | None, data: str, image_root: str | None, limit: int | None,
    replace: bool, verbose: bool, address: str | None,
) -> None:  # fmt: skip
    """Do what the command line of `jobs/evaluate.py` asks for; its arguments."""
    rows = EvaluationData.of(job, data, image_root)
    evaluated = EvaluatedModel.find(job, folder=model, checkpoint=checkpoint)
    plan = EvaluationPlan(job, evaluated, rows, job.evaluation or EvaluationSettings(), limit)
    count = sum(chunk.num_rows for chunk in rows.chunks(limit))
    if rows.left_out:
        chosen = _listed(job, [row_set.number for row_set in rows.sets])
        _say(f"of data.eval, evaluation.sets chooses {chosen} and leaves out {_listed(job, rows.left_out)}")
    if plan.settings.prompt is not None and all(dataset.kind != "pretrain" for dataset in rows.datasets):
        _say("evaluation.prompt is for pretrain rows, of which there are none here")
    earlier = plan.earlier()
    if earlier is not None and not plan.is_of(earlier):
        _say(f"{plan.folder} holds an evaluation of other rows, settings or weights; this one takes its place")
    here = count <= ROWS_HERE and not (address or os.environ.get("RAY_ADDRESS"))
    run_batches: RunBatches = run_here if here else _on_cluster(plan, address, verbose)
    with ProgressBar(f"{job.name}: reading with {evaluated.name}", "rows") as bar:
        values, is_new = evaluate(plan, run_batches=run_batches, replace=replace, on_progress=bar.update)
    if not is_new:
        mended = ", when its bad rows are mended too" if values["bad_rows"]["count"] else ""
        _say(f"{plan.folder}: evaluated already; --replace does it anew{mended}")
    console.print(results_table(plan.folder, values))
    if not here:
        import ray

        ray.shutdown()
    if values["bad_rows"]["count"] and not values["all"]["rows"]:
        raise UserError(
            f"none of the rows can be used: {values['bad_rows']['rows'][0]['message']}; mend them or the job, and give "
            "--replace"
        )


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _listed(job: Job, numbers: Sequence[int]) -> str:
    """Sets of data.eval by their numbers and files: `set 0 (pages.jsonl)`."""
    return ", ".join(f"set {number} ({', '.join(job.data.eval[number].files):.200})" for number in numbers)


def _on_cluster(plan: EvaluationPlan, address: str | None, verbose: bool) -> RunBatches:
    """The way of running a plan's batches on the cluster at an address, or on a Ray that is started here.

    Raises UserError where it has no room, or a node cannot do its part.
    """
    from jobs.capacity import evaluate_cpus
    from jobs.checks import row_inputs
    from jobs.probe import check_nodes, check_own_machine, packages_of
    from pipelines.evaluate import run_batches
    from pipelines.nodes import alive_nodes

    job = plan.job
    joined = connect(address, cpus=evaluate_cpus(job), verbose=verbose)
    nodes, labels = alive_nodes(), job.resources.train_labels
    gpus = uses_gpus(job, nodes)
    if note := check_capacity(job, evaluate_pools(job, gpus), "evaluating", labels, nodes):
        log.warning("%s", note)
    if joined:
        modules = packages_of(job, "evaluating")
        inputs = row_inputs({f"set {row_set.name}": row_set.dataset for row_set in plan.data.sets})
        check_nodes(nodes, labels, {"output.run": job.output.run}, inputs=inputs, modules=modules, gpus=gpus)
    else:
        check_own_machine(nodes, gpus)
    return partial(run_batches, gpus=gpus)


def results_table(folder: str, values: dict[str, Any]) -> Table:
    """Tabulates the metrics of an evaluation: of all rows, and by set where there are several."""
    table = Table(title=escape(folder), title_justify="left", caption_justify="left")
    table.add_column("")
    for name in ("rows", "loss", *NAMES.values()):
        table.add_column(name, justify="right")
    sets = [row_set["name"] for row_set in values["sets"]]
    groups = {"all": values["all"]}
    if len(sets) > 1:  # those without a good row, too
        groups |= {name: values["by_set"].get(name) or summary([]) for name in sets}
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
