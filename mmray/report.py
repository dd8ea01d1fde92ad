"""What was prepared and trained, as tables for a terminal."""

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from mmray.errors import UserError
from mmray.prepared import PreparedDataset
from mmray.training.metrics import METRICS_FILE, read_metrics


def prepared_table(prepared: PreparedDataset) -> Table:
    """A prepared dataset in one table: rows, bins, fill, tokens, rejected rows by reason."""
    facts = prepared.statistics
    table = Table(title=escape(prepared.path), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row(
        "rows", f"{facts['rows_read']:,} read = {facts['rows_packed']:,} packed + {facts['rows_rejected']:,} rejected"
    )
    for reason, count in facts["rejected_by_reason"].items():
        table.add_row(f"  {reason}", f"{count:,}")
    table.add_row("bins", f"{facts['bins']:,} (at least {facts['bins_at_least']:,} needed)")
    table.add_row("fill", f"{facts['token_fill']:.1%} of tokens, {facts['visual_fill']:.1%} of visual tokens")
    table.add_row("tokens", f"{facts['tokens']:,}")
    table.add_row("visual tokens", f"{facts['visual_tokens']:,}")
    table.add_row("trained tokens", f"{facts['trained_tokens']:,}")
    table.add_row("images", f"{facts['images']:,}")
    table.add_row("seconds", f"{prepared.manifest['seconds']}")
    table.add_row("fingerprint", prepared.fingerprint)
    return table


def run_table(run: Path) -> Table:
    """A training run in one table: steps, loss at its ends, tokens, speed, waiting, evaluation.

    Raises UserError before the first step.
    """
    lines = read_metrics(run / METRICS_FILE)
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise UserError(f"{run}: no step is finished yet")
    evaluations = [line for line in lines if "eval_loss" in line]
    seconds = sum(line["step_seconds"] for line in steps) or 1e-9
    waited = sum(line["data_wait_seconds"] for line in steps)
    table = Table(title=escape(str(run)), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("steps", f"{len(steps):,}")
    table.add_row("loss", _from_to(steps, "loss"))
    if evaluations:
        table.add_row("eval loss", _from_to(evaluations, "eval_loss"))
    table.add_row("tokens", f"{sum(line['tokens'] for line in steps):,}")
    table.add_row("tokens per second", f"{sum(line['tokens'] for line in steps) / seconds:,.0f}")
    table.add_row("waiting for data", f"{waited:.1f} s beside {seconds:.1f} s of steps")
    return table


def _from_to(lines: list[dict[str, Any]], key: str) -> str:
    """A value at both ends of the run; one that was not finite stands in the log as null."""
    first, last = ("not finite" if line[key] is None else f"{line[key]:.4f}" for line in (lines[0], lines[-1]))
    return f"{first} -> {last}"
