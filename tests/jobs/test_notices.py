"""A spot notice arrives: from a metadata service that answers as the clouds document theirs, to a node that drains."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
import yaml
from ray.train.v2.api.preemption import PreemptionInfo
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.notices import AmazonMetadata, GoogleMetadata, Machine, Notice
from jobs.preemption import Preemption
from pipelines.nodes import alive_nodes
from tests.conftest import ROOT, START_SECONDS, RayHead, end_processes
from tests.jobs.test_probe import joined_node


class Service:
    """A metadata service on loopback.

    pages: what it holds, by path; what is not there is a 404.
    tokens: those it has given, of which it accepts the newest (AWS).
    """

    def __init__(self) -> None:
        self.pages: dict[str, str] = {}
        self.tokens: list[str] = []
        self.address = ""

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        """Status and text of an answer. AWS wants a token, Google a header."""
        if (method, path) == ("PUT", "/latest/api/token"):
            if not 1 <= int(headers.get("x-aws-ec2-metadata-token-ttl-seconds", 0)) <= 21600:
                return 400, "Bad Request"
            self.tokens.append(f"token-{len(self.tokens)}")
            return 200, self.tokens[-1]
        if path.startswith("/latest/") and headers.get("x-aws-ec2-metadata-token") not in self.tokens[-1:]:
            return 401, "Unauthorized"
        if path.startswith("/computeMetadata/") and headers.get("metadata-flavor") != "Google":
            return 403, "Forbidden"
        return (200, self.pages[path]) if path in self.pages else (404, "Not Found")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A service that this process, and those it starts, ask. What goes to a proxy, arrives nowhere."""
    held = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = held.answer(
                self.command, self.path, {key.lower(): value for key, value in self.headers.items()}
            )
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    held.address = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{held.address}/")
    monkeypatch.setenv("GCE_METADATA_HOST", held.address)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    yield held
    server.shutdown()
    server.server_close()


ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
GOOGLE = "/computeMetadata/v1/instance/"


def test_aws_tells_a_risk_then_an_end(service: Service) -> None:
    metadata = AmazonMetadata()
    assert metadata.notice() is None
    service.pages[REBALANCE] = json.dumps({"noticeTime": "2026-11-30T18:36:00Z"})
    assert metadata.notice() == Notice("spot machine: at risk since 2026-11-30T18:36:00Z", None)
    service.pages[ACTION] = json.dumps({"action": "terminate", "time": "2026-11-30T18:42:00Z"})
    end = datetime(2026, 11, 30, 18, 42, tzinfo=UTC).timestamp()
    assert metadata.notice() == Notice("spot machine: terminate at 2026-11-30T18:42:00Z", end)
    assert len(service.tokens) == 1


def test_a_token_of_aws_that_has_run_out_is_renewed(service: Service) -> None:
    metadata = AmazonMetadata()
    metadata.notice()
    service.tokens.append("of another process")
    assert metadata.notice() is None
    assert len(service.tokens) == 3


