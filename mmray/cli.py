"""The `mmray` command: what needs no cluster."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mmray.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the job file: for editors that complete and check YAML."""
    from mmray.config import Job

    print(json.dumps(Job.model_json_schema(), indent=2))


@app.command()
def report(path: Annotated[str, typer.Argument(help="A prepared dataset or a run folder.")]) -> None:
    """Print what was prepared, or how a run went."""
    from mmray.prepared import PreparedDataset
    from mmray.report import prepared_table, run_table
    from mmray.training.metrics import METRICS_FILE

    is_run = (Path(path) / METRICS_FILE).exists()
    Console().print(run_table(Path(path)) if is_run else prepared_table(PreparedDataset(path)))


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A prepared dataset.")],
    bin_number: Annotated[int, typer.Option("--bin", help="Which bin, from 0.")] = 0,
    processor: Annotated[str | None, typer.Option(help="Processor folder, to show text instead of counts.")] = None,
) -> None:
    """Show the samples of one bin: where they come from, their tokens and images, and what is trained."""
    from mmray.inspect import print_bin
    from mmray.prepared import PreparedDataset

    print_bin(Console(), PreparedDataset(path), bin_number, processor)


def main() -> Any:
    """Entry point: mistakes of the user are one line and exit code 2."""
    try:
        return app()
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
