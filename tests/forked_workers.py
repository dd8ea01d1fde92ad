"""A Ray head whose workers are forked from a process that has imported Ray, DeepSpeed and transformers: a worker takes
half a second of CPU time to start, not five.

    python forked_workers.py start --head …     `ray start`, with such workers

The raylet starts this file where it would start Ray's own set-up of a worker. It hands its arguments, environment,
folder and streams to a server. The server has a process for each environment that jobs give their workers, which
imports under its variables (Ray reads some, a job's identifier among them, when it is imported); that forks a process
that goes on as Ray's worker, and ends as that does. Where a worker needs more than variables and a folder, it is
started as ever.

What is imported before is not mmray: a worker imports that as its job has it. Tests of clusters with several nodes
start Ray's own workers.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

SOCKET = "MMRAY_TESTS_WORKER_SERVER"
"""Environment variable with the path of the server's socket."""
IMPORTS = (
    "fsspec", "jinja2", "jsonschema", "matplotlib.ticker", "pandas", "PIL.Image", "pyarrow.dataset", "pyarrow.parquet",
    "pydantic.v1", "pypdfium2", "rapidfuzz.distance",
    "torch", "torch._inductor.compile_fx",  # which DeepSpeed's optimizers import in their first step
    "torch.utils.tensorboard", "transformers.modeling_utils", "transformers.processing_utils",
    "transformers.models.auto.modeling_auto", "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "transformers.models.qwen2_vl.processing_qwen2_vl",
)  # fmt: skip
"""Not numba, by which test_ingest.py knows who has imported mmray's batches."""
RAY_IMPORTS = ("ray.data", "ray.train.torch", "deepspeed")
"""After `ray`, under the environment of a job's workers."""
POLL_SECONDS = 0.1
REQUEST_BYTES = 1 << 20
"""Room for one request."""
IDLE_SECONDS = 20.0
"""How long a process that has no worker waits for a request: it takes 100 MB, and a second of CPU time to start."""


# ---- In the place of a worker ----


