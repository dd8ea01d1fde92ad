"""Train on a prepared dataset: `python jobs/train.py JOB.yaml`, or the same words behind `ray job submit`.

The same command continues a run that was stopped, from its last checkpoint, with any number of workers. What it does is
in `jobs/training.py`, which imports Ray and torch: a mistake in the job file is told before that.
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
    other_data: Annotated[
        str | None,
        typer.Option(
            "--continue-on",
            metavar="PREPARED",
            help="Train on with other data: another job's output.prepared, whose first epoch begins; or `mixture`, for "
            "the mixture and stages that the job file has now, whose datasets go on where the run left them. The run's "
            "weights and steps are kept.",
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option("--trace", metavar="STEP", help="Only list the samples of a step, or of several: 100:105."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --trace: a line of JSON for each sample.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the plan, and what mmray doctor finds in the job.")
    ] = False,
    step_seconds: Annotated[
        str | None,
        typer.Option(metavar="SECONDS|RUN", help="With --dry-run: the time of a step, or a run to read it from."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what workers and libraries print, too.")] = False,
    address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Ray cluster; default: RAY_ADDRESS, else this machine.")
    ] = None,
) -> None:
    """Train on the job's prepared dataset; continues from the last checkpoint where there is one."""
    job = load_job(job_file, overrides)
    from jobs import training

    training.run(
        job, other_data=other_data, steps=steps, as_json=as_json, dry_run=dry_run, step_seconds=step_seconds,
        verbose=verbose, address=address,
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main)
