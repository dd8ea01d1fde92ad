"""Checks, shows and exports data and runs; `prepare`, `train` and `evaluate` run the jobs of a checkout."""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import mmray
from mmray.base.command_help import PlainCommand, PlainGroup
from mmray.base.words import counted, file_size
from mmray.errors import UserError

_MAX_EXAMPLES = 10
"""Most examples of each kind that a command prints."""

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__, cls=PlainGroup
)
command = partial(app.command, cls=PlainCommand)

ALL_TO_THE_JOB = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Context settings of a command that passes all its arguments to a job's script, `--help` too."""


def _show_version(asked: bool) -> None:
    if asked:
        print(f"mmray {mmray.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


@command(context_settings=ALL_TO_THE_JOB)
def prepare(context: typer.Context) -> None:
    """Prepare a job's rows: runs jobs/prepare.py of the checkout, with the same arguments."""
    _run_job("prepare", context.args)


@command(context_settings=ALL_TO_THE_JOB)
def train(context: typer.Context) -> None:
    """Train a job: runs jobs/train.py of the checkout, with the same arguments."""
    _run_job("train", context.args)


@command(context_settings=ALL_TO_THE_JOB)
def evaluate(context: typer.Context) -> None:
    """Let a model read rows and compare: runs jobs/evaluate.py of the checkout, with the same arguments."""
    _run_job("evaluate", context.args)


def _run_job(name: str, arguments: list[str]) -> None:
    """Replace this process by a job's script. Raises UserError when there is no checkout."""
    script = Path(mmray.__file__).parents[1] / "jobs" / f"{name}.py"
    if not script.exists():
        raise UserError(
            f"jobs/{name}.py is not beside this installation of mmray; in a checkout of mmray type: "
            f"python jobs/{name}.py {' '.join(arguments) or 'JOB.yaml'}"
        )
    os.execv(sys.executable, [sys.executable, str(script), *arguments])


@command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a page with every setting, for people, instead.")
    ] = False,
) -> None:
    """Print the JSON Schema of the job file: for editors that complete and check YAML."""
    if markdown:
        from mmray.config.reference import settings_page

        print(settings_page(), end="")
        return
    from mmray.config.job import Job

    print(json.dumps(Job.model_json_schema(), indent=2))


@command()
def report(
    path: Annotated[str, typer.Argument(metavar="PREPARED|RUN", help="A prepared dataset, or a run's folder.")],
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a web page with charts instead of printing.")
    ] = None,
    job_file: Annotated[
        Path | None,
        typer.Option("--job", metavar="JOB.yaml", help="With --html: the job whose workers and batches the page uses."),
    ] = None,
    processor: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|NAME", help="Processor, on disk or on the hub; default: the one of the prepared dataset."
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the processor.")
    ] = False,
) -> None:
    """Report a prepared dataset or a run: a table, or a page with charts (--html)."""
    from mmray.config.job import load_job

    job = None if job_file is None else load_job(job_file)  # a mistake is reported before torch is imported
    from mmray.display.html import write_html
    from mmray.prepared import PreparedDataset
    from mmray.report import Run, prepared_page, prepared_table, run_page, run_table
    from mmray.report.prepared_page import loaded_family
    from mmray.report.rows import RowFacts
    from mmray.report.tables import rows_table

    console = Console()
    if Run.is_one(path):
        if html is None:
            console.print(run_table(Run(path)))
            return
        page = run_page(Run(path))
    else:
        prepared = PreparedDataset(path)
        if html is None:
            console.print(prepared_table(prepared))
            family, no_family = loaded_family(prepared, processor, trust_remote_code=trust_remote_code)
            if family is None:
                console.print(f"the rows are not looked at: {no_family}", markup=False, highlight=False, soft_wrap=True)
            elif len(prepared):
                facts = RowFacts.of_prepared(prepared, family)
                console.print(rows_table(facts, f"rows: {facts.looked_at}"))
            return
        page = prepared_page(prepared, processor, job=job, trust_remote_code=trust_remote_code)
    size = write_html(html, page)
    console.print(f"{html}: {file_size(size)}", markup=False, highlight=False, soft_wrap=True)


@command()
def estimate(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    tries: Annotated[
        list[str],
        typer.Option(
            "--try",
            metavar="KEY=VALUE",
            help="A policy to compare: a setting with another value, or several: 'images.grid=[2,2]; images.labels=1'.",
        ),
    ] = [],  # noqa: B006
    overrides: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")] = [],  # noqa: B006
) -> None:
    """Compare policies of a job: tokens, fill of bins, rows lost, steps; from a sample of its rows, without Ray."""
    from mmray.config.job import load_job

    load_job(job_file, overrides)  # a typo is told before the rest is imported
    from mmray.prepared.policies import compare, policies

    wanted = policies(job_file, overrides, tries)
    from mmray.report.tables import policies_table

    console = Console()
    estimates = []
    with console.status("counting rows") as status:
        for policy_estimate in compare(wanted):
            estimates.append(policy_estimate)
            status.update(f"{len(estimates)} of {len(wanted)} policies")
    console.print(policies_table(wanted[0].job.name, estimates))


