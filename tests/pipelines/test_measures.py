"""What is declared for Prometheus, and the dashboard that shows it."""

import json
import re
import timeit
from pathlib import Path
from typing import Any

import pytest

from pipelines import measures
from pipelines.measures import MEASURES, StageClock, clocked

DASHBOARD = Path(__file__).resolve().parents[2] / "monitoring" / "grafana_dashboard.json"
EXPORTED = {name: measure for measure in MEASURES for name in measure.exported}
WORDS = {"sum", "avg", "max", "by", "rate", "increase", "histogram_quantile", "le"}


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]


def test_names_are_prometheus_names_and_of_mmray_alone() -> None:
    assert len({measure.name for measure in MEASURES}) == len(MEASURES) > 20
    for measure in MEASURES:
        assert re.fullmatch(r"mmray_[a-z_]+[a-z]", measure.name)
        assert not measure.name.endswith("_total"), "Prometheus puts it there"
        assert bool(measure.boundaries) == (measure.kind == "histogram")
        assert measure.meaning


def test_the_dashboard_names_only_what_is_exported_with_its_tags_and_shows_all_of_it() -> None:
    shown = set()
    for expression in expressions():
        outside = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", expression)
        names = set(re.findall(r"[a-zA-Z_][a-zA-Z0-9_]*", outside))
        found = {name for name in names if name.startswith("ray_")}
        assert found, expression
        assert found <= set(EXPORTED), expression
        tags = {"job_name", *(tag for name in found for tag in EXPORTED[name].tags)}
        assert names - found - WORDS <= tags, expression
        assert re.findall(r"\{([^}]*)\}", expression) == ['job_name=~"$job"'] * len(re.findall("ray_mmray", expression))
        shown |= {EXPORTED[name].name for name in found}
    assert shown == {measure.name for measure in MEASURES}


def test_the_dashboard_is_what_grafana_imports() -> None:
    board = dashboard()
    assert (board["title"], board["uid"]) == ("mmray", "mmray")
    assert board["schemaVersion"] >= 36
    assert board.get("id") is None, "an id of one Grafana is none of another"
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert variables["job"]["datasource"]["uid"] == "${datasource}"
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        taken = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in taken) < 24
        assert not taken & cells, panel["title"]
        cells |= taken
        if panel["type"] == "row":
            continue
        assert panel["type"] in {"timeseries", "stat"}
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert [target["refId"] for target in panel["targets"]] == ["A", "B"][: len(panel["targets"])]
        assert all(target["legendFormat"] for target in panel["targets"])


def test_a_stage_times_its_work_and_its_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    told: list[tuple[str, float, str]] = []
    monkeypatch.setattr(measures.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        measures, "add", lambda measure, value, **tags: told.append((measure.name, value, tags["stage"]))
    )

    class Actor:
        clock = StageClock("encode", "pages")

        @clocked
        def __call__(self, seconds: float) -> float:
            now[0] += seconds
            if seconds > 4:
                raise ValueError("too long")
            return seconds

    actor = Actor()
    assert actor(2.0) == 2.0
    now[0] += 3.0
    with pytest.raises(ValueError, match="too long"):
        actor(5.0)
    now[0] += 1.0
    actor(0.5)
    busy, wait = measures.STAGE_BUSY_SECONDS.name, measures.STAGE_WAIT_SECONDS.name
    assert told == [
        *((busy, 2.0, "encode"), (wait, 3.0, "encode"), (busy, 5.0, "encode")),
        *((wait, 1.0, "encode"), (busy, 0.5, "encode")),
    ]


def test_telling_costs_next_to_nothing() -> None:
    seconds = min(timeit.repeat(lambda: measures.add(measures.STEPS, 1, job_name="cost"), number=1000, repeat=5)) / 1000
    assert seconds < 1e-3  # 3e-6 on an idle machine; a step tells some twenty
