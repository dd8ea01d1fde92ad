"""Evaluate a model on rows: `python jobs/evaluate.py JOB.yaml`, or the same words behind `ray job submit`.

The model reads the pages, and what it writes is compared with their texts; the results are in `evaluations` of the
run's folder. What it does is in `jobs/evaluating.py`, which imports torch and, on a cluster, Ray.
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
    model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="A folder of a model, or `base`: the job's own model before training."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="STEP|best|last", help="A checkpoint of the job's run. Default: the last."),
    ] = None,
    data: Annotated[str, typer.Option(metavar="train|eval|FILE", help="The rows: of the job, or a file.")] = "eval",
    image_root: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="What images of --data FILE are relative to. Default: the file's folder."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="ROWS", help="Rows in all: each set's share, at least one; of its files the first rows."
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Evaluate anew what is evaluated already.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what actors and libraries print, too.")] = False,
    address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Ray cluster; default: RAY_ADDRESS, else this machine.")
    ] = None,
) -> None:
    """Let a model read rows, and compare what it writes with their texts; continues after any interruption."""
    job = load_job(job_file, overrides)
    from jobs import evaluating

    evaluating.run(
        job, model=model, checkpoint=checkpoint, data=data, image_root=image_root, limit=limit,
        replace=replace, verbose=verbose, address=address,
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main)
