"""The nodes of the cluster, with their resources and labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import ray


@dataclass(frozen=True)
class Node:
    """A node of Ray.

    resources: all its resources, busy or not; socket: that of its raylet, whose path is unique within a folder.
    """

    address: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    node_id: str = ""
    socket: str = ""


def alive_nodes() -> list[Node]:
    """The nodes that are up. Ray must be connected."""
    return [
        Node(*(node[key] for key in ("NodeManagerAddress", "Resources", "Labels", "NodeID", "RayletSocketName")))
        for node in ray.nodes()
        if node["Alive"]
    ]


def labelled(nodes: Sequence[Node], labels: Mapping[str, str]) -> list[Node]:
    """The nodes that have these labels; {}: all."""
    return [node for node in nodes if labels.items() <= node.labels.items()]


def amount(nodes: Sequence[Node], resource: str) -> float:
    """How much of a resource these nodes have in all, busy or not."""
    return sum(node.resources.get(resource, 0) for node in nodes)
