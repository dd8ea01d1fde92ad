"""`make demo`: everything mmray does, on this machine, in a few minutes and without a network.

Draws about a hundred pages (several shapes, EXIF orientations, some bad rows on purpose) and some thousand numbers,
prepares them, trains a small Qwen2-VL from random weights on two workers, kills the run in the middle, starts the same
command again, and lets the model read numbers that it has not seen, before and after.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jobs  # noqa: F401  (says what is missing)

# isort: split
import ray
import torch
from rich.table import Table

from jobs.command_line import run_main
from jobs.common import ROOT, connect, console
from jobs.evaluating import results_table
from jobs.preparing import prepare_splits
from mmray.config.job import Job, load_job
from mmray.errors import UserError
from mmray.prepared import PreparedDataset
from mmray.run.checkpoints import newest_looking_whole, step_of
from mmray.run.evaluation import Reader
from mmray.run.evaluation.model import EvaluatedModel
from mmray.run.evaluation.rows import EvaluationData
from mmray.run.evaluation.standalone import EvaluationPlan, evaluate
from mmray.run.folder import MODEL_FOLDER
from mmray.run.metrics import METRICS_FILE, read_metrics
from mmray.run.scoring.settings import EvaluationSettings
from mmray.synthetic.numbers import PROMPT, write_numbers, write_reader
from mmray.synthetic.pages import SyntheticPages, write_pages

OUTPUT = Path("demo_out")
JOB = Path("jobs/demo.yaml")
NUMBERS, UNSEEN_NUMBERS = 5000, 100
UNSEEN = OUTPUT / "data" / "numbers-eval.jsonl"
KILL_AFTER_STEP = 50
STARTUP_SECONDS = 600
SHOWN_READINGS = 4


def write_inputs() -> SyntheticPages:
    """Writes pages, numbers, their rows, processor and model configuration, all generated here."""
    pages = write_pages(OUTPUT / "data")
    write_numbers(OUTPUT / "data", "train", NUMBERS)
    write_numbers(OUTPUT / "data", "eval", UNSEEN_NUMBERS)
    write_reader(OUTPUT)
    return pages


def read_unseen(job: Job, model: str) -> dict[str, float]:
    """Lets a model (as for `--model` of jobs/evaluate.py) read the unseen numbers; returns its metrics."""
    console.print(f"$ python jobs/evaluate.py {JOB} --model {model} --data {UNSEEN}", highlight=False, soft_wrap=True)
    plan = EvaluationPlan(
        job, EvaluatedModel.find(job, folder=model), EvaluationData.of(job, str(UNSEEN)), EvaluationSettings()
    )
    values, _ = evaluate(plan)
    console.print(results_table(plan.folder, values))
    metrics: dict[str, float] = values["all"]
    return metrics


def readings(model: Path) -> Table:
    """Tabulates what an exported model, loaded by transformers, reads on some unseen pages."""
    reader = Reader(str(model))
    table = Table("page", "its text", "read")
    for line in UNSEEN.read_text(encoding="utf-8").splitlines()[:SHOWN_READINGS]:
        row = json.loads(line)
        page = str(UNSEEN.parent / row["images"][0])
        table.add_row(page, row["text"].removeprefix(PROMPT), reader.read(PROMPT, [page], max_new_tokens=10))
    return table


def train_and_kill(metrics: Path, address: str) -> int:
    """Runs `jobs/train.py` and kills it after some steps, as a lost machine would; returns the last step it logged."""
    process = subprocess.Popen(train_command(address), start_new_session=True)
    deadline = time.monotonic() + STARTUP_SECONDS
    while last_step(metrics) < KILL_AFTER_STEP:
        if process.poll() is not None:
            raise UserError(f"training ended before step {KILL_AFTER_STEP}; its messages are above")
        if time.monotonic() > deadline:
            process.kill()
            raise UserError(f"training did not reach step {KILL_AFTER_STEP} in {STARTUP_SECONDS} s")
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return last_step(metrics)


def train_command(address: str) -> list[str]:
    return [sys.executable, "jobs/train.py", str(JOB), "--address", address]


def last_step(metrics: Path) -> int:
    return max((line["step"] for line in read_metrics(metrics)), default=0) if metrics.exists() else 0


def checkpoint_step(run: Path) -> int:
    """The step of the newest whole checkpoint."""
    newest = newest_looking_whole(run)
    return step_of(newest.name) if newest else 0


def summary(job: Job, killed_at: int, resumed_from: int, before: dict[str, float], after: dict[str, float]) -> Table:
    """A table of the inputs and results of the demo. before, after: metrics of reading, untrained and trained."""
    facts = PreparedDataset(job.prepared_path("train")).statistics
    lines = read_metrics(Path(job.output.run) / METRICS_FILE)
    losses = [line["loss"] for line in lines if "loss" in line]
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    table = Table(title="mmray demo", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    read, packed, rejected = (facts[f"rows_{what}"] for what in ("read", "packed", "rejected"))
    table.add_row("rows", f"{read} read = {packed} packed + {rejected} rejected")
    table.add_row("rejected", ", ".join(f"{count} {reason}" for reason, count in facts["rejected_by_reason"].items()))
    table.add_row("bins", f"{facts['bins']} (at least {facts['bins_at_least']} needed)")
    table.add_row("fill", f"{facts['token_fill']:.1%} of tokens, {facts['visual_fill']:.1%} of visual tokens")
    table.add_row(
        "tokens", f"{facts['tokens']:,}, of them {facts['visual_tokens']:,} visual, {facts['trained_tokens']:,} trained"
    )
    table.add_row("killed", f"after step {killed_at}, resumed from the checkpoint at step {resumed_from}")
    table.add_row("loss", f"{losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
    table.add_row("eval loss", " -> ".join(f"{loss:.3f}" for loss in evaluations))
    right = (f"{metrics['exact_match'] * metrics['rows']:.0f}" for metrics in (before, after))
    table.add_row("read right", f"{' -> '.join(right)} of {UNSEEN_NUMBERS} numbers it had not seen")
    table.add_row("CER", f"{before['cer']:.1%} -> {after['cer']:.1%} wrong characters (untrained, it writes too many)")
    for name, path in (
        ("prepared", job.prepared_path("train")),
        ("rejected rows", job.prepared_path("train") + "/rejected.parquet"),
        ("run", job.output.run),
        ("model", f"{job.output.run}/{MODEL_FOLDER}"),
        ("what it reads", f"{job.output.run}/evaluations/{MODEL_FOLDER}-numbers-eval/report.html"),
        ("look at a bin", f"mmray inspect {job.prepared_path('train')} --bin 0"),
        ("curves", f"tensorboard --logdir {job.output.run}"),
    ):
        table.add_row(name, path)
    return table


def main() -> None:
    """Draws pages, prepares them, trains, kills, resumes, reads and reports."""
    os.chdir(ROOT)
    torch.set_num_threads(1)  # the model is so small that threads wait for each other longer than they work
    shutil.rmtree(OUTPUT, ignore_errors=True)
    console.rule("1. Draw pages")
    pages = write_inputs()
    console.print(f"{pages.num_pages} pages, {NUMBERS:,} pictures of numbers, and their rows in {pages.folder}")
    job = load_job(JOB)
    run = Path(job.output.run)
    console.rule("2. What the model reads before it is trained")
    before = read_unseen(job, "base")
    connect(None, cpus=4)
    address = ray.get_runtime_context().gcs_address
    console.rule("3. Prepare: exact lengths from headers, tiles, packed bins")
    prepare_splits(job)
    console.rule(f"4. Train on {job.resources.workers} workers, to be killed after step {KILL_AFTER_STEP}")
    killed_at = train_and_kill(run / METRICS_FILE, address)
    resumed_from = checkpoint_step(run)
    console.rule(f"5. The same command again: resume from the checkpoint at step {resumed_from}")
    done = subprocess.run(train_command(address), check=False)
    if done.returncode:
        raise UserError("the resumed training failed; its messages are above")
    ray.shutdown()
    console.rule("6. What it reads now, on pages that it has not seen")
    after = read_unseen(job, str(OUTPUT / "run" / MODEL_FOLDER))
    console.print(readings(run / MODEL_FOLDER))
    console.rule("7. All in all")
    console.print(summary(job, killed_at, resumed_from, before, after))


if __name__ == "__main__":
    run_main(main)
