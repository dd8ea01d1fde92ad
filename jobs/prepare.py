"""Prepare a job's rows: `python jobs/prepare.py JOB.yaml`, or the same words behind `ray job submit`."""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jobs  # noqa: F401  (says what is missing)

# isort: split
import typer

from jobs.capacity import prepare_cpus
from jobs.checks import cluster_checks, job_checks, require
from jobs.common import connect, console, run_main
from jobs.dry_run import plan_prepare
from mmray.config.job import Job, load_job
from mmray.display.progress import ProgressBar
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
        with ProgressBar(f"{job.name}: preparing {split}", "rows") as bar:
            prepared, made = prepare(job, split, replace=replace, on_progress=bar.update)
        if made:
            console.print(prepared_table(prepared))
        else:
            console.print(f"{prepared.path} is up to date (fingerprint {prepared.fingerprint}); nothing to do")
        prepared.check_has_bins()
        done[split] = prepared
    return done


def main(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    overrides: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")] = [],  # noqa: B006
    replace: Annotated[bool, typer.Option(help="Delete what is prepared at the output and start anew.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only show the plan, and what mmray doctor finds in the job.")] = False,
    verbose: Annotated[bool, typer.Option(help="Show what workers and libraries print, too.")] = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else this machine.")] = None,
) -> None:
    """Turn rows into a prepared dataset: exact lengths, packed bins, rejected rows with their reasons."""
    job = load_job(job_file, overrides)
    if dry_run:
        raise typer.Exit(plan_prepare(job, address, replace=replace, verbose=verbose))
    require(job_checks(job, trains=False))
    joined = connect(address, cpus=prepare_cpus(job), verbose=verbose)
    prepare_splits(job, replace=replace, joined=joined)


if __name__ == "__main__":
    run_main(main)