@command("from-huggingface")
def from_huggingface(
    path: Annotated[
        str, typer.Argument(metavar="DATASET", help="As for datasets.load_dataset: a hub name, imagefolder, json, …")
    ],
    target: Annotated[str, typer.Argument(metavar="FOLDER", help="The folder of the Parquet files: a path or URI.")],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="The configuration of the dataset.")] = None,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="The split.")] = "train",
    revision: Annotated[str | None, typer.Option(metavar="COMMIT", help="The commit of a dataset on the hub.")] = None,
    data_dir: Annotated[str | None, typer.Option(metavar="FOLDER", help="The folder of a local dataset.")] = None,
    data_files: Annotated[
        str | None, typer.Option(metavar="FILES", help="The files of a local dataset, or a glob.")
    ] = None,
) -> None:
    """Write a Hugging Face dataset into Parquet row files, image bytes included. After a stop, the same command
    continues."""
    from mmray.rows.huggingface import write_rows

    rows = write_rows(
        target, path=path, name=name, split=split, revision=revision, data_dir=data_dir, data_files=data_files
    )
    Console().print(f"{target}: {counted(rows, 'row')}", markup=False, highlight=False, soft_wrap=True)


@command("from-pdf")
def from_pdf(
    files: Annotated[list[str], typer.Argument(metavar="PDF", help="PDFs: paths, folders, globs, or URIs of them.")],
    out: Annotated[str, typer.Option(metavar="ROWS.jsonl", help="The local file for the rows.")],
    text: Annotated[
        bool, typer.Option("--text", help="Write each page's text layer as its text, marked with text_from.")
    ] = False,
) -> None:
    """Write a row for each page of PDFs; nothing is rendered. After a stop, the same command continues."""
    from mmray.display.progress import ProgressBar
    from mmray.rows.from_pdf import write_pdf_rows

    with ProgressBar(f"rows of {out}", "files") as bar:
        written = write_pdf_rows(files, out, text=text, on_progress=bar.update)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"{out}: {counted(written.rows, 'row')}")
    if written.without_text:
        console.print(f"left out: {counted(written.without_text, 'page')} without a text layer")
    for reason in written.failed[:_MAX_EXAMPLES]:
        console.print(f"left out: {reason}")
    if len(written.failed) > _MAX_EXAMPLES:
        console.print(f"… and {len(written.failed) - _MAX_EXAMPLES:,} more files are left out")
    if written.image_root:
        console.print(f"the job names where the PDFs lie: image_root: {written.image_root}")


@command()
def verify(
    path: Annotated[str, typer.Argument(metavar="PREPARED|JOB.yaml", help="A prepared dataset, or a job's.")],
    processes: Annotated[
        int | None,
        typer.Option(min=1, metavar="COUNT", help="Processes of this machine that decode; default: one for each CPU."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Ray cluster whose CPUs decode; default: RAY_ADDRESS, else this machine's."
        ),
    ] = None,
) -> None:
    """Decode every picture of a prepared dataset once, and list those that are broken, blank or not as prepared.

    With --address, or RAY_ADDRESS as `ray job submit` sets it, all CPUs of a Ray cluster decode (jobs/verify.py of the
    checkout), otherwise processes of this machine. Exit code 1 when a picture is broken. After a stop, the same command
    continues, wherever it runs.
    """
    if processes is None and (address or os.environ.get("RAY_ADDRESS")):
        _run_job("verify", [path, *(["--address", address] if address else [])])
    if address:
        raise UserError("--processes is for this machine, --address for a cluster; give one of them")
    from mmray.config.job import prepared_paths

    paths = prepared_paths(path)  # a typo is told before the rest is imported
    from mmray.prepared.verify import in_processes
    from mmray.report.verified import verify_datasets

    count = processes or os.cpu_count() or 1
    Console(stderr=True).print(f"decoding in {count} processes of this machine; --address names a Ray cluster")
    sys.exit(1 if verify_datasets(paths, in_processes(count)) else 0)


