"""Decode every picture of a prepared dataset on a Ray cluster: `python jobs/verify.py PREPARED|JOB.yaml`.

`mmray verify` does the same with processes of one machine, and runs this where it is given a cluster.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jobs  # noqa: F401  (says what is missing)

# isort: split
import typer

from jobs.command_line import run_main
from mmray.config.job import prepared_paths


def main(
    path: Annotated[str, typer.Argument(metavar="PREPARED|JOB.yaml", help="A prepared dataset, or a job's.")],
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what workers and libraries print, too.")] = False,
    address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Ray cluster; default: RAY_ADDRESS, else this machine.")
    ] = None,
) -> None:
    """List the pictures that are broken, blank or not as prepared. Exit code 1 when one is broken.

    All CPUs of the cluster but one decode; the driver writes what they return beside the dataset. After a stop, the
    same command continues.
    """
    paths = prepared_paths(path)
    from jobs.common import connect, console
    from jobs.probe import check_nodes
    from mmray.report.verified import verify_datasets
    from pipelines.dataset import cluster_amount
    from pipelines.nodes import alive_nodes
    from pipelines.verify import run_parts

    if connect(address, cpus=os.cpu_count() or 1, verbose=verbose):
        local = [os.path.abspath(path) for path in paths if "://" not in path]
        inputs = {f"prepared dataset {number}": path for number, path in enumerate(local, 1)}
        check_nodes(alive_nodes(), {}, {}, inputs=inputs)
    console.print(f"decoding on a Ray cluster of {cluster_amount('CPU', {}):,.0f} CPUs", highlight=False)
    raise typer.Exit(1 if verify_datasets(paths, run_parts) else 0)


if __name__ == "__main__":
    run_main(main)
