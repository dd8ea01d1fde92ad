"""The dry run: the plan of a job, the doctor's findings, and whether the cluster has room. It writes nothing.

Without an address no Ray is started: the plan is for this machine. With one the cluster is asked, as a run would ask it
before it starts (`jobs/checks.py`); short-lived files in the output folders are all that is written.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from jobs.capacity import Pool, prepare_cpus, prepare_pools, train_cpus, train_pools, uses_gpus
from jobs.capacity import needs as needs_of
from jobs.checks import Check, cluster_checks, job_checks, open_prepared
from jobs.common import connect, console, local_cpus
from jobs.probe import Machine, look
from jobs.room import UnknownModel, check_disk, memory_words, need_of
from mmray.base.words import amount as about
from mmray.base.words import counted, file_size
from mmray.config.job import Job
from mmray.display.progress import MANY_FILES, shown
from mmray.doctor import Finding, FirstRows, as_table, examine, has_failed
from mmray.doctor.findings import failed_by, passed
from mmray.errors import UserError
from mmray.families import Family
from mmray.prepared import PreparedWriter
from mmray.prepared.dataset import MANIFEST, PLAN
from mmray.prepared.estimate import Estimate, SetEstimate, estimate_split
from mmray.prepared.fingerprint import prepare_record
from mmray.prepared.joined import PreparedMixture
from mmray.report.rows import RowFacts
from mmray.report.speed import Speed
from mmray.report.tables import rows_table
from mmray.rows.files import source_files
from mmray.rows.plan import Progress
from mmray.run.attention import attention_note
from mmray.run.checkpoints import newest_looking_whole, step_of
from mmray.run.data import RunData
from mmray.run.folder import RunFolder
from mmray.run.plan import RunPlan, run_plan
from mmray.schedule.cursor import Cursor
from mmray.schedule.mixture import Mixture
from mmray.storage import Folder
from mmray.training.checkpoint import read_state
from mmray.training.part_report import check_resumed
from mmray.training.treatments import stages_of
from pipelines.nodes import Node, alive_nodes, amount

EXIT_FAILED = 2
THIS_MACHINE = "this machine"
Value = TypeVar("Value")


@dataclass
class _Plan:
    """The lines of the plan, and the findings so far."""

    job: Job
    findings: list[Finding] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)
    tables: list[Group] = field(default_factory=list)

    def add(self, name: str, text: str) -> None:
        self.lines.append((name, text))

    def attempt(self, check: str, run: Callable[[], Value]) -> Value | None:
        """The result of a function; where it fails, its error becomes a finding, and the result is None."""
        try:
            return run()
        except Exception as error:  # noqa: BLE001 (a plan tells all that is wrong, not only the first)
            self.findings.append(failed_by(check, error))
            return None

    def check(self, checks: Iterable[Check]) -> None:
        """Runs checks; each that fails, or returns a note, becomes a finding."""
        for check in checks:
            failures = len(self.findings)
            note = self.attempt(check.name, check.run)
            if len(self.findings) == failures and (text := note or check.passed):
                self.findings.append(passed(check.name, text))

    def show(self, title: str) -> int:
        """Prints the plan; returns the exit code."""
        table = Table(title=escape(title), title_justify="left", show_header=False, box=box.ROUNDED)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in self.lines:
            table.add_row(escape(name), escape(text))
        console.print(table, "", *self.tables, as_table(self.findings), "")
        bad = has_failed(self.findings)
        console.print(
            "[bold red]It would not run like this: see what failed above.[/] Nothing was written or started."
            if bad else "Nothing was written or started.",
            highlight=False,
        )  # fmt: skip
        return EXIT_FAILED if bad else 0


def plan_prepare(job: Job, address: str | None, *, replace: bool, verbose: bool) -> int:
    """Shows what `jobs/prepare.py` would do; returns the exit code."""
    plan = _Plan(job)
    rows, guesses = _examined(plan)
    for split, guess in guesses.items():
        _add_rows(plan, split, guess)
        _add_bins(plan, split, guess)
    resources = job.resources
    plan.add("actors", f"up to {resources.encode_actors} encode, {resources.pack_actors} pack: one CPU each")
    nodes = _nodes(plan, address, prepare_cpus(job), verbose)
    if nodes is not None:
        _add_cluster(plan, nodes, prepare_pools(), "preparing")
        plan.check(cluster_checks(job, nodes, trains=False, joined=True if _address(address) else None))
    plan.check(job_checks(job, trains=False))
    for split in job.data.splits if rows else ():
        path = job.prepared_path(split)
        state = plan.attempt("output", partial(_state, job, split, rows, replace))
        plan.add(f"{split} output", f"{path}: {state or 'it cannot be written, see below'}")
    return plan.show(f"{job.name}: what jobs/prepare.py would do")


def plan_train(
    job: Job, address: str | None, *, continue_on: bool, verbose: bool, step_seconds: str | None = None
) -> int:
    """Shows what `jobs/train.py` would do; returns the exit code.

    step_seconds: the time of a step, in seconds, or a run to read it from; None: no time is told.
    """
    plan = _Plan(job)
    speed = None if step_seconds is None else Speed.of(step_seconds)
    is_prepared = bool(job.mixture) or all(
        Folder(job.prepared_path(split)).exists(MANIFEST) for split in job.data.splits
    )
    rows, guesses = _examined(plan, counts=not is_prepared)
    prepared = plan.attempt("prepared", lambda: open_prepared(job)) if is_prepared else None
    for split, guess in guesses.items():
        _add_rows(plan, split, guess)
        _add_bins(plan, split, guess)
    for split, data in (prepared or {}).items():
        plan.add(f"{split} bins", f"{len(data):,}, prepared: {data.path}")
        if rows is not None:
            _add_prepared_rows(plan, split, data, rows.family)
    if not is_prepared:
        plan.add("not prepared", "jobs/prepare.py must run first; until then bins are estimated")
    nodes = _nodes(plan, address, train_cpus(job), verbose)
    gpus = plan.attempt("cluster", lambda: uses_gpus(job, nodes)) if nodes is not None else None
    steps_left = None
    if prepared is not None:
        steps_left = _add_run(plan, prepared, bool(gpus), continue_on)
    elif "train" in guesses and not is_prepared:
        steps_left = _add_steps(plan, guesses["train"].bins, "about ")
    if speed is not None and steps_left is not None:
        plan.add("time", speed.text(job, steps_left, _bin_tokens(prepared, guesses)))
    _add_workers(plan, bool(gpus))
    if nodes is not None and gpus is not None:
        _add_cluster(plan, nodes, train_pools(job, gpus), "training")
        joined = True if _address(address) else None
        saved_stage = plan.attempt("checkpoints", lambda: _saved_stage(job))
        plan.check(cluster_checks(job, nodes, trains=True, gpus=gpus, joined=joined, saved_stage=saved_stage))
        if joined is None:
            _add_room(plan, gpus, saved_stage)
    plan.check(job_checks(job, trains=True))
    plan.add("output", job.output.run)
    return plan.show(f"{job.name}: what jobs/train.py would do")


def _address(address: str | None) -> str | None:
    return address or os.environ.get("RAY_ADDRESS")


def _examined(plan: _Plan, counts: bool = True) -> tuple[FirstRows | None, dict[str, Estimate]]:
    """Adds the doctor's findings to the plan; returns the first rows, where they can be read, and the estimate of each
    split.

    counts: whether to estimate.
    """
    rows, guesses = None, {}
    with console.status("looking at the job as mmray doctor does: up to a minute"):
        for finding in examine(plan.job):
            if isinstance(finding, FirstRows):
                rows = finding
            else:
                plan.findings.append(finding)
    for split in plan.job.data.splits if rows and counts else ():
        with ExitStack() as bar:
            show = shown(bar, f"{plan.job.name}: counting the rows of {split}", "files", least=MANY_FILES)
            guess = plan.attempt("rows", partial(_estimate, plan.job, split, rows, show))
            if guess is not None and rows is not None:
                guesses[split] = guess
                facts = RowFacts.of_estimate(guess, plan.job, split, rows.family)
                plan.tables.append(rows_table(facts, f"{split}: {facts.looked_at}"))
    return rows, guesses


def _estimate(job: Job, split: str, rows: FirstRows | None, on_progress: Progress) -> Estimate:
    assert rows is not None
    return estimate_split(job, split, rows.family, rows.policy, on_progress=on_progress)


def _add_prepared_rows(plan: _Plan, split: str, data: RunData, family: Family) -> None:
    for part in data.parts if isinstance(data, PreparedMixture) else (data,):
        facts = plan.attempt("rows", partial(RowFacts.of_prepared, part, family))
        if facts is not None:
            plan.tables.append(rows_table(facts, f"{split}: {facts.looked_at} of {part.path}"))


def _add_rows(plan: _Plan, split: str, guess: Estimate) -> None:
    kinds = [dataset.kind for dataset in plan.job.data.splits[split]]
    plan.add(f"{split} rows", f"{guess.rows}, in {counted(guess.windows, 'window')}")
    for number, (set_estimate, kind) in enumerate(zip(guess.sets, kinds, strict=True)):
        files = counted(set_estimate.files, "file")
        bad = set_estimate.sampled - set_estimate.good
        rejects = f"; {bad} of {set_estimate.sampled:,} looked at would be rejected" if bad else ""
        taken = f"; {set_estimate.taking}" if set_estimate.taking else ""
        text = f"{set_estimate.rows} in {files}{taken}{rejects}; {_made_of(set_estimate, guess)}"
        plan.add(f"  data.{split}[{number}] ({kind})", text)


def _made_of(set_estimate: SetEstimate, guess: Estimate) -> str:
    """Words for the tokens and bins that a set becomes, with its share of all tokens."""
    share = set_estimate.tokens / max(guess.tokens, 1)
    bins = counted(set_estimate.bins, "bin")
    return f"about {about(set_estimate.tokens)} tokens ({share:.1%}) in {bins}"


def _add_bins(plan: _Plan, split: str, guess: Estimate) -> None:
    packing = plan.job.packing
    if not guess.bins:
        plan.add(f"{split} bins", "none: no row that was looked at can be packed")
        return
    fill = guess.tokens / guess.bins / packing.token_capacity
    visual = guess.visual_tokens / guess.bins / packing.visual_capacity
    taken_once = all(set_estimate.taking is None for set_estimate in guess.sets)
    whole = guess.rows.is_exact and guess.sampled == guess.rows.rows and taken_once
    plan.add(
        f"{split} bins",
        f"{'' if whole else 'about '}{guess.bins:,}: {fill:.0%} of {packing.token_capacity:,} tokens and {visual:.0%} "
        f"of {packing.visual_capacity:,} visual tokens full; "
        + ("all rows were looked at" if whole else f"estimated from {guess.sampled:,} rows"),
    )
    plan.add(f"{split} tokens", f"about {about(guess.tokens)}, of them {about(guess.visual_tokens)} visual")


def _bin_tokens(prepared: Mapping[str, RunData] | None, guesses: Mapping[str, Estimate]) -> float:
    """The mean number of tokens of a bin of the training set."""
    if prepared:
        facts = prepared["train"].statistics
        return facts["tokens"] / max(facts["bins"], 1)
    return guesses["train"].tokens / max(guesses["train"].bins, 1)


def _add_run(plan: _Plan, prepared: Mapping[str, RunData], gpus: bool, continue_on: bool) -> int | None:
    """Adds the steps, and where the run begins or continues; returns the steps that are left, None where it cannot."""
    job, run = plan.job, RunFolder(plan.job.output.run)
    checkpoint = plan.attempt("checkpoints", lambda: newest_looking_whole(run))
    planned_run = run_plan(job, dict(prepared), gpus, continue_on, checkpoint=checkpoint)
    cursor = plan.attempt("resume", lambda: planned_run.place(checkpoint, prepared["train"]))
    if cursor is None:
        return None
    total = planned_run.total_steps(cursor)
    plan.attempt("stages", lambda: stages_of(job.training, total))
    if checkpoint is not None:
        plan.attempt("resume", lambda: check_resumed(checkpoint, job.model, job.training, total))
    left = max(0, total - cursor.step)
    if isinstance(data := prepared["train"], PreparedMixture):
        _add_mixture(plan, data.mixture, planned_run, cursor, total)
    _add_steps(plan, len(data), total=total)
    if checkpoint is not None and (note := attention_note(job, checkpoint)):
        plan.add("attention", note)
    if checkpoint is None:
        plan.add("begins", "at step 0: the run has no checkpoint yet")
    elif left:
        plan.add("goes on", f"from step {step_of(checkpoint.name):,} ({checkpoint.name}): {counted(left, 'step')} left")
    else:
        plan.add("goes on", f"nowhere: {checkpoint.name} is that of the last step, nothing is left to train")
    return left


def _add_mixture(plan: _Plan, mixture: Mixture, run: RunPlan, cursor: Cursor, total: int) -> None:
    """Adds the datasets of a mixture: their shares at the beginning, and how far each will be after the last step."""
    taken = run.schedule_at(cursor).taken_at(max(total, cursor.step) - cursor.first_step)
    _, shares = mixture.shares_from(cursor.step)[0]
    for dataset, share in zip(mixture.datasets, shares):
        epochs = taken[dataset.fingerprint].bins / dataset.num_bins
        plan.add(
            f"  {dataset.name}",
            f"{float(share):.2%} of the bins now, {epochs:.3g} epochs of its {counted(dataset.num_bins, 'bin')} in all "
            "steps",
        )
    for stage in mixture.stages:
        weights = ", ".join(f"{weight:g}" for weight in stage.weights)
        plan.add("  stage", f"until step {stage.until:,}: weights {weights}")


def _add_steps(plan: _Plan, bins: int, mark: str = "", total: int | None = None) -> int:
    """Adds the number of steps, and returns it.

    mark: text before numbers that are estimates; total: steps, where they are known.
    """
    training, resources = plan.job.training, plan.job.resources
    per_epoch = max(1, math.ceil(bins / training.global_batch_bins))
    steps = total or training.steps or max(1, round((training.epochs or 1) * per_epoch))
    epochs = "" if plan.job.mixture else f": {mark}{steps / per_epoch:.3g} epochs of {mark}{per_epoch:,} steps"
    plan.add("steps", f"{'' if training.steps else mark}{steps:,}{epochs}")
    micro = math.ceil(training.global_batch_bins / training.micro_batch_bins / resources.min_workers)
    most = training.global_batch_bins * plan.job.packing.token_capacity
    plan.add(
        "global batch",
        f"{counted(training.global_batch_bins, 'bin')} of up to {about(most)} tokens: on each worker "
        f"{counted(micro, 'micro-batch')} of {training.micro_batch_bins}",
    )
    return steps


def _add_workers(plan: _Plan, gpus: bool) -> None:
    job, resources, training = plan.job, plan.job.resources, plan.job.training
    pools = train_pools(job, gpus)
    most = f" to {resources.max_workers}" if resources.is_elastic else ""
    for pool, more in zip(pools, (most, "", "")):
        of = " and ".join(f"{needed:g} {name}" for name, needed in pool.needs.items())
        plan.add(pool.name.removeprefix("training "), f"{pool.count}{more}, {of} each")
    plan.add("evaluation", _evaluations(job))
    every_steps = training.checkpoint_every_steps
    saved = f"every {counted(every_steps, 'step')}" if every_steps else "at the end"
    plan.add("checkpoints", f"{saved}, the newest {training.keep_checkpoints} are kept")


def _saved_stage(job: Job) -> int | None:
    """The ZeRO stage of the checkpoint from which a run would continue; None for a new run."""
    checkpoint = newest_looking_whole(RunFolder(job.output.run))
    return None if checkpoint is None else read_state(checkpoint).zero_stage


def _add_room(plan: _Plan, gpus: bool, saved_stage: int | None) -> None:
    """Adds the bytes of each worker and of checkpoints beside what this machine has. Those that are too many are
    findings."""
    machines = [Machine.of("this machine", look({}, []))]
    try:
        need = need_of(plan.job, gpus, machines, saved_stage)
        plan.add("memory", memory_words(need, gpus))
        with contextlib.suppress(UserError):
            plan.add("disk", check_disk(plan.job, gpus, machines, saved_stage))
    except UnknownModel as error:
        plan.add("memory", f"not known: {error}")


def _evaluations(job: Job) -> str:
    """The evaluations of a run in words."""
    settings, every_steps = job.evaluation, job.training.eval_every_steps
    every_steps = every_steps if settings is None else settings.every_steps or every_steps
    words = [f"every {counted(every_steps, 'step')}"] if every_steps else []
    if settings is None or not job.data.eval:
        return words[0] if words else "none"
    words.append("at the end")
    rows = f", {counted(settings.generate.rows, 'row')} read" if settings.generate.rows else ""
    if rows and settings.sets is not None:
        rows += (
            f" of {counted(len(settings.sets), 'set')} ({', '.join(map(str, settings.sets))}) of {len(job.data.eval)}"
        )
    return f"{' and '.join(words)}{rows}; it uses the actors and workers of training"


def _nodes(plan: _Plan, address: str | None, cpus: int, verbose: bool) -> list[Node] | None:
    """The nodes of the cluster at an address, None where none answers; without an address, this machine as Ray would
    see it."""
    if _address(address):
        joined = plan.attempt("cluster", lambda: connect(address, cpus=cpus, verbose=verbose))
        return None if joined is None else alive_nodes()
    return [Node(THIS_MACHINE, {"CPU": local_cpus(cpus), "GPU": torch.cuda.device_count()})]


def _add_cluster(plan: _Plan, nodes: Sequence[Node], pools: Sequence[Pool], what: str) -> None:
    count = f"{len(nodes)} nodes" if len(nodes) > 1 else nodes[0].address if nodes else "no node yet"
    has = " and ".join(f"{amount(nodes, name):g} {name}" for name in ("CPU", "GPU") if amount(nodes, name))
    asked = " and ".join(f"{need:g} {name}" for name, need in needs_of(pools).items())
    if not nodes or nodes[0].address != THIS_MACHINE:
        plan.add("cluster", f"{count}: {has or 'no CPU'}; {what} takes {asked}, at least")
        return
    cores, memory = os.cpu_count() or 1, look({}, []).memory
    gpus = f", {amount(nodes, 'GPU'):g} GPU" if amount(nodes, "GPU") else ""
    words = f"{counted(cores, 'core')}{gpus}, {file_size(memory) if memory else 'an unknown amount'} of memory; "
    words += f"{what} takes {asked}, at least"
    if needs_of(pools).get("CPU", 0) > cores:
        words += ": processes take turns on the cores"
    plan.add(THIS_MACHINE, words)


def _state(job: Job, split: str, rows: FirstRows | None, replace: bool) -> str:
    """The state of a split's output. Raises UserError where it belongs to another job."""
    assert rows is not None
    folder, datasets = Folder(job.prepared_path(split)), job.data.splits[split]
    if not (folder.exists(MANIFEST) or folder.exists(PLAN)):
        return "nothing there yet"
    if replace:
        return "what is there is deleted and made anew"
    record = prepare_record(
        files=source_files(datasets), datasets=datasets, data=job.data, processor=rows.family.processor,
        tiling=rows.policy, packing=job.packing, loss=job.loss,
        costs=costs.cost_record() if (costs := job.packing_costs) else None,
    )  # fmt: skip
    writer = PreparedWriter(folder.uri)
    if writer.is_finished(writer.as_begun(record)):
        return "up to date, nothing to do"
    return "a prepare was begun here; its finished windows are kept"
