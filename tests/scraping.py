"""What Ray's node tells Prometheus."""

import time
import urllib.request
from collections.abc import Mapping

import ray
from prometheus_client.parser import text_string_to_metric_families

from pipelines.measures import Measure

WAIT_SECONDS = 90


def scraped(measure: Measure, **tags: str) -> dict[tuple[str, ...], float]:
    """Values of one measure at the node's endpoint, by the measure's own tags; those with other `tags` left out."""
    (node,) = (node for node in ray.nodes() if node["Alive"])
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found: dict[tuple[str, ...], float] = {}
    for family in families:
        for sample in family.samples:
            if sample.name == measure.exported[0] and tags.items() <= sample.labels.items():
                key = tuple(sample.labels[tag] for tag in measure.tags)
                found[key] = found.get(key, 0) + sample.value
    return found


def wait_until_told(expected: Mapping[Measure, object], **tags: str) -> None:
    """Assert what `scraped` gives of each measure. Each process tells its node now and then, and all of them at other
    times: look again for a while."""
    deadline = time.monotonic() + WAIT_SECONDS
    while (told := {measure: scraped(measure, **tags) for measure in expected}) != expected:
        assert time.monotonic() < deadline, {measure.name: told[measure] for measure in told}
        time.sleep(0.5)
