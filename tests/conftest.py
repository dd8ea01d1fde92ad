"""Two Rays for all tests: each a head as `ray start` makes it, with token authentication and a dashboard.

`make test` runs three processes on two cores: two take each one half of the tests that need a Ray (`RAYS`), on one of
its own; the third begins with the others, file by file, and is joined by the first two when they are done. A Ray often
waits (for processes that start, nodes that come, a cluster's next look), and the third works meanwhile. With more Rays,
their many processes keep each other waiting.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

# Before anything imports Ray, which reads them once. Processes of one session have one token.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)}

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # a busy machine fails no test

pytest_plugins = ["tests.mmray.families.proofs", "tests.s3"]

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 600
"""Longest wait for a Ray head or node to answer: at a load of 60 on two cores it takes minutes."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-family-table", action="store_true", help="write what the tests show of families into docs/families.md"
    )
    parser.addoption(
        "--write-chat-table", action="store_true", help="write what templates do to chats into docs/chats.md"
    )


RAYS = {"tests/jobs/test_interrupts": 2, "tests/jobs/test_train_s3": 2, "tests/jobs/": 1, "tests/pipelines/": 2}
"""The Ray that tests share, by how their path begins; both are in use about as long."""


class _Scheduling(LoadScopeScheduling):
    """Tests that share a Ray, in one process; all others file by file."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::")[0]
        return next((f"Ray {number}" for begin, number in RAYS.items() if path.startswith(begin)), path)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _Scheduling(config, log)


@dataclass(frozen=True)
class RayHead:
    """A running head. environment: what a client process needs to reach and to be trusted by it."""

    pid: int
    address: str
    dashboard: str
    environment: dict[str, str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_processes(root: int) -> None:
    """Ends a process and all below it; nothing where it has ended by itself."""
    processes: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        processes += [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=5)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@contextlib.contextmanager
def running_head(
    folder: Path, *options: str, port: int | None = None, forked: bool = False, **environment: str
) -> Iterator[RayHead]:
    """`ray start --head` with its dashboard on this machine, for the time of the block. folder: for its log. forked:
    its workers are (forked_workers.py).

    Several may run: each has a folder and ports of its own. The folder's path is short, because sockets are made there.
    """
    port, dashboard_port = port or free_port(), free_port()
    session = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    everything = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | environment
    ray = [str(ROOT / "tests" / "forked_workers.py")] if forked else ["-m", "ray.scripts.scripts"]
    command = [
        *(sys.executable, *ray, "start", "--head", "--block", "--num-gpus=0"),
        *("--node-ip-address=127.0.0.1", f"--port={port}", "--dashboard-host=127.0.0.1"),
        *(f"--dashboard-port={dashboard_port}", "--disable-usage-stats"),
        *("--dashboard-agent-listen-port=0", "--ray-client-server-port", str(free_port())),
        *(f"--temp-dir={session}", "--min-worker-port=0", "--max-worker-port=0"),
        *options,
    ]
    log = folder / "head.log"
    with log.open("wb") as output:
        head = subprocess.Popen(
            command, env=everything, stdout=output, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True
        )
    address = f"127.0.0.1:{port}"
    try:
        _wait_for(port, head, log)
        _wait_for(dashboard_port, head, log)
        yield RayHead(head.pid, address, f"http://127.0.0.1:{dashboard_port}", everything | {"RAY_ADDRESS": address})
    finally:
        end_processes(head.pid)
        shutil.rmtree(session, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """A local head with 4 logical CPUs, ended with the session; the driver is connected to it."""
    import ray

    from jobs.common import connect

    options = ("--num-cpus=4", "--object-store-memory=1000000000")
    environment = {
        "RAY_metrics_report_interval_ms": "2500",
        "RAY_prestart_worker_first_driver": "0",  # workers without a job's environment would get no work
        "RAY_worker_niceness": "0",  # else other tests keep them from the cores
        "RAY_JOB_STOP_WAIT_TIME_S": "60",  # `ray job stop` kills after 3 s, in which a busy machine ends no job
    }
    with running_head(tmp_path_factory.mktemp("ray"), *options, forked=True, **environment) as head:
        connect(head.address, cpus=4)
        yield head
        ray.shutdown()


def _wait_for(port: int, head: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if head.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the Ray head did not open port {port}:\n{log.read_text()}")


@dataclass(frozen=True)
class Inputs:
    """Synthetic rows, a processor and a model configuration, as jobs name them."""

    folder: Path
    rows: dict[str, int]
    rejects: dict[str, int]

    def job(self, folder: Path, **changes: object) -> dict[str, object]:
        """The content of a small job file that writes into `folder`; changes: `section__key=value`."""
        data = self.folder / "data"
        job: dict[str, dict[str, object]] = {
            "model": {
                "config": str(self.folder / "model"), "processor": str(self.folder / "processor"), "dtype": "fp32",
            },
            "data": {
                "train": [
                    {"files": str(data / "pages.jsonl"), "kind": "pretrain"},
                    {"files": str(data / "chat.jsonl"), "kind": "chat"},
                ],
            },
            "images": {"grid": [1, 2], "tile_size": [112, 112], "labels": True},
            "packing": {"token_capacity": 512, "visual_capacity": 256, "window_rows": 64},
            "training": {
                "steps": 12, "global_batch_bins": 4, "learning_rate": 2e-3, "schedule": "constant", "zero_stage": 2,
                "checkpoint_every_steps": 5,
            },
            "resources": {"workers": 2, "encode_actors": 1},
            "output": {"prepared": str(folder / "prepared"), "run": str(folder / "run")},
        }  # fmt: skip
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                job[section][name] = value
            else:
                job[section] = value  # type: ignore[assignment]
        return {"name": "test", **job}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Forty pages with their rows, some bad on purpose, and a small Qwen2-VL."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def write_inputs(folder: Path) -> Inputs:
    """What `inputs` gives, in a folder."""
    from mmray.synthetic.models import small_config
    from mmray.synthetic.pages import write_pages
    from mmray.synthetic.processors import write_processor

    pages = write_pages(folder / "data", num_pages=40)
    processor = write_processor(folder / "processor", "qwen2_vl")
    small_config("qwen2_vl", processor).save_pretrained(folder / "model")
    rejects = {
        reason: pages.pages.expected_rejects.get(reason, 0) + pages.chat.expected_rejects.get(reason, 0)
        for reason in pages.pages.expected_rejects | pages.chat.expected_rejects
    }
    return Inputs(folder, {"pages": pages.pages.num_rows, "chat": pages.chat.num_rows}, rejects)
