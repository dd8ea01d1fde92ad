"""docs/jobs.md: the settings shown are settings of the job file."""

import re
from pathlib import Path

import yaml

from mmray.config.job import Job
from mmray.config.resources import TileCacheSettings
from mmray.run.warnings import WARNINGS_FILE

DOCS = Path(__file__).parents[3] / "docs"
TEXT = (DOCS / "jobs.md").read_text(encoding="utf-8")

LEAST = """
name: small
model: {path: org/model}
data: {train: [{files: rows.jsonl, kind: pretrain}]}
packing: {token_capacity: 4096, visual_capacity: 2048}
training: {steps: 10}
resources: {}
output: {prepared: out/prepared, run: out/run}
"""


def test_the_settings_shown_are_settings_of_a_job():
    shown = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.S)]
    seen = set()
    for parts in shown:
        content = yaml.safe_load(LEAST)
        for part, settings in parts.items():
            content[part] |= settings
            seen |= {f"{part}.{name}" for name in settings}
        Job.model_validate(content)
    assert {"data.size_cache", "resources.tile_cache"} <= seen
    assert all(name in TEXT for name in TileCacheSettings.model_fields)


def test_the_parts_are_those_of_the_job():
    table = re.findall(r"^\| `(\w+)` \|", TEXT, flags=re.M)
    assert set(table) <= set(Job.model_fields)
    assert set(table) >= {"model", "data", "images", "packing", "loss", "training", "resources", "output"}


def test_the_file_of_warnings_is_named():
    assert f"`{WARNINGS_FILE}`" in TEXT
    assert WARNINGS_FILE in (DOCS / "training.md").read_text(encoding="utf-8")
