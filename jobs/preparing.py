"""Preparing the splits of a job on the cluster that this process is connected to, and what `jobs/prepare.py` does
around it."""

from contextlib import ExitStack

import typer

from jobs.capacity import prepare_cpus
from jobs.checks import cluster_checks, job_checks, require
from jobs.common import connect, console
from jobs.dry_run import plan_prepare
from mmray.config.job import Job
from mmray.display.progress import MANY_FILES, shown
from mmray.prepared import PreparedDataset
from mmray.report import prepared_table
from pipelines.nodes import alive_nodes


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
                on_files=shown(files, f"{job.name}: finding the rows of {split}", "files", least=MANY_FILES),
                on_progress=shown(rows, f"{job.name}: preparing {split}", "rows"),
            )  # fmt: skip
        if made:
            console.print(prepared_table(prepared))
        else:
            console.print(f"{prepared.path} is up to date (fingerprint {prepared.fingerprint}); nothing to do")
        prepared.check_has_bins()
        done[split] = prepared
    return done


def run(job: Job, *, replace: bool, dry_run: bool, verbose: bool, address: str | None) -> None:
    """Do what the command line of `jobs/prepare.py` asks for; its arguments."""
    if dry_run:
        raise typer.Exit(plan_prepare(job, address, replace=replace, verbose=verbose))
    require(job_checks(job, trains=False))
    joined = connect(address, cpus=prepare_cpus(job), verbose=verbose)
    prepare_splits(job, replace=replace, joined=joined)
