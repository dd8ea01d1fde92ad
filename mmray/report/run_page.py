"""Renders the page of a training run: curves over steps, and the events of the run."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import numpy as np

from mmray.base.words import amount, made_by, span
from mmray.display import charts
from mmray.display.charts import Plot, Series
from mmray.display.html import template
from mmray.report.run import Run, loss_chart, marks
from mmray.run.metrics import SHARE_STEPS
from mmray.run.scoring.metrics import Normalisation
from mmray.run.scoring.page import shown_text

RATES = (("cer", "tokens"), ("wer", "warn"))

MEASURED: tuple[tuple[str, str, str, str, Callable[[np.ndarray], str]], ...] = (
    ("token_accuracy", "Token accuracy", "share", "good",
     lambda shares: f"Trained tokens that the model finds most likely; {shares[-1]:.1%} at the end."),
    ("peak_memory", "Peak memory", "bytes", "visual",
     lambda held: f"Of the worker that holds most; {np.nanmax(held) / 1e9:,.2f} GB at most."),
    ("model_flops_per_second", "Model FLOPs per second", "FLOPs a second", "tokens",
     lambda speeds: f"Of all workers, during steps; median {np.nanmedian(speeds) / 1e12:,.3g} TFLOPs a second."),
    ("mfu", "Model FLOPs utilisation", "share", "good",
     lambda shares: f"Of what the GPUs could do in bf16; median {np.nanmedian(shares):.1%}."),
)  # fmt: skip
"""The measures of a step that have a chart of their own: key; title, name, colour and note of the chart."""

MOST_TEXTS = 9
MOST_EVENTS, MOST_WARNINGS, MOST_SKIPPED = 200, 20, 10
LINES = ("tokens", "visual", "good", "warn", "bad")
"""Colours of the datasets or sets that one chart shows."""
COLOURS = {"resume": "warn", "preemption": "warn", "damaged_checkpoint": "bad", "finish": "good", "checkpoint": "grey"}


def run_page(run: Run) -> str:
    """The report of a run as one page of HTML; the run may have no step yet."""
    events = [event for event in run.history if event["event"] != "checkpoint"]
    return template("report_run.html.jinja").render(
        run=run,
        facts=_facts(run),
        figures=_figures(run),
        charts=_charts(run) if run.steps else [],
        events=[_event(event) for event in events[-MOST_EVENTS:]],
        events_note=_events_note(run, len(events)),
        warnings=run.warnings[-MOST_WARNINGS:],
        skipped=run.skipped[-MOST_SKIPPED:],
        reading=_reading(run),
        footer=made_by(),
    )


def _reading(run: Run) -> dict[str, Any] | None:
    """The texts of the newest evaluation, a few of the worst, median and best; None where none were read."""
    if run.latest_evaluation is None:
        return None
    values, texts = run.latest_evaluation
    normalisation = Normalisation.model_validate(values["normalisation"])
    chosen = [texts[place] for place in sorted({round(place) for place in np.linspace(0, len(texts) - 1, MOST_TEXTS)})]
    return {
        "step": values["step"], "cer": values["all"]["cer"], "texts": values["all"]["texts"],
        "shown": [shown_text(text, normalisation) for text in chosen] if texts else [],
    }  # fmt: skip


def _facts(run: Run) -> list[tuple[str, str]]:
    facts = [("state", run.state)]
    if run.lasted is not None:
        facts.append(("from first to last event", span(run.lasted)))
    if run.steps:
        facts.append(("epoch", f"{np.nan_to_num(run.column('epoch')[-1]):.2f}"))
    return facts


def _figures(run: Run) -> list[tuple[str, str]]:
    if not run.steps:
        return []
    loss, tokens, seconds = run.column("loss"), run.column("tokens"), run.column("step_seconds")
    waited = float(np.nansum(run.column("data_wait_seconds")))
    known = loss[np.isfinite(loss)]
    figures = [
        (run.steps_done, "steps"),
        (_number(loss[-1]), f"loss, from {_number(loss[0])}"),
        (amount(int(np.nansum(tokens))), "tokens"),
        (amount(round(float(np.nansum(tokens)) / max(float(np.nansum(seconds)), 1e-9))), "tokens a second of stepping"),
        (f"{waited / max(waited + float(np.nansum(seconds)), 1e-9):.1%}", "of the time waiting for data"),
    ]
    if run.evaluations:
        evaluations = run.eval_column("eval_loss")
        figures.insert(2, (_number(evaluations[-1]), f"evaluation loss, from {_number(evaluations[0])}"))
    if len(known) < len(loss):
        figures.append((f"{len(loss) - len(known):,}", "steps whose loss was not finite"))
    resumes = sum(event["event"] == "resume" for event in run.history)
    if run.history:
        figures.append((f"{resumes:,}", "resume" if resumes == 1 else "resumes"))
    return figures


def _charts(run: Run) -> list[Plot]:
    """Draw the charts for which the run has values."""
    steps, last = run.column("step"), run.last_step
    first = int(steps[0])
    lines = [(step, "") for step, _ in marks(run)]

    def chart(title: str, note: str, series: list[Series], zero: bool = False) -> Plot:
        return charts.over_steps(title, note, series, zero=zero, marks=lines, first_step=first, last_step=last)

    def column(name: str, colour: str, key: str) -> Series:
        return Series(name, colour, steps, run.column(key))

    tokens, seconds, waited = run.column("tokens"), run.column("step_seconds"), run.column("data_wait_seconds")
    speed = tokens / np.maximum(seconds, 1e-9)
    plots = [
        loss_chart(run),
        chart("Learning rate", f"Highest {np.nanmax(run.column('lr')):.3g}." if _has(run, "lr") else "",
              [column("learning rate", "tokens", "lr")], True),
        chart("Gradient norm", "Before clipping.", [column("norm", "visual", "grad_norm")]),
        chart("Tokens per second", f"During steps, without waiting for data; median {np.nanmedian(speed):,.0f}.",
              [Series("tokens per second", "good", steps, speed)], True),
        chart("Waiting for data", f"Seconds of each step; {np.nansum(waited):,.1f} s in all, beside "
              f"{np.nansum(seconds):,.1f} s of stepping.", [Series("seconds", "warn", steps, waited)], True),
    ]  # fmt: skip
    plots[1:1] = _evaluation_charts(run, chart)
    if np.isfinite(run.workers).any():
        few, many = np.nanmin(run.workers), np.nanmax(run.workers)
        note = f"{few:.0f} throughout." if few == many else f"From {few:.0f} to {many:.0f}."
        plots.append(chart("Workers", note, [Series("workers", "grey", steps, run.workers)], True))
    saved = [event for event in run.history if event["event"] == "checkpoint" and event.get("seconds") is not None]
    if saved:
        values = np.asarray([event["seconds"] for event in saved], dtype=np.float64)
        when = np.asarray([event["step"] for event in saved], dtype=np.float64)
        note = f"The step loop held up at each; {values.sum():,.1f} s in all, {np.median(values):.2g} s at the median."
        plots.append(chart("Checkpoints", note, [Series("seconds", "tokens", when, values, dots=True)], True))
    for key, title, name, colour, said in MEASURED:
        if _has(run, key):
            series = [column(name, colour, key), *_of_evaluations(run, f"eval_{key}")]
            plots.append(chart(title, said(run.column(key)), series, True))
    if run.shares:
        plots.append(chart(*_share_chart(run), True))
    if run.columns_by_name("loss_by_set"):
        plots.append(chart(*_set_loss_chart(run)))
    skipped = run.column("skipped_samples")
    if np.nansum(skipped):
        note = f"Samples whose picture could not be used: {np.nansum(skipped):,.0f} in all."
        plots.append(chart("Skipped samples", note, [Series("samples", "bad", steps, skipped)], True))
    return [plot for plot in plots if plot.curves and any(curve.line or curve.dots for curve in plot.curves)]


def _evaluation_charts(run: Run, chart: Callable[..., Plot]) -> list[Plot]:
    """The charts of what was read, and of the loss of each set where there are several."""
    plots, steps = [], run.eval_column("step")
    rates = [(name, colour) for name, colour in RATES if np.isfinite(run.eval_column(f"eval_{name}")).any()]
    if rates:
        series = [
            Series(name.upper(), colour, steps, run.eval_column(f"eval_{name}"), dots=True) for name, colour in rates
        ]
        plots.append(chart("What it reads", "Error rates of generated texts, over all rows that were read.", series))
    by_set = [line.get("eval_loss_by_set") or {} for line in run.evaluations]
    names = sorted({name for losses in by_set for name in losses})
    if len(names) > 1:
        series = [
            Series(f"set {name}", LINES[place % len(LINES)], steps, _values(by_set, name), dots=True)
            for place, name in enumerate(names)
        ]
        plots.append(chart("Evaluation loss by set", "Sets of data.eval, by their number.", series))
    return plots


def _of_evaluations(run: Run, key: str) -> list[Series]:
    """The values of the evaluations that have measured something; none where no evaluation has."""
    lines = [line for line in run.evaluations if line.get(key) is not None]
    places, values = (np.asarray([line[name] for line in lines], dtype=np.float64) for name in ("step", key))
    return [Series("evaluation", "warn", places, values, dots=True)] if lines else []


def _values(by_set: list[dict[str, Any]], name: str) -> np.ndarray:
    values = (losses.get(name) for losses in by_set)
    return np.asarray([np.nan if value is None else value for value in values], dtype=np.float64)


def _share_chart(run: Run) -> tuple[str, str, list[Series]]:
    """The share of each dataset of a mixture beside the one asked for: title, note and series of the chart."""
    steps, names = run.column("step"), list(run.shares)[: len(LINES)]
    series = []
    for name, colour in zip(names, LINES):
        series.append(Series(f"{name}, asked for", "grey", steps, run.asked_shares[name]))
        series.append(Series(name, colour, steps, run.shares[name]))
    ends = (f"{name} {run.shares[name][-1]:.1%} of {run.asked_shares[name][-1]:.1%}" for name in names)
    note = f"Bins of the last {SHARE_STEPS} steps; grey is what is asked for. At the end: {', '.join(ends)}."
    return "Share of each dataset", note + _others(len(run.shares)), series


def _set_loss_chart(run: Run) -> tuple[str, str, list[Series]]:
    """The loss of each set of rows: title, note and series of the chart."""
    losses = run.columns_by_name("loss_by_set")
    steps = run.column("step")
    shown = {f"set {name}" if name.isdecimal() else name: column for name, column in losses.items()}
    series = [Series(name, colour, steps, shown[name]) for name, colour in zip(shown, LINES)]
    ends = (f"{name} {_number(_last_known(shown[name]))}" for name in list(shown)[: len(LINES)])
    note = f"A mean over the trained tokens that each step has of a set. Last: {', '.join(ends)}."
    return "Loss by set", note + _others(len(losses)), series


def _others(count: int) -> str:
    return f" The first {len(LINES)} of {count} are drawn." if count > len(LINES) else ""


def _last_known(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else float("nan")


def _has(run: Run, key: str) -> bool:
    return bool(np.isfinite(run.column(key)).any())


def _event(event: dict[str, Any]) -> dict[str, Any]:
    known = ("time", "event", "step", "workers")
    details = [f"{name} {_words(value)}" for name, value in event.items() if name not in known and value is not None]
    return {
        "time": f"{datetime.fromisoformat(event['time']):%Y-%m-%d %H:%M:%S}",
        "step": event["step"],
        "workers": event["workers"],
        "name": str(event["event"]).replace("_", " "),
        "colour": COLOURS.get(event["event"], ""),
        "text": ", ".join(details),
    }


def _words(value: Any) -> str:
    if isinstance(value, dict) and "datasets" in value:  # a mixture's record
        return ", ".join(f"{dataset['name']} with weight {dataset['weight']:g}" for dataset in value["datasets"])
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(of_name)}" for name, of_name in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _events_note(run: Run, count: int) -> str:
    saved = sum(event["event"] == "checkpoint" for event in run.history)
    shown = "" if count <= MOST_EVENTS else f" The last {MOST_EVENTS} of {count:,} are here."
    return f"Times are UTC. {saved:,} checkpoints were written; they are not listed.{shown}"


def _number(value: float) -> str:
    return f"{value:.4g}" if np.isfinite(value) else "not finite"
