"""The house: who may import whom, how many rooms there are, and the names under which users import."""

import ast
import importlib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("mmray", "pipelines", "jobs")

PUBLIC = {
    "mmray.batches": ["BatchMaker", "BatchPlan", "MicroBatch"],
    "mmray.config": ["Job", "load_job"],
    "mmray.cursor": ["Cursor"],
    "mmray.families": ["family_of", "load_processor"],
    "mmray.images": ["TilingPolicy", "cut_tiles", "image_size", "load_image", "plan_tiles"],
    "mmray.inspect": ["show_bin"],
    "mmray.masks": ["RoleBoundary", "role_keep_mask"],
    "mmray.packing": ["pack_2d"],
    "mmray.prepared": ["PreparedDataset"],
    "mmray.report": ["Run", "live_run"],
    "mmray.schedule": ["Schedule"],
    "mmray.training.trained": ["read_trained"],
}
"""What the docs and users import, wherever it lives."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}


def imported_modules(name: str) -> Iterator[str]:
    """The modules of these folders that a module imports, anywhere in it, also for type checkers alone."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in MODULES:
                    yield inner
                elif node.module in MODULES:
                    yield node.module


def package_of(module: str) -> str:
    """The innermost package; a loose module at the top of a folder stands for itself."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    return module if package in FOLDERS else package


def first_circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


IMPORTS = {name: set(imported_modules(name)) - {name} for name in MODULES}


def test_no_circle_of_modules() -> None:
    assert first_circle(IMPORTS) == []


def test_no_circle_of_packages() -> None:
    packages: dict[str, set[str]] = {}
    for name, targets in IMPORTS.items():
        packages.setdefault(package_of(name), set()).update(package_of(target) for target in targets)
    assert first_circle({name: targets - {name} for name, targets in packages.items()}) == []


def test_a_circle_would_be_seen() -> None:
    assert set(first_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def test_the_top_of_the_package_is_short() -> None:
    entries = [path.name for path in (ROOT / "mmray").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 25, sorted(entries)


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_importable(module: str) -> None:
    for name in PUBLIC[module]:
        assert hasattr(importlib.import_module(module), name)


def test_training_knows_nothing_of_runs() -> None:
    """A run trains with an engine; the engine can be used without a run."""
    for name, targets in IMPORTS.items():
        if name.startswith("mmray.training"):
            assert not [target for target in targets if target.startswith("mmray.run")], name
