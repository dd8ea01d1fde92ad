"""The checkpoints that all tests of the export look at, written once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.mmray.families.conftest import zoo_folder  # noqa: F401  a fixture
from tests.mmray.run.export.cases import Case, join, prepare, train_cases
from tests.mmray.training.ranks import RankGroup

Trained = dict[Case, dict[str, Any]]


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory, zoo_folder: Callable[[str], Path]) -> Callable[..., Case]:  # noqa: F811
    """A function: the case of a member, a stage and a dtype, its data prepared."""
    prepared: dict[str, Path] = {}

    def make(member: str, stage: int, dtype: str) -> Case:
        if member not in prepared:
            prepared[member] = prepare(member, zoo_folder(member), tmp_path_factory.mktemp("data") / "rows")
        return Case(member, stage, dtype, zoo_folder(member), prepared[member], tmp_path_factory.mktemp("run"))

    return make


def trained(groups: dict[int, list[Case]]) -> Trained:
    """What the engine had, by case, whose checkpoint is then in its run. groups: cases by the number of ranks."""
    results = {ranks: RankGroup(ranks, train_cases, cases).results() for ranks, cases in groups.items()}
    for cases in groups.values():
        for case in cases:
            join(case.run)
    return {case: found for ranks, cases in groups.items() for case, found in zip(cases, results[ranks][0])}