def stand_in() -> None:
    """Has the server fork a worker and lives as long as it does."""
    context: dict[str, Any] = {}
    words = []
    for word in sys.argv[1:]:
        name, _, value = word.partition("=")
        if name == "--serialized-runtime-env-context":
            context = json.loads(value or "{}")
        elif name != "--language":
            words.append(word)
    folder, prefix = os.getcwd(), context.get("command_prefix") or []
    if len(prefix) == 3 and (prefix[0], prefix[2]) == ("cd", "&&"):
        folder, prefix = prefix[1].strip("'"), []
    other_python = context.get("py_executable") not in (None, sys.executable)
    if prefix or other_python or context.get("override_worker_entrypoint") or not words[0].endswith("_worker.py"):
        start_as_ever()
    for name, value in (context.get("env_vars") or {}).items():
        os.environ[name] = os.path.expandvars(value)  # as Ray does
    request = {"words": words, "environment": dict(os.environ), "folder": folder}
    content = json.dumps(request).encode()
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.environ[SOCKET])
    socket.send_fds(server, [len(content).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(content)
    answers = server.makefile()
    pid = int(answers.readline())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    os._exit(int(answers.readline() or "1") & 255)


def start_as_ever() -> None:
    """Becomes Ray's own set-up of a worker."""
    import ray._private.workers

    path = os.path.join(ray._private.workers.__path__[0], "setup_worker.py")
    os.execv(sys.executable, [sys.executable, path, *sys.argv[1:]])


# ---- The server ----


def serve(listening: socket.socket) -> None:
    """Hands each request to the process of its environment, which the first such request starts."""
    parent, forking = os.getppid(), dict[str, socket.socket]()
    with selectors.DefaultSelector() as waiting:
        waiting.register(listening, selectors.EVENT_READ)
        while os.getppid() == parent:
            if not waiting.select(POLL_SECONDS):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(-1, os.WNOHANG)  # one that has ended
                continue
            client, _ = listening.accept()
            header, streams, *_ = socket.recv_fds(client, 8, 3)
            content, length = b"", int.from_bytes(header, "big")
            while len(content) < length:
                content += client.recv(length - len(content))
            request = json.loads(content)
            environment = json.dumps(request["environment"], sort_keys=True)
            message = [content], [client.fileno(), *streams]
            try:
                socket.send_fds(forking[environment], *message)
            except (KeyError, ConnectionError):  # there is none yet, or it had nothing to do and ended
                forking[environment], requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                if os.fork() == 0:
                    for connection in (listening, client, *forking.values()):
                        connection.close()
                    for number in streams:
                        os.close(number)
                    waiting.close()
                    become_worker(fork_workers(requests, request["environment"]))
                requests.close()
                socket.send_fds(forking[environment], *message)
            for number in (client.detach(), *streams):
                os.close(number)


def fork_workers(requests: socket.socket, environment: dict[str, str]) -> dict[str, Any]:
    """Forks a process for each request, in which it returns the request. Its parent ends with the server, or after
    IDLE_SECONDS without a worker."""
    set_environment(environment)
    import_ray()
    parent, clients, taking, busy = os.getppid(), dict[int, socket.socket](), True, time.monotonic()
    waiting = selectors.DefaultSelector()
    waiting.register(requests, selectors.EVENT_READ)
    while os.getppid() == parent and (taking or clients):
        ready = waiting.select(POLL_SECONDS)
        if ready or clients:
            busy = time.monotonic()
        elif time.monotonic() > busy + IDLE_SECONDS:
            requests.shutdown(socket.SHUT_RD)  # what is on its way is still read, and nothing more is sent
        for key, _ in ready:
            if key.fileobj is requests:
                content, received, *_ = socket.recv_fds(requests, REQUEST_BYTES, 4)
                if not content:
                    taking = False
                    waiting.unregister(requests)
                    continue
                connection, *streams = received
                client = socket.socket(fileno=connection)
                pid = os.fork()
                if pid == 0:
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                        os.close(stream)
                    for connected in (requests, client, *clients.values()):
                        connected.close()
                    waiting.close()
                    return json.loads(content)
                for stream in streams:
                    os.close(stream)
                client.sendall(f"{pid}\n".encode())
                clients[pid] = client
                waiting.register(client, selectors.EVENT_READ, pid)
            else:  # the stand-in was killed
                os.kill(key.data, signal.SIGKILL)
                waiting.unregister(key.fileobj)
        while clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            client = clients.pop(pid)
            if client in waiting.get_map():
                waiting.unregister(client)
            with contextlib.suppress(OSError):
                client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            client.close()
    sys.exit()


def import_ray() -> None:
    """Imports Ray with its libraries, and DeepSpeed. Raises RuntimeError where the processes that are forked then would
    make the same random identifiers, by which Ray takes two tasks for one."""
    import types

    import ray.actor

    identifier = ray.actor.ActorClassID
    # One for each class of an actor that is defined; Ray's own generator of random numbers must not have begun.
    ray.actor.ActorClassID = types.SimpleNamespace(from_random=lambda: identifier(os.urandom(identifier.size())))
    sys.modules["mlflow"] = None  # which mmray keeps DeepSpeed from importing
    import_all(RAY_IMPORTS)
    del sys.modules["mlflow"]
    ray.actor.ActorClassID = identifier
    if len({_identifier_of_a_fork() for _ in range(3)}) != 3:
        raise RuntimeError("something that is imported begins Ray's generator of random numbers")


def _identifier_of_a_fork() -> bytes:
    from ray._raylet import WorkerID

    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, WorkerID.from_random().binary())
        os._exit(0)
    os.wait()
    os.close(writing)
    with open(reading, "rb") as file:
        return file.read()


def import_all(names: tuple[str, ...]) -> None:
    """Imports modules, and has Python's garbage collection pass over what is in memory then: it would copy the pages
    of every forked process."""
    import gc
    import importlib

    for name in names:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def set_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def become_worker(request: dict[str, Any]) -> None:
    """Goes on as the worker that was asked for."""
    import runpy
    import warnings

    set_environment(request["environment"])
    os.chdir(request["folder"])
    if wanted := os.environ.get("PYTHONWARNINGS"):
        warnings.simplefilter(wanted)  # type: ignore[arg-type]
    script, *_ = sys.argv = request["words"]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [os.path.dirname(script), *paths, *(path for path in sys.path if path not in paths)]
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        import_all(IMPORTS)
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(sys.argv[2])
        listening.listen(64)
        print("ready", flush=True)
        serve(listening)
    elif sys.argv[1:2] == ["start"]:
        start()
    else:
        stand_in()


# ---- `ray start` ----


def start() -> None:
    """Starts the server, and `ray start` with this file as the set-up of workers."""
    import functools
    import inspect
    import subprocess

    import ray._private.services as services
    from ray.scripts.scripts import main as ray_main

    (folder,) = (word.partition("=")[2] for word in sys.argv if word.startswith("--temp-dir="))
    os.environ[SOCKET] = f"{folder}/workers"
    server = subprocess.Popen([sys.executable, __file__, "serve", os.environ[SOCKET]], stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    start_raylet: Callable[..., Any] = services.start_raylet

    @functools.wraps(start_raylet)
    def with_forked_workers(*arguments: Any, **options: Any) -> Any:
        bound = inspect.signature(start_raylet).bind(*arguments, **options)
        bound.arguments["setup_worker_path"] = __file__
        return start_raylet(*bound.args, **bound.kwargs)

    services.start_raylet = with_forked_workers
    ray_main()


if __name__ == "__main__":
    main()