def test_google_tells_a_preemption_and_maintenance_without_their_times(service: Service) -> None:
    metadata = GoogleMetadata()
    service.pages |= {f"{GOOGLE}preempted": "FALSE", f"{GOOGLE}maintenance-event": "NONE"}
    assert metadata.notice() is None
    service.pages[f"{GOOGLE}maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    assert metadata.notice() is None
    before = time.time()
    service.pages[f"{GOOGLE}maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    maintenance = metadata.notice()
    assert maintenance is not None
    assert maintenance.end is not None
    assert before + 3600 <= maintenance.end <= time.time() + 3600
    assert metadata.notice() == maintenance, "asked again, it is the same notice"
    service.pages[f"{GOOGLE}preempted"] = "TRUE"
    for seconds, metadata in ((30, GoogleMetadata()), (120, GoogleMetadata(120))):
        preempted = metadata.notice()
        assert preempted is not None
        assert preempted.end is not None
        assert before + seconds <= preempted.end <= time.time() + seconds


@contextlib.contextmanager
def started_as_in(cluster: str, head: RayHead, log: Path) -> Iterator[None]:
    """The command of a cluster's file that starts `jobs.notices` beside a node, here at 127.0.0.5."""
    command = yaml.safe_load((ROOT / cluster).read_text())["worker_start_ray_commands"][-1]
    host, port = head.address.split(":")
    command = command.replace("/home/ray/mmray", str(ROOT)).replace("$RAY_HEAD_IP:6379", f"$RAY_HEAD_IP:{port}")
    command = command.replace("/tmp/notices", f"{log.parent}/notices")
    command = command.replace(">>", "--node-ip-address=127.0.0.5 >>")
    environment = os.environ | head.environment | {"RAY_HEAD_IP": host}
    subprocess.run(["bash", "-c", f"true && ({command})"], check=True, env=environment)
    deadline = time.monotonic() + START_SECONDS
    while not (started := processes_with(f"{log.parent}/notices.lock")):  # the command goes on by itself
        assert time.monotonic() < deadline
        time.sleep(0.2)
    try:
        yield
    finally:
        for pid in started:
            end_processes(pid)


def processes_with(word: str) -> list[int]:
    """Processes with a word in their command line."""
    return [each.pid for each in psutil.process_iter(["cmdline"]) if word in (each.info["cmdline"] or [])]


@contextlib.contextmanager
def left(head: RayHead, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """The hook of a pod that ends, with its node at 127.0.0.5."""
    command = [sys.executable, "-m", "jobs.notices", "now", "--node-ip-address=127.0.0.5", "--seconds=2000"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | head.environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        end_processes(process.pid)


def wait_until(holds: Callable[[], object], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not holds():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@ray.remote(num_cpus=1)
class Busy:
    """Keeps a node busy: an idle one that is drained ends at once."""

    def ready(self) -> None: ...


def draining_nodes() -> dict[str, int]:
    """Deadlines in milliseconds since 1970, 0 for none, by node, as Ray Train asks for them."""
    return dict(ray._private.state.state.get_draining_nodes())


def test_a_notice_without_the_token_of_the_cluster_is_one_line(tmp_path: Path) -> None:
    """Ray's client would abort the process."""
    environment = os.environ | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ""}
    command = [sys.executable, "-m", "jobs.notices", "now", "--address", "127.0.0.1:1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the head at 127.0.0.1:1 does not answer this process; check the address, and")


def test_a_notice_drains_the_node_of_its_machine_alone(ray_head: RayHead, service: Service, tmp_path: Path) -> None:
    """A risk drains without a deadline, an end with that end; a pod's end, too; the node then ends when it is idle."""
    log = tmp_path / "notices.log"
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        options = ("--node-ip-address=127.0.0.5", f"--temp-dir={folder}")
        stack.enter_context(joined_node(ray_head, tmp_path / "node.log", *options))
        (node,) = (node.node_id for node in alive_nodes() if node.address == "127.0.0.5")
        busy = Busy.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        ray.get(busy.ready.remote())
        service.pages[ACTION] = "not JSON: this answer cannot be used"
        stack.enter_context(started_as_in("cluster.yaml", ray_head, log))
        wait_until(lambda: "no notices can be passed on" in log.read_text(), log)
        assert draining_nodes() == {}
        del service.pages[ACTION]
        service.pages[REBALANCE] = json.dumps({"noticeTime": "2026-11-30T18:36:00Z"})
        wait_until(lambda: draining_nodes() == {node: 0}, log)
        end = datetime.fromtimestamp(int(time.time()) + 3000, UTC)
        service.pages[ACTION] = json.dumps({"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")})
        wait_until(lambda: draining_nodes() == {node: int(end.timestamp() * 1000)}, log)
        lines = log.read_text().splitlines()
        assert [line.split(" ", 2)[2].split(":")[0] for line in lines] == [
            "no notices can be passed on until this is over", "spot machine", "spot machine",
        ]  # fmt: skip
        hook = stack.enter_context(left(ray_head, tmp_path / "hook.log"))
        wait_until(lambda: draining_nodes()[node] < end.timestamp() * 1000, tmp_path / "hook.log")
        assert hook.poll() is None, "it waits for the actor"
        ray.kill(busy)
        assert hook.wait(START_SECONDS) == 0, (tmp_path / "hook.log").read_text()
        assert f"node {node} is drained, and ends within 2000 s" in (tmp_path / "hook.log").read_text()
        assert node not in [node.node_id for node in alive_nodes()]
    (head,) = alive_nodes()
    assert Machine(ray_head.address, head.address).nodes() == [], "a head is not drained"


class FakeLoop:
    """What `Preemption` uses of a run's loop: it notes the notices and saves."""

    step = 7

    def __init__(self) -> None:
        self.run = self
        self.notes: list[dict[str, object]] = []
        self.saved = 0

    def note(self, event: str, step: int, **content: object) -> None:
        assert (event, step) == ("preemption", 7)
        self.notes.append(content)

    def save(self, wait: bool) -> None:
        assert wait
        self.saved += 1


def test_a_risk_and_then_an_end_each_get_a_checkpoint_and_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    notices: list[PreemptionInfo | None] = []
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: notices[-1])
    callback, loop = Preemption(), FakeLoop()
    step = SimpleNamespace(step=SimpleNamespace(flags={callback.name: [1, 0]}))

    def saved_on(info: PreemptionInfo | None) -> int:
        notices.append(info)
        before = loop.saved
        callback.after_step(loop, step)  # type: ignore[arg-type]
        return loop.saved - before

    risk = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0]})
    end = PreemptionInfo(deadline_ms=1_796_000_000_000, preempted_node_to_ranks={"a": [0]})
    both = PreemptionInfo(deadline_ms=1_796_000_000_000, preempted_node_to_ranks={"a": [0], "b": [1]})
    assert [saved_on(info) for info in (None, risk, risk, end, end, both, both)] == [0, 1, 0, 1, 0, 1, 0]
    assert loop.notes[0] == {"nodes": ["a"], "deadline": None}
    assert loop.notes[1] == {"nodes": ["a"], "deadline": "2026-11-30T00:53:20+00:00"}