@command()
def inspect(
    path: Annotated[
        str,
        typer.Argument(metavar="PREPARED|JOB.yaml", help="A prepared dataset, or a job file with --rows or --id."),
    ],
    bin_number: Annotated[
        int | None, typer.Option("--bin", metavar="NUMBER", help="Which bin, from 0; default: the first.")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, metavar="COUNT", help="For a job file: the number of first rows of each set."),
    ] = None,
    row_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="For a job file: the row with this id.")
    ] = None,
    row_set: Annotated[
        str | None, typer.Option("--set", metavar="SET", help="For a job file: one set of rows, such as train.1.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For a job file: print a line of JSON for each row.")] = False,
    processor: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|NAME", help="Processor, on disk or on the hub; default: the one of the prepared dataset."
        ),
    ] = None,
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a web page with the pictures instead of printing.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the processor.")
    ] = False,
) -> None:
    """Show one bin: its samples, the turns of their text, the trained tokens, and the pictures (--html). For a job
    file: its rows as samples, before anything is prepared."""
    if path.endswith((".yaml", ".yml")):
        _refuse("a job file", {"--bin": bin_number, "--processor": processor, "--trust-remote-code": trust_remote_code})
        _inspect_rows(Path(path), rows, row_id, row_set, html=html, as_json=as_json)
        return
    _refuse("a prepared dataset", {"--rows": rows, "--id": row_id, "--set": row_set, "--json": as_json})
    from mmray.inspect import print_bin, write_bin_page
    from mmray.prepared import PreparedDataset

    bin_number = bin_number or 0
    prepared, console = PreparedDataset(path), Console()
    if html is None:
        print_bin(console, prepared, bin_number, processor, trust_remote_code=trust_remote_code)
    else:
        size = write_bin_page(html, prepared, bin_number, processor, trust_remote_code=trust_remote_code)
        console.print(f"{html}: bin {bin_number}, {file_size(size)}", markup=False, highlight=False, soft_wrap=True)


def _refuse(what: str, options: dict[str, Any]) -> None:
    """Raise UserError for options that have no meaning for a kind of input."""
    if used_options := [name for name, value in options.items() if value]:
        raise UserError(f"{used_options[0]} has no meaning for {what}; leave it out")


def _inspect_rows(
    job_file: Path, count: int | None, row_id: str | None, name: str | None, *, html: str | None, as_json: bool
) -> None:
    from mmray.config.job import load_job

    if (count is None) == (row_id is None):
        raise UserError("of a job file say which rows: --rows N or --id ID")
    if html is not None and as_json:
        raise UserError("give --json or --html, not both")
    job = load_job(job_file)
    from mmray.inspect.rows import JobRows, print_rows, write_rows_page

    jobs = JobRows(job)
    shown = jobs.first(count, name) if count is not None else jobs.with_id(str(row_id), name)
    if as_json:
        for row in shown:
            print(json.dumps(row.as_json(), ensure_ascii=False))
    elif html is None:
        print_rows(Console(), shown)
    else:
        size = write_rows_page(html, jobs, list(shown))
        Console().print(f"{html}: {file_size(size)}", markup=False, highlight=False, soft_wrap=True)
    for note in jobs.notes(name):
        Console(stderr=True).print(note, markup=False, highlight=False, soft_wrap=True)


@command()
def export(
    source: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run's folder, or a checkpoint in it.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to write: a path or URI.")],
    step: Annotated[
        int | None, typer.Option(metavar="STEP", help="Of which step; default: the newest whole one.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The checkpoint of the best evaluation (keep_best).")] = False,
    dtype: Annotated[
        str | None, typer.Option(metavar="bf16|fp32", help="Of the weights; default: that of training.")
    ] = None,
    job_file: Annotated[
        Path | None,
        typer.Option("--job", metavar="JOB.yaml", help="The run's job, for checkpoints that do not name their model."),
    ] = None,
    merge: Annotated[
        bool | None,
        typer.Option(
            "--merge/--adapter", help="An adapter merged into its base (default), or apart, as peft loads it."
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an earlier export in OUT.")] = False,
) -> None:
    """Write a checkpoint as a model folder that transformers loads, with its processor and a prompt's form."""
    if dtype not in (None, "bf16", "fp32"):
        raise UserError(f"--dtype {dtype}: give bf16 or fp32")
    from mmray.config.job import load_job

    settings = None if job_file is None else load_job(job_file).model
    if best and step is not None:
        raise UserError("give --step or --best, not both")
    for name, folder in (("RUN", source), ("OUT", out)):
        if not folder.strip():
            raise UserError(f"{name} is empty: name a folder")
    from mmray.run.export import export_model
    from mmray.run.export.source import SourceCheckpoint

    if best:
        source = str(SourceCheckpoint.best(source))

    exported = export_model(
        source, out, step=step, dtype=dtype, settings=settings, replace=replace,  # type: ignore[arg-type]
        form=None if merge is None else "merged" if merge else "apart",
    )  # fmt: skip
    Console().print(str(exported), markup=False, highlight=False, soft_wrap=True)


@command()
def doctor(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    overrides: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")] = [],  # noqa: B006
    json_only: Annotated[bool, typer.Option("--json", help="Findings as JSON, for programs.")] = False,
) -> None:
    """Check a job before it runs: processor, template, masks, lengths, packing, loss. Exit code 1 if anything fails."""
    from mmray.config.job import load_job

    job = load_job(job_file, overrides)
    from mmray.doctor import FirstRows, as_json, as_table, examine, has_failed

    console = Console(stderr=json_only)
    findings = []
    for entry in examine(job):
        if isinstance(entry, FirstRows):
            if not json_only:
                entry.preview(console)
        else:
            findings.append(entry)
    if json_only:
        print(as_json(findings))
    else:
        console.print(as_table(findings))
    sys.exit(1 if has_failed(findings) else 0)


def main() -> Any:
    """Run the command; a mistake of the user gives one line and exit code 2."""
    try:
        return app()
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
