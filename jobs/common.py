"""What every job does at its edges: connect to Ray, check that the cluster is large enough, one line for an error."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

import ray
import ray.data  # sets the level of its own loggers when imported
import typer
from rich.console import Console

from mmray.config import Job
from mmray.errors import UserError
from pipelines.dataset import cluster_amount

ROOT = Path(__file__).resolve().parent.parent
EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130

console = Console(stderr=False)
log = logging.getLogger("mmray")

WORKER_ENVIRONMENT = {
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of every process of a job."""

QUIET_LOGGERS = ("ray.data", "ray.train", "ray._private.authentication", "transformers")
"""Libraries whose notes are left out of a job's output; Ray keeps all of them in its session folder."""


def connect(address: str | None, *, cpus: int, verbose: bool = False) -> None:
    """Join the cluster at `address` (or RAY_ADDRESS, which `ray job submit` sets), or start Ray on this machine.

    cpus: logical CPUs a Ray started here shall have at least, so that small machines can run every pool of the job.
    verbose: show what workers and libraries print, too.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address.startswith("http"):
        raise UserError(
            f"{address} is the address for `ray job submit`; to join the cluster from one of its nodes use "
            "--address auto, to run here unset RAY_ADDRESS"
        )
    os.environ.update({key: os.environ.get(key, value) for key, value in WORKER_ENVIRONMENT.items()})
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_ToStderr()])
    log.setLevel(logging.INFO)
    if not verbose:
        warnings.filterwarnings("ignore")
        for name in QUIET_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    ends_softly = signal.getsignal(signal.SIGTERM) is _as_ctrl_c
    options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
    }
    if not _in_submitted_job():  # that has its environment from jobs/runtime_env.yaml, and the checkout on its path
        paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
        options["runtime_env"] = {"env_vars": {**WORKER_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}}
    if address:
        ray.init(address=address, **options)
    else:
        ray.init("local", num_cpus=max(cpus, os.cpu_count() or 1), include_dashboard=False, **options)
    if ends_softly:  # Ray has set handlers of its own, which print a stack and abort
        signal.signal(signal.SIGTERM, _as_ctrl_c)


def check_outputs(job: Job) -> None:
    """Raise UserError when results would go into Ray's copy of a submitted checkout, which vanishes with the job."""
    here = Path.cwd()
    cache = job.resources.tile_cache
    shared, own = "that all nodes share", "on each node's own disk"
    for name, path, where in (
        ("output.prepared", job.output.prepared, shared),
        ("output.run", job.output.run, shared),
        ("data.size_cache", job.data.size_cache, shared),
        ("resources.tile_cache.folder", cache and cache.folder, own),
    ):
        if _in_submitted_job() and path and Path(path).is_relative_to(here):
            raise UserError(
                f"{name} {str(Path(path).relative_to(here))!r} is relative: under `ray job submit` that is a "
                f"temporary copy of the checkout. Give an absolute path {where}"
            )


def _in_submitted_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def prepare_cpus(job: Job) -> int:
    """CPUs that preparing wants when all its actors run."""
    return job.resources.encode_actors + job.resources.pack_actors


def uses_gpus(job: Job) -> bool:
    """Whether training takes GPUs: as the job says, else where the cluster has any. Ray must be connected."""
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    if job.resources.use_gpu and not has_gpus and not job.resources.autoscaling:
        raise UserError("resources.use_gpu is true but the cluster has no GPU; add GPU nodes or set it to false")
    return has_gpus if job.resources.use_gpu is None else job.resources.use_gpu


def worker_needs(job: Job, gpus: bool) -> dict[str, float]:
    """What one training worker takes."""
    resources = job.resources
    return {"CPU": resources.cpus_per_worker} | ({"GPU": 1 - resources.gpu_share} if gpus else {})


def train_needs(job: Job, gpus: bool) -> dict[str, float]:
    """CPUs and GPUs that all workers, or the fewest of an elastic run, and all actors of a training take together."""
    resources = job.resources
    cpus = resources.min_workers * resources.cpus_per_worker + resources.render_actors
    if not gpus:
        return {"CPU": cpus + resources.mask_actors}
    shares = resources.mask_actors * resources.gpu_share
    return {"CPU": cpus, "GPU": resources.min_workers * (1 - resources.gpu_share) + shares}


def check_cluster(job: Job, needs: dict[str, float], what: str, labels: Mapping[str, str]) -> None:
    """Raise UserError when the cluster cannot run all of a job's pools at once: it would wait forever.

    labels: of the nodes that count; {}: all. With `resources.autoscaling` only a line tells of it: nodes will come.
    """
    have = {name: cluster_amount(name, labels) for name in needs}
    short = {name: amount for name, amount in needs.items() if have.get(name, 0) + 1e-6 < amount}
    if not short:
        return
    lacks = ", ".join(f"{amount:g} {name} (it has {have.get(name, 0):g})" for name, amount in short.items())
    if labels:
        lacks += " on nodes labelled " + ", ".join(f"{key}: {value}" for key, value in labels.items())
    if job.resources.autoscaling:
        log.warning("%s needs %s; waiting for the cluster to grow", what, lacks)
        return
    raise UserError(
        f"{what} needs {lacks}. Lower the pools under `resources`, add nodes, or set resources.autoscaling where the "
        "cluster grows by itself; on one machine a Ray can have more logical CPUs than cores: "
        "ray start --head --num-cpus=N"
    )


def run_main(main: Callable[..., None]) -> NoReturn:
    """Run a job's command line: a mistake of the user is one red line and exit code 2, without a stack trace.

    SIGTERM, which `ray job stop` sends, ends it as Ctrl-C does.
    """
    signal.signal(signal.SIGTERM, _as_ctrl_c)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_escaped(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(EXIT_USER_ERROR)
    except Exception as error:
        usage = getattr(error, "show", None)  # click's own messages about the command line
        if usage is None:
            raise
        usage()
        sys.exit(EXIT_USER_ERROR)
    if code == EXIT_INTERRUPTED:  # what typer makes of Ctrl-C
        Console(stderr=True).print("interrupted; the same command continues")
    sys.exit(code if isinstance(code, int) else 0)


class _ToStderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at the moment: a live progress bar puts itself there, and lines above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def _as_ctrl_c(_: int, frame: FrameType | None) -> None:
    """Handle a signal as whoever handles Ctrl-C now would: Ray Train first ends its workers.

    SIGINT itself would not arrive in a submitted job, where Ray blocks it.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
