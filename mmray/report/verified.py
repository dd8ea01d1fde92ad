"""Verifies the pictures of prepared datasets, with a progress bar and a table each."""

from collections.abc import Sequence

from rich.console import Console

from mmray.display.progress import ProgressBar
from mmray.prepared.verify import RunParts, verify
from mmray.report.tables import verified_table


def verify_datasets(paths: Sequence[str], run_parts: RunParts) -> int:
    """Verifies some prepared datasets and prints what is to be said of each; returns the number of broken pictures.

    run_parts: decodes the pictures, here or on a cluster. Raises what `verify` raises.
    """
    broken = 0
    for path in paths:
        with ProgressBar(f"pictures of {path}", "bins") as bar:
            verified = verify(path, run_parts=run_parts, on_progress=bar.update)
        Console().print(verified_table(path, verified))
        broken += verified.broken
    return broken
