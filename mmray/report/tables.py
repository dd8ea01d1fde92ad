"""Renders reports as tables for a terminal."""

from collections.abc import Callable, Sequence

import numpy as np
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mmray.base.words import amount
from mmray.errors import UserError
from mmray.prepared import PreparedDataset
from mmray.prepared.policies import PolicyEstimate
from mmray.prepared.verify import VerifyResult
from mmray.report.prepared import rejects, set_lines
from mmray.report.rows import PERCENTILES, RowFacts
from mmray.report.run import Run
from mmray.run.metrics import SHARE_STEPS
from mmray.run.scoring.page import NAMES


def prepared_table(prepared: PreparedDataset) -> Table:
    """Tabulate a prepared dataset: rows, bins, fill, tokens, rejected rows by reason."""
    facts = prepared.statistics
    table = Table(title=escape(prepared.path), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    left_out, repeated = facts.get("rows_left_out", 0), facts.get("rows_repeated", 0)
    table.add_row(
        "rows",
        f"{facts['rows_read']:,} read = {facts['rows_packed']:,} packed + {facts['rows_rejected']:,} rejected"
        + (f" + {left_out:,} left out" if left_out else ""),
    )
    if repeated:
        table.add_row("  repeated", f"{repeated:,}")
    rejected = rejects(prepared)
    for reason, count in facts["rejected_by_reason"].items():
        table.add_row(f"  {reason}", f"{count:,}")
        for row in rejected.examples[reason][:1]:
            table.add_row("", Text(f"{row['source']}: {row['message']}", "dim", justify="left", overflow="fold"))
    table.add_row("bins", f"{facts['bins']:,} (at least {facts['bins_at_least']:,} needed)")
    table.add_row("fill", f"{facts['token_fill']:.1%} of tokens, {facts['visual_fill']:.1%} of visual tokens")
    table.add_row("tokens", f"{facts['tokens']:,}")
    table.add_row("visual tokens", f"{facts['visual_tokens']:,}")
    table.add_row("trained tokens", f"{facts['trained_tokens']:,}")
    table.add_row("images", f"{facts['images']:,}")
    for of_set in set_lines(prepared):
        table.add_row(f"  set {of_set.number} ({of_set.kind})", of_set.in_words)
    for note, count in facts.get("image_notes", {}).items():
        table.add_row(f"  {note}", f"{count:,}")
    if facts.get("duplicate_ids"):
        table.add_row("duplicate ids", f"{facts['duplicate_ids']:,}")
    table.add_row("seconds", f"{prepared.manifest['seconds']}")
    table.add_row("fingerprint", prepared.fingerprint)
    return table


def rows_table(facts: RowFacts, title: str) -> Group:
    """Tabulate what rows are like: percentiles of their measures by set; below, capacities, odd pages, a suggestion."""
    table = Table("", title=escape(title), title_justify="left")
    for name in (*(f"p{number}" for number in PERCENTILES), "most"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for entry in facts.percentiles:
        if entry.row_set != last:
            last = entry.row_set
            table.add_section()
            table.add_row(Text(f"{last}", "bold"))
        table.add_row(entry.measure, *map(amount, entry.values))
    return Group(table, *(Text(note, overflow="fold") for note in facts.notes))


def policies_table(name: str, estimates: Sequence[PolicyEstimate]) -> Table:
    """Tabulate policies of a job: tokens, bins and how full they are, rows that would be rejected, steps."""
    first = estimates[0].estimate
    table = Table(title=escape(f"{name}: training set"), title_justify="left", caption_justify="left", show_lines=True)
    table.add_column("policy", overflow="fold")
    for column in ("tokens", "visual", "bins", "fill", "visual fill", "rows lost", "steps an epoch"):
        table.add_column(column, justify="right")
    for policy_estimate in estimates:
        guess = policy_estimate.estimate
        lost = f"{guess.lost:,.0f}"
        if guess.lost:
            lost += f" ({guess.lost / guess.rows.rows:.1%})"
        table.add_row(
            Text(policy_estimate.policy.name), amount(guess.tokens), amount(guess.visual_tokens), f"{guess.bins:,}",
            *(f"{fill:.0%}" for fill in policy_estimate.fills), lost, f"{policy_estimate.steps:,}",
        )  # fmt: skip
    table.caption = f"{first.rows} rows; estimated from {first.sampled:,} of them"
    return table


MEASURED: tuple[tuple[str, str, Callable[[np.ndarray], str]], ...] = (
    ("token_accuracy", "token accuracy", lambda shares: _from_to(shares)),
    ("peak_memory", "peak memory of a worker", lambda held: f"{np.nanmax(held) / 1e9:,.2f} GB"),
    ("model_flops_per_second", "model FLOPs per second", lambda speeds: f"{np.nanmedian(speeds) / 1e12:,.3g} T"),
    ("mfu", "of what the GPUs can do", lambda shares: f"{np.nanmedian(shares):.1%}"),
)
"""The measures of a step that a run may have: key, words and value in words."""


def run_table(run: Run) -> Table:
    """Tabulate a training run: steps, first and last loss, tokens, speed, waiting for data, evaluation.

    Raises UserError before the first step.
    """
    if not run.steps:
        raise UserError(f"{run.folder}: no step is finished yet")
    tokens, seconds = (float(run.column(name).sum()) for name in ("tokens", "step_seconds"))
    table = Table(title=escape(str(run.folder)), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("state", Text(run.state, overflow="fold"))
    table.add_row("steps", run.steps_done)
    if run.checkpoints:
        newest = run.checkpoints[-1]
        table.add_row("last checkpoint", f"step {newest.step:,}: {escape(newest.name)}")
    table.add_row("loss", _from_to(run.column("loss")))
    if run.evaluations:
        _add_evaluations(table, run, "eval_loss", "eval loss")
        _add_evaluations(table, run, "eval_token_accuracy", "eval token accuracy")
        for metric, words in NAMES.items():
            values = run.eval_column(f"eval_{metric}")
            if len(known := values[np.isfinite(values)]):
                table.add_row(f"eval {words}", _from_to(known))
    for name, losses in run.columns_by_name("loss_by_set").items():
        known, shown = losses[np.isfinite(losses)], f"set {name}" if name.isdecimal() else name
        table.add_row(f"  loss of {escape(shown)}", _from_to(known) if len(known) else "no trained token")
    for name, shares in run.shares.items():
        asked = run.asked_shares[name][-1]
        of = "" if np.isnan(asked) else f", {asked:.1%} asked for"
        table.add_row(f"  share of {escape(name)}", f"{shares[-1]:.1%} of the last {SHARE_STEPS} steps' bins{of}")
    table.add_row("tokens", f"{tokens:,.0f}")
    table.add_row("tokens per second", f"{tokens / max(seconds, 1e-9):,.0f}")
    for key, words, in_words in MEASURED:
        if np.isfinite(values := run.column(key)).any():
            table.add_row(words, in_words(values))
    table.add_row("waiting for data", f"{run.column('data_wait_seconds').sum():.1f} s beside {seconds:.1f} s of steps")
    return table


def _add_evaluations(table: Table, run: Run, key: str, words: str) -> None:
    """Adds the first and last value of the evaluations that have one, and those of each set."""
    values = [line.get(key) for line in run.evaluations if key in line]
    if values:
        table.add_row(words, _from_to(np.asarray(values, dtype=np.float64)))
    by_set = [of_sets for line in run.evaluations if (of_sets := line.get(f"{key}_by_set"))]
    for name in dict.fromkeys(name for of_sets in by_set for name in of_sets):
        measured = [value for of_sets in by_set if (value := of_sets.get(name)) is not None]
        shown = _from_to(np.asarray(measured)) if measured else "no trained token"
        table.add_row(f"  {words} of {escape(name)}", shown)


def _from_to(values: np.ndarray) -> str:
    """The first and last of some values; NaN is a value that was not finite (null in metrics.jsonl)."""
    first, last = ("not finite" if np.isnan(value) else f"{value:.4f}" for value in (values[0], values[-1]))
    return f"{first} -> {last}"


def verified_table(path: str, verified: VerifyResult) -> Table:
    """Tabulate the listed pictures of a prepared dataset by reason, each with an example."""
    table = Table("", "pictures", "such as", title=escape(path), title_justify="left")
    sound = verified.pictures - sum(verified.listed.values())
    table.add_row("looked at", f"{verified.pictures:,}", "")
    table.add_row("nothing to say", f"{max(sound, 0):,}", "")
    for reason, count in verified.listed.most_common():
        table.add_row(reason, f"{count:,}", Text(verified.examples[reason].message))
    if verified.listed:
        table.caption = Text(f"all of them: {verified.folder}/report.jsonl")
    return table
