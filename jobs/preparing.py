"""Preparing the splits of a job on the cluster that this process is connected to, and what `jobs/prepare.py` does
around it."""

from collections.abc import Callable
from contextlib import ExitStack

import typer

from jobs.capacity import prepare_cpus
from jobs.checks import cluster_checks, job_checks, require
from jobs.common import connect, console
from jobs.dry_run import plan_prepare
from mmray.config.job import Job
from mmray.display.progress import ProgressBar
from mmray.prepared import PreparedDataset
from mmray.report import prepared_table
from pipelines.nodes import alive_nodes

MANY_FILES = 1_000
"""Number of files from which on finding their rows is shown."""


def prepare_splits(job: Job, *, replace: bool = False, joined: bool = False) -> dict[str, PreparedDataset]:
    """Prepare `train` and, where the job has one, `eval`, with a progress bar and a table each.

    joined: whether Ray is a cluster that others started, whose nodes are then asked first.
    """
    from pipelines.prepare import prepare

    require(cluster_checks(job, alive_nodes(), trains=False, joined=joined))
    done = {}
    for split in job.data.splits:
        with ExitStack() as files, ExitStack() as rows:
            prepared, made = prepare(
                job, split, replace=replace,
                on_files=_shown(files, f"{job.name}: finding the rows of {split}", "files", least=MANY_FILES),
                on_progress=_shown(rows, f"{job.name}: preparing {split}", "rows"),
            )  # fmt: skip
        if made:
            console.print(prepared_table(prepared))
        else:
            console.print(f"{prepared.path} is up to date (fingerprint {prepared.fingerprint}); nothing to do")
        prepared.check_has_bins()
        done[split] = prepared
    return done


def _shown(stack: ExitStack, title: str, unit: str, least: int = 0) -> Callable[[int, int], None]:
    """A progress bar that appears when there is something to show, and is closed by the stack, or when all is done.

    least: smallest total that is shown.
    """
    bars: list[ProgressBar] = []

    def show(done: int, total: int) -> None:
        if total < least:
            return
        if not bars:
            bars.append(stack.enter_context(ProgressBar(title, unit)))
        bars[0].update(done, total)
        if done >= total:
            stack.close()

    return show


def run(job: Job, *, replace: bool, dry_run: bool, verbose: bool, address: str | None) -> None:
    """Do what the command line of `jobs/prepare.py` asks for; its arguments."""
    if dry_run:
        raise typer.Exit(plan_prepare(job, address, replace=replace, verbose=verbose))
    require(job_checks(job, trains=False))
    joined = connect(address, cpus=prepare_cpus(job), verbose=verbose)
    prepare_splits(job, replace=replace, joined=joined)
