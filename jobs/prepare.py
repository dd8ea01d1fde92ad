"""Prepare a job's rows: `python jobs/prepare.py JOB.yaml`, or the same words behind `ray job submit`.

What it does is in `jobs/preparing.py`, which imports Ray and torch: a mistake in the job file is told before that.
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jobs  # noqa: F401  (says what is missing)

# isort: split
import typer

from jobs.command_line import run_main
from mmray.config.job import load_job


def main(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    overrides: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")] = [],  # noqa: B006
    replace: Annotated[
        bool, typer.Option("--replace", help="Delete what is prepared at the output and start anew.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the plan, and what mmray doctor finds in the job.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what workers and libraries print, too.")] = False,
    address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Ray cluster; default: RAY_ADDRESS, else this machine.")
    ] = None,
) -> None:
    """Turn rows into a prepared dataset: exact lengths, packed bins, rejected rows with their reasons."""
    job = load_job(job_file, overrides)
    from jobs import preparing

    preparing.run(job, replace=replace, dry_run=dry_run, verbose=verbose, address=address)


if __name__ == "__main__":
    run_main(main)
