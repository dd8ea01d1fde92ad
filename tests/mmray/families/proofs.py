"""A plugin of pytest: what the tests marked `proves(claim)` show becomes the table in docs/families.md.

Tests may run in several processes (pytest-xdist): what a test shows travels in its report, and the process that prints
the summary puts the reports together.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

_PROVES = "proves"
_MESSAGE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Table(config))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    claim, callspec = item.get_closest_marker("proves"), getattr(item, "callspec", None)
    if claim and callspec and (report.when == "call" or report.outcome != "passed"):
        from tests.mmray.families.zoo import ZOO

        (name,) = [value for value in callspec.params.values() if value in ZOO]
        report.user_properties.append((_PROVES, (name, claim.args[0])))
    return report


class _Table:
    """Gathers the outcomes of one session; at its end compares them with the docs, or writes them there."""

    def __init__(self, config: pytest.Config) -> None:
        self._outcomes: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for key, value in report.user_properties:
            if key == _PROVES:
                name, claim = value
                self._outcomes[name, claim].append(report.outcome)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self._outcomes or hasattr(self._config, "workerinput"):  # a process that only runs tests
            return
        from tests.mmray.families import table
        from tests.mmray.families.zoo import ZOO

        expected = {(name, claim) for name in ZOO for claim in table.CLAIMS if claim != "masks" or ZOO[name].turns}
        if not expected <= self._outcomes.keys():
            return  # only some of the tests ran
        rendered = table.render(self._outcomes)
        if self._config.getoption("write_family_table"):
            table.write(rendered)
        elif rendered != table.in_docs():
            self._config.stash[_MESSAGE] = (
                f"{table.DOCS.name} is not what the tests of families show. Write it anew: "
                "pytest tests/mmray/families --write-family-table"
            )
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if message := self._config.stash.get(_MESSAGE, None):
            terminalreporter.write_line(message, red=True)
