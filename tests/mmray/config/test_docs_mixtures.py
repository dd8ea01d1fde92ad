"""docs/mixtures.md: its job files are good ones, and its numbers follow from its formula."""

import re
from pathlib import Path

import yaml

from mmray.config.job import Job
from tests.mmray.config.test_docs_jobs import LEAST

TEXT = (Path(__file__).parents[3] / "docs/mixtures.md").read_text(encoding="utf-8")


def test_the_settings_shown_are_settings_of_a_job() -> None:
    blocks = [block for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", TEXT, flags=re.M) if "mixture:\n" in block]
    assert len(blocks) == 2
    for block in blocks:
        settings = yaml.safe_load(block)
        job = Job.model_validate(yaml.safe_load(LEAST) | settings)
        assert len(job.mixture) >= 2
        assert bool(job.stages) == ("stages" in settings)


def test_the_epochs_of_the_table_follow_from_the_formula() -> None:
    bins = (200_000, 20_000, 2_000)
    rows = re.findall(r"^\| (?:in proportion|square roots|equal): ([\d, ]+) \|(.*)$", TEXT, flags=re.M)
    assert len(rows) == 3
    for weights, cells in rows:
        numbers = [float(weight) for weight in weights.split(", ")]
        for weight, size, cell in zip(numbers, bins, cells.split("|")):
            share = weight / sum(numbers)
            percent, epochs = re.findall(r"([\d.]+) %, ([\d.]+) epochs", cell)[0]
            assert float(percent) == float(f"{100 * share:.{1 if '.' in percent else 0}f}")
            assert float(epochs) == float(f"{10_000 * 64 * share / size:.{1 if '.' in epochs else 0}f}")
