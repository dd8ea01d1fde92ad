"""A Ray of several logical nodes on this machine, and the jobs that run on it as processes of their own."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

# Before anything imports Ray, which reads them once.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

ROOT = Path(__file__).resolve().parents[2]

PATIENCE = 900.0
"""Seconds within which whatever is waited for must happen; a start of workers takes 25 on an idle machine."""

STORE_BYTES = 200 << 20


def wait_for(found: Callable[[], Any], what: str, seconds: float = PATIENCE, pause: float = 0.1) -> Any:
    """The first true value of `found()`. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(pause)
    return value


def kill(*processes: psutil.Process) -> None:
    """kill -9."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def titled(root: int, title: str) -> list[psutil.Process]:
    """Processes under one whose title, or command, holds `title`; the oldest first."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=psutil.Process.create_time)


@dataclass(frozen=True)
class OneMachine:
    """A Ray that others started, as far as runs need it. pid: of its head."""

    pid: int
    address: str

    def processes(self, title: str) -> list[psutil.Process]:
        """As `Machines.processes`."""
        return titled(self.pid, title)


class Machines:
    """Nodes that come and go; each is a raylet with workers of its own."""

    def __init__(self, head_cpus: int, store_bytes: int = STORE_BYTES) -> None:
        from ray.cluster_utils import Cluster

        self._store_bytes = store_bytes
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": head_cpus, "object_store_memory": store_bytes, "include_dashboard": False,
            },
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add_node(self, cpus: int) -> Any:
        """One more machine."""
        return self._cluster.add_node(num_cpus=cpus, object_store_memory=self._store_bytes)

    def kill_node(self, node: Any) -> None:
        """A machine that is gone at once: its raylet and all its workers."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        kill(*self._family(raylet))
        self._cluster.remove_node(node, allow_graceful=False)

    def announce_end(self, node: Any, seconds: float) -> None:
        """Tell Ray that a spot machine will be taken away in so many seconds."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        GcsClient(address=self.address).drain_node(node.node_id, reason, "spot machine", deadline)

    def processes(self, title: str) -> list[psutil.Process]:
        """Workers of Ray, on all nodes, whose process title holds `title`; the oldest first."""
        nodes = [self._cluster.head_node, *self._cluster.worker_nodes]
        raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
        found = [process for raylet in raylets for process in titled(raylet, title)]
        return sorted(found, key=psutil.Process.create_time)

    @staticmethod
    def _family(process: psutil.Process) -> list[psutil.Process]:
        return [*process.children(recursive=True), process]


class JobProcess:
    """`jobs/KIND.py JOB` as a person starts it, its output in a file. address: None for a Ray of its own."""

    def __init__(self, kind: str, job: dict[str, Any], folder: Path, address: str | None, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "job.yaml"
        file.write_text(yaml.safe_dump(job))
        self.log = folder / f"{kind}-{time.time_ns()}.log"
        command = [sys.executable, str(ROOT / "jobs" / f"{kind}.py"), str(file), *options]
        command += ["--address", address] if address else []
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, stdin=subprocess.DEVNULL,
                start_new_session=address is None,
            )  # fmt: skip

    @property
    def code(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """kill -9, and its parent's wait."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def interrupt(self, number: int = signal.SIGINT) -> int:
        """Ctrl-C, or another signal that asks it to end; its exit status."""
        self._process.send_signal(number)
        return self.wait()

    def interrupt_group(self, number: int) -> int:
        """A signal to all processes of its group, where it has one of its own (without an address); its exit status."""
        os.killpg(self._process.pid, number)
        return self.wait()

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit status when it has ended."""
        return self._process.wait(seconds)

    def succeed(self, seconds: float = PATIENCE) -> Self:
        """Wait for a good end. Raises RuntimeError with the end of its output for another."""
        if self.wait(seconds) != 0:
            raise RuntimeError(f"{self.log} ended with {self.code}:\n{self.output[-4000:]}")
        return self


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: float) -> Iterator[Path | None]:
    """A file system of that size at `folder`; None where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    size = f"size={int(megabytes * 1024)}k"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Change a mounted `small_disk`: "size=100m", "ro"."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
