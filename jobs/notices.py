"""Passes on to Ray that this machine will be taken away: `python -m jobs.notices aws`, beside `ray start` on a node.

A cloud tells the end of a spot machine to that machine alone, in its metadata service: AWS two minutes before, Google
30 seconds before. This process asks every two seconds and drains the node. Ray then starts nothing new there, Ray Train
passes the notice on to the ranks, and they write a checkpoint (`jobs/preemption.py`).

Kubernetes tells it by ending the pod. There `python -m jobs.notices now` is the pod's preStop hook, which drains the
node and returns when its Ray has ended, or when the time is over.
"""

import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn, Protocol
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jobs  # noqa: F401  (says what is missing)

# isort: split
import ray._private.services as ray_services
import typer
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated import autoscaler_pb2, gcs_pb2
from ray.exceptions import RayError

from jobs.command_line import run_main
from mmray.errors import UserError

ASK_SECONDS = 2.0
ANSWER_SECONDS = 5.0
TOKEN_SECONDS = 21600
GOOGLE_PREEMPTION_SECONDS = 30.0
"""Seconds from the notice to the end of a spot machine of Compute Engine without a
`preemptionNoticeDuration`, as Google documents them."""
GOOGLE_MAINTENANCE_SECONDS = 3600.0
"""Seconds from the notice of a host's maintenance to the end of a machine of Compute Engine that cannot move to another
host, as Google documents them for those with GPUs."""
ALIVE: int = gcs_pb2.GcsNodeInfo.GcsNodeState.ALIVE  # type: ignore[attr-defined]
PREEMPTION: int = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]
log = logging.getLogger("mmray.notices")


class Source(StrEnum):
    """A place that notices come from."""

    AWS = "aws"
    GOOGLE = "gcp"
    NOW = "now"


@dataclass(frozen=True)
class Notice:
    """A notice that this machine will be taken away.

    message: what was announced, in words.
    end: when the machine ends, in seconds since 1970; None where only a raised risk was announced.
    """

    message: str
    end: float | None


class Metadata(Protocol):
    """The metadata service of a cloud."""

    def notice(self) -> Notice | None:
        """The most urgent notice that stands now. Raises OSError where the service does not answer."""


class AmazonMetadata:
    """Notices of EC2 (IMDSv2): an interruption of a spot machine, or the recommendation to leave it before that.

    Its address is that of AWS_EC2_METADATA_SERVICE_ENDPOINT, as for AWS's own tools.
    """

    def __init__(self) -> None:
        self._address = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
        self._token = ""

    def notice(self) -> Notice | None:
        """The interruption, else the recommendation, else None."""
        if action := self._read("spot/instance-action"):
            content = json.loads(action)
            return Notice(f"spot machine: {content['action']} at {content['time']}", _seconds(content["time"]))
        if recommendation := self._read("events/recommendations/rebalance"):
            return Notice(f"spot machine: at risk since {json.loads(recommendation)['noticeTime']}", None)
        return None

    def _read(self, name: str) -> str | None:
        for _ in range(2):
            try:
                headers = {"X-aws-ec2-metadata-token": self._token}
                return _read(f"{self._address}/latest/meta-data/{name}", headers)
            except HTTPError as error:
                if error.code != 401:
                    raise
            headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
            self._token = _read(f"{self._address}/latest/api/token", headers, method="PUT") or ""
        raise URLError("the metadata service accepts none of its tokens")


class GoogleMetadata:
    """Notices of Compute Engine: a preemption, or maintenance of the host that ends the machine.

    Its host is that of GCE_METADATA_HOST, as for Google's own tools.

    preemption_seconds: from the notice of a preemption to the machine's end.
    """

    def __init__(self, preemption_seconds: float = GOOGLE_PREEMPTION_SECONDS) -> None:
        self._preemption_seconds = preemption_seconds
        host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
        self._address = f"http://{host}/computeMetadata/v1/instance"
        self._announced: dict[str, float] = {}

    def notice(self) -> Notice | None:
        """The preemption, else the maintenance, else None. Their times count from when they were first seen."""
        if self._read("preempted") == "TRUE":
            return self._since("spot machine: preempted", self._preemption_seconds)
        if self._read("maintenance-event") == "TERMINATE_ON_HOST_MAINTENANCE":
            return self._since("maintenance of the host", GOOGLE_MAINTENANCE_SECONDS)
        return None

    def _read(self, name: str) -> str | None:
        return _read(f"{self._address}/{name}", {"Metadata-Flavor": "Google"})

    def _since(self, message: str, seconds: float) -> Notice:
        return Notice(message, self._announced.setdefault(message, time.time() + seconds))


