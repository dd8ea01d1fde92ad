"""Every member of the zoo in turn, with its processor; and the table of the docs, which the tests make."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmray.families import Family, family_of, load_processor
from tests.mmray.families import table
from tests.mmray.families.zoo import ZOO, Member


def _each(names: list[str], meaning: str) -> Any:
    """A fixture of some members in turn; skipped where the model needs what is not installed."""

    def fixture(request: pytest.FixtureRequest) -> Member:
        found = ZOO[request.param]
        if found.missing:
            pytest.skip(f"{found.name} needs {', '.join(found.missing)}")
        return found

    fixture.__doc__ = meaning
    return pytest.fixture(scope="session", params=names)(fixture)


member = _each(list(ZOO), "Each member of the zoo.")
packing = _each([name for name, each in ZOO.items() if not each.refuses], "Each that packs.")
refusing = _each([name for name, each in ZOO.items() if each.refuses], "Each that cannot pack.")
tiling = _each([name for name, each in ZOO.items() if each.tiling], "Each that takes tiles.")
packing_tiles = _each(
    [name for name, each in ZOO.items() if each.tiling and not each.refuses], "Each that packs tiles."
)
chatting = _each([name for name, each in ZOO.items() if each.turns], "Each with a chat template.")


@pytest.fixture(scope="session")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with the processor of a member, by its name."""

    @functools.cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        ZOO[name].write_processor(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def zoo_processor(zoo_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """The processor of a member, by its name. Not to be changed."""
    return functools.cache(lambda name: load_processor(zoo_folder(name)))


@pytest.fixture
def member_family(member: Member, zoo_processor: Callable[[str], Any]) -> Callable[..., Family]:
    """A function: the member's family, tiled or not."""
    return lambda tiled=False: family_of(zoo_processor(member.name), tiled=tiled, model_type=member.model_type)


# ---- The table of the docs ----


class _Table:
    """Gathers what the tests that prove a claim show."""

    def __init__(self) -> None:
        self.outcomes: table.Outcomes = defaultdict(list)
        self.message = ""


_TABLE = pytest.StashKey[_Table]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLE] = _Table()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    claim, callspec = item.get_closest_marker("proves"), getattr(item, "callspec", None)
    if claim and callspec and (report.when == "call" or report.outcome != "passed"):
        (name,) = [value for value in callspec.params.values() if value in ZOO]
        item.config.stash[_TABLE].outcomes[name, claim.args[0]].append(report.outcome)
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    found = session.config.stash[_TABLE]
    expected = {(name, claim) for name in ZOO for claim in table.CLAIMS if claim != "masks" or ZOO[name].turns}
    if not expected <= found.outcomes.keys():
        return  # only some of the tests ran
    rendered = table.render(found.outcomes)
    if session.config.getoption("write_family_table"):
        table.write(rendered)
    elif rendered != table.in_docs():
        found.message = (
            f"{table.DOCS.name} is not what the tests of families show. Write it anew: "
            "pytest tests/mmray/families --write-family-table"
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[_TABLE].message:
        terminalreporter.write_line(config.stash[_TABLE].message, red=True)
