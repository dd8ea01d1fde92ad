"""Prepare a job's rows: `python jobs/prepare.py JOB.yaml`, or the same words behind `ray job submit`."""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jobs  # noqa: F401  (says what is missing)

# isort: split
import typer

from jobs.common import check_outputs, connect, console, run_main
from jobs.probe import check_nodes, check_own_memory, packages_of
from jobs.room import check_room, cluster_nodes, prepare_cpus, prepare_pools
from mmray.config.job import Job, load_job
from mmray.display.progress import ProgressBar
from mmray.prepared import PreparedDataset
from mmray.report import prepared_table


def prepare_splits(job: Job, *, replace: bool = False) -> dict[str, PreparedDataset]:
    """Prepare `train` and, where the job has one, `eval`, with a progress bar and a table each."""
    from pipelines.prepare import prepare

    check_room(job, prepare_pools(), "preparing", job.resources.prepare_labels, cluster_nodes())
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


def check_prepare_nodes(job: Job) -> None:
    """Raise UserError where a node of the cluster cannot prepare."""
    outputs = {"output.prepared": job.output.prepared}
    check_nodes(cluster_nodes(), job.resources.prepare_labels, outputs, modules=packages_of(job, trains=False))


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
        from jobs.dry_run import plan_prepare

        raise typer.Exit(plan_prepare(job, address, replace=replace, verbose=verbose))
    check_outputs(job)
    if connect(address, cpus=prepare_cpus(job), verbose=verbose):
        check_prepare_nodes(job)
    else:
        check_own_memory(cluster_nodes())
    prepare_splits(job, replace=replace)


if __name__ == "__main__":
    run_main(main)