def _read(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """The answer to a request, past all proxies; None where there is no such page (404)."""
    try:
        opener = build_opener(ProxyHandler({}))
        with opener.open(Request(url, headers=headers, method=method), timeout=ANSWER_SECONDS) as answer:
            return str(answer.read().decode()).strip()
    except HTTPError as error:
        if error.code == 404:
            return None
        raise


def _seconds(text: str) -> float:
    """Seconds since 1970 of a time such as 2026-11-30T18:42:00Z."""
    return datetime.fromisoformat(text).timestamp()


class Machine:
    """The nodes of a cluster that run on one machine: one, and another where Ray is started again.

    cluster: `host:port` of the head; address: the machine's own, as Ray names it. Raises UserError where the head does
    not answer, or asks for a token that is not here.
    """

    def __init__(self, cluster: str, address: str) -> None:
        try:
            ensure_token_if_auth_enabled(create_token_if_missing=False)  # for want of one the client aborts the process
            self._gcs = GcsClient(address=cluster)
        except RayError as error:
            raise UserError(
                f"the head at {cluster} does not answer this process; check the address, and where Ray was started "
                "with RAY_AUTH_MODE=token, set this here too, with the ~/.ray/auth_token of its head"
            ) from error
        self.address = address
        self._drained: set[tuple[str, Notice]] = set()

    def nodes(self) -> list[str]:
        """The ids of the nodes that are up. Raises RayError or RuntimeError where the head does not answer.

        The head itself is left out: no other node could take its part.
        """
        alive = self._gcs.get_all_node_info(timeout=ANSWER_SECONDS, state_filter=ALIVE)
        workers = [node for node in alive.values() if not node.is_head_node]
        return [node.node_id.hex() for node in workers if node.node_manager_address == self.address]

    def drain(self, notice: Notice) -> list[str]:
        """Drains the nodes that were not yet drained for this notice, and returns their ids. Raises as `nodes`, and
        RuntimeError where Ray refuses."""
        new = [node for node in self.nodes() if (node, notice) not in self._drained]
        for node in new:
            end = 0 if notice.end is None else int(notice.end * 1000)
            accepted, reason = self._gcs.drain_node(node, PREEMPTION, notice.message, end)
            if not accepted:
                raise RuntimeError(f"Ray does not drain node {node}: {reason}")
            self._drained.add((node, notice))
        return new


def watch(metadata: Metadata, machine: Machine) -> NoReturn:
    """Asks for notices and drains the machine's nodes, until the machine ends.

    An answer that does not come is told once for each outage, and the question is asked again.
    """
    is_out = False
    while True:
        try:
            if (notice := metadata.notice()) and (nodes := machine.drain(notice)):
                log.warning("%s; node %s is drained", notice.message, ", ".join(nodes))
            is_out = False
        except (OSError, ValueError, KeyError, RayError, RuntimeError) as error:
            if not is_out:
                log.warning("no notices can be passed on until this is over: %s: %s", type(error).__name__, error)
            is_out = True
        time.sleep(ASK_SECONDS)


def leave(machine: Machine, seconds: float) -> None:
    """Drains the machine's nodes and waits until they have ended, or for so many seconds."""
    end = time.time() + seconds
    if nodes := machine.drain(Notice("the pod ends", end)):
        log.warning("node %s is drained, and ends within %g s", ", ".join(nodes), seconds)
    else:
        log.warning(
            "no node of the cluster is at %s, the head excepted; give the address with which `ray start` has begun: "
            "--node-ip-address", machine.address,
        )  # fmt: skip
    while machine.nodes() and time.time() < end:
        time.sleep(1)


def main(
    source: Annotated[Source, typer.Argument(help="The cloud that is asked; `now`: drain at once, and wait.")],
    address: Annotated[
        str, typer.Option(envvar="RAY_ADDRESS", help="host:port of the cluster's head; default: RAY_ADDRESS.")
    ] = "",
    node_ip_address: Annotated[
        str, typer.Option(help="The node's address, where `ray start` was given one; default: as Ray finds it.")
    ] = "",
    seconds: Annotated[
        float,
        typer.Option(min=0, help="From the notice to the end, where the cloud does not tell it: for `gcp` and `now`."),
    ] = GOOGLE_PREEMPTION_SECONDS,
) -> None:
    """Pass on to Ray that this machine will be taken away."""
    if not address:
        raise UserError("no cluster: give --address host:port, or set RAY_ADDRESS")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    machine = Machine(address, node_ip_address or ray_services.get_node_ip_address())
    if source is Source.NOW:
        leave(machine, seconds)
    else:
        watch(AmazonMetadata() if source is Source.AWS else GoogleMetadata(seconds), machine)


if __name__ == "__main__":
    run_main(main)
