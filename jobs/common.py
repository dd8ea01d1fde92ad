"""What every job does at its edges: connect to Ray, end on a signal, one line for an error."""

import logging
import os
import re
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import ray
import ray._private.services as ray_services
import ray.data  # sets the level of its own loggers when imported
from ray.exceptions import AuthenticationError
from rich.console import Console
from transformers.utils import logging as transformers_logging

from jobs.command_line import as_ctrl_c
from mmray.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
REACH_SECONDS = 10

console = Console(stderr=False)
log = logging.getLogger("mmray")

WORKER_ENVIRONMENT = {
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of every process of a job."""

RAY_CORE_LEVEL = "RAY_BACKEND_LOG_LEVEL"
"""Environment variable by which a process of Ray decides what its C++ part prints."""

QUIET_LOGGERS = ("ray.data", "ray.train", "ray._private.authentication", "transformers")
"""Libraries whose notes are left out of a job's output; Ray keeps all of them in its session folder."""


def connect(address: str | None, *, cpus: int, verbose: bool = False) -> bool:
    """Join the cluster at `address` (or RAY_ADDRESS, which `ray job submit` sets), or start Ray on this machine.

    Returns whether it has joined one. Raises UserError where none answers, or its Ray is of another version.

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
        transformers_logging.disable_progress_bar()
    if ray.is_initialized():
        return False
    ends_softly = signal.getsignal(signal.SIGTERM) is as_ctrl_c
    options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
    }
    if not in_submitted_job():  # that has its environment from jobs/runtime_env.yaml, and the checkout on its path
        paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**WORKER_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}
        if address and _is_host_and_port(address):
            # Ray Train's actors ask about each other at this address; without it, at one that they look for on the
            # machine, which may be of a cluster that knows nothing of them, or that has ended.
            environment["RAY_ADDRESS"] = address
        options["runtime_env"] = {"env_vars": environment}
    with _core_tells_its_end() if not verbose and RAY_CORE_LEVEL not in os.environ else nullcontext():
        if address:
            _join(address, options)
        else:
            _start_here(local_cpus(cpus), options)
    if ends_softly:  # Ray has set handlers of its own, which print a stack and abort
        signal.signal(signal.SIGTERM, as_ctrl_c)
    return bool(address)


def local_cpus(least: int) -> int:
    """Logical CPUs of a Ray that is started on this machine."""
    return max(least, os.cpu_count() or 1)


def _join(address: str, options: dict[str, Any]) -> None:
    _reach(address)
    try:
        ray.init(address=address, **options)
    except AuthenticationError as error:  # told before anything is asked
        raise UserError(
            "RAY_AUTH_MODE is token, and there is no token here; copy ~/.ray/auth_token of the cluster's head to this "
            "machine"
        ) from error
    except ConnectionError as error:  # a token that is missing or another, which Ray tells on stderr alone, too
        raise UserError(
            f"no Ray at {address} lets this process in; if one runs there that was started with RAY_AUTH_MODE=token, "
            "set this here too, with the ~/.ray/auth_token of its head; else start one (ray start --head), or leave "
            "--address and RAY_ADDRESS out to run on this machine alone"
        ) from error
    except RuntimeError as error:
        versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))
        if not str(error).startswith("Version mismatch") or len(versions) != 2:
            raise
        (cluster_ray, cluster_python), (local_ray, local_python) = versions
        raise UserError(
            f"the cluster at {address} runs Ray {cluster_ray} with Python {cluster_python}, this process Ray "
            f"{local_ray} with Python {local_python}; run this where both are the same, or start the cluster from this "
            "environment"
        ) from error


def _is_host_and_port(address: str) -> bool:
    """Tells whether an address is a cluster's own, unlike `auto` and a URL."""
    return address.rpartition(":")[2].isdecimal() and "://" not in address


def _reach(address: str) -> None:
    """Raise UserError where nothing listens at a `host:port`: Ray would try for 13 minutes."""
    if _is_host_and_port(address):
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
        except OSError as error:
            raise UserError(
                f"no Ray answers at {address}; start one there (ray start --head), or leave --address and RAY_ADDRESS "
                "out to run on this machine alone"
            ) from error


def _start_here(cpus: int, options: dict[str, Any]) -> None:
    try:
        with _own_process_groups():
            ray.init("local", num_cpus=cpus, include_dashboard=False, **options)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        raise UserError(
            "Ray did not start on this machine in time. If it is busy, try again later; else its logs are in "
            "/tmp/ray/session_latest/logs"
        ) from error


@contextmanager
def _own_process_groups() -> Iterator[None]:
    """Ray's processes that are started here get process groups of their own.

    A terminal's hang-up, or a supervisor that ends a job, signals the whole group: Ray would be gone before the work
    could be saved, and this process would wait a minute for it. They end when this process does, by Ray's own doing.
    """
    with _started_processes(lambda options: options | {"process_group": 0}):
        yield


@contextmanager
def _core_tells_its_end() -> Iterator[None]:
    """Ray's C++ part in this process prints only why it ends it; those that are started here log as ever.

    Of each pool of Ray Data it would tell, as an error, that its actors cannot be restarted without their arguments,
    which Ray Data holds as long as the pool. What fails is an exception in Python too.
    """
    os.environ[RAY_CORE_LEVEL] = "fatal"  # read when this process connects, which tells that it was
    try:
        with (
            _started_processes(lambda options: options | {"env": _without(options["env"], RAY_CORE_LEVEL)}),
            _stderr_without(RAY_CORE_LEVEL),
        ):
            yield
    finally:
        del os.environ[RAY_CORE_LEVEL]


@contextmanager
def _stderr_without(text: str) -> Iterator[None]:
    """Leaves lines with a text out of what this process, with its C++ part, writes to stderr in the meantime; the
    others come at the end."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            written.seek(0)
            os.write(2, b"".join(line for line in written if text.encode() not in line))


def _without(environment: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key != name}


@contextmanager
def _started_processes(changed: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[None]:
    """Changes the options with which Ray starts its processes. changed: options of `Popen` to others."""
    services: Any = ray_services
    start = services.ConsolePopen
    services.ConsolePopen = lambda command, **options: start(command, **changed(options))
    try:
        yield
    finally:
        services.ConsolePopen = start


def in_submitted_job() -> bool:
    """True in a process that `ray job submit` started."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


class _ToStderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at the moment: a live progress bar puts itself there, and lines above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr
