"""No module of the rooms imports itself through others, not even inside a function or for types alone."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def modules(folder: str) -> dict[str, Path]:
    """The modules below a folder, by their dotted names; packages themselves are left out."""
    paths = [path for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imported(path: Path) -> Iterator[str]:
    """Every module that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", ["jobs", "pipelines", "mmray/training", "mmray/run"])
def test_no_module_imports_itself_through_others(folder: str) -> None:
    known = modules(folder)
    assert len(known) > 3
    graph = {name: {other for other in imported(path) if other in known} for name, path in known.items()}
    assert any(graph.values())
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_training_knows_nothing_of_runs() -> None:
    """A run trains with an engine; the engine can be used without a run."""
    for name, path in modules("mmray/training").items():
        assert not [other for other in imported(path) if other.startswith("mmray.run.")], name
