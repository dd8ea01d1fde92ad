"""Ray's provider of nodes for tests, with a folder for each node.

Nodes that share a folder share the code that was submitted with a job: Ray unpacks it there anew for each node that
comes, under the feet of the actors that run in it. Machines of a cluster have a disk each.
"""

import functools
import tempfile
from typing import Any
from unittest import mock

from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class NodesWithFolders(FakeMultiNodeProvider):  # type: ignore[misc]
    """Starts raylets on this machine; the setting `folder` of the provider is where their folders are made."""

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        folder = tempfile.mkdtemp(dir=self.provider_config["folder"], prefix="")
        params = functools.partial(RayParams, temp_dir=folder)
        with mock.patch("ray._private.parameter.RayParams", params):
            super()._create_node_with_resources_and_labels(*arguments)
