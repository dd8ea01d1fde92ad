"""The command `python jobs/train.py JOB --trace STEP`: the samples of a step, without a cluster."""

import json
from dataclasses import replace
from typing import Any

from rich.markup import escape
from rich.table import Table

from jobs.common import console
from mmray.base.words import counted
from mmray.batches.plan import BatchPlan
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.run.checkpoints import newest_looking_whole
from mmray.run.data import open_data
from mmray.run.folder import RunFolder
from mmray.run.metrics import METRICS_FILE
from mmray.run.place import CURSOR_FILE
from mmray.run.plan import RunPlan, run_plan
from mmray.run.trace import TracedSample, Tracer
from mmray.schedule.cursor import Cursor, DataSpan
from mmray.training.bins_log import TrainedLog
from mmray.training.json_lines import iter_json_lines


def trace(job: Job, steps: str, *, continue_on: bool, as_json: bool) -> None:
    """Prints the samples of some steps: a table for each step, or with `as_json` one line of JSON for each sample.

    steps: one step, counted from 1 as in metrics.jsonl, or the first and the last, as in `100:105`.
    """
    first, last = _range(steps)
    run = RunFolder(job.output.run).fetch()
    tracer = run_tracer(job, continue_on)
    lines = iter_json_lines(run / METRICS_FILE)
    metrics = {line["step"]: line for line in lines if first <= line["step"] <= last and "loss" in line}
    for step in range(first, last + 1):
        samples = list(tracer.samples(step))
        if as_json:
            for sample in samples:
                print(json.dumps(sample.to_json(), ensure_ascii=False))
        else:
            console.print(_table(step, samples, metrics.get(step)))


def run_tracer(job: Job, continue_on: bool = False) -> Tracer:
    """The tracer of a job's run. continue_on: whether later steps are those of the job's data, where the run's data
    differs."""
    folder = RunFolder(job.output.run)
    run = folder.fetch()
    prepared = open_data(job)
    checkpoint = newest_looking_whole(folder)
    plan = run_plan(job, {"train": prepared}, gpus=False, continue_on=continue_on, checkpoint=checkpoint)
    if checkpoint is None or continue_on:
        cursor = plan.place(checkpoint, prepared)
    else:  # that of the run, also where the job names other data by now
        cursor = Cursor.read(checkpoint / CURSOR_FILE)
        cursor = replace(cursor, prepared=cursor.prepared or prepared.path)
    trained = TrainedLog(run)
    last = trained.get(trained.steps[-1]) if len(trained) else None
    workers = last.workers if job.resources.is_elastic and last else job.resources.max_workers
    last_step = max(last.step if last else 0, plan.total_steps(cursor))
    return Tracer(run, cursor, lambda span, ranks: _batches(plan, cursor, span, ranks), workers, last_step)


def _batches(plan: RunPlan, cursor: Cursor, span: DataSpan, workers: int) -> BatchPlan:
    paths = tuple(dataset.prepared for dataset in span.mixture.datasets) if span.mixture else (span.prepared,)
    batches = plan.batches("train", plan.schedule_of(cursor, span), workers, span.first_step)
    return replace(batches, prepared=paths)


def _range(steps: str) -> tuple[int, int]:
    first, colon, last = steps.partition(":")
    try:
        return int(first), int(last) if colon else int(first)
    except ValueError:
        raise UserError(f"--trace {steps}: give a step, such as 100, or the first and the last, as 100:105") from None


def _table(step: int, samples: list[TracedSample], metrics: dict[str, Any] | None) -> Table:
    done = bool(samples) and samples[0].trained
    workers = samples[0].workers if samples else 0
    title = f"step {step}: {'done' if done else 'to come'} with {counted(workers, 'worker')}"
    if done and metrics:
        numbers = {"loss": "loss", "grad_norm": "gradient norm", "lr": "learning rate"}
        shown = (f"{name} {metrics[key]:.4g}" for key, name in numbers.items() if metrics[key] is not None)
        title += f"; {', '.join(shown)}"
    table = Table(title=escape(title), title_justify="left")
    for name in ("rank", "micro-batch", "bin"):
        table.add_column(name, justify="right")
    mixed = any(sample.dataset for sample in samples)
    for name in ("sample", "source", *(["dataset"] if mixed else [])):
        table.add_column(name, overflow="fold")
    for sample in samples:
        places = str(sample.rank), str(sample.micro_batch), str(sample.bin)
        texts = (sample.id, sample.source, *([sample.dataset] if sample.dataset else []))
        table.add_row(*places, *map(escape, texts))
    return table
