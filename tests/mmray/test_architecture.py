"""The rooms: the library knows neither Ray nor the rooms that use it, and what is defined once is defined once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mmray

PACKAGE = Path(mmray.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

IMPORT_ALL = """
import importlib, pkgutil, sys

ABSENT = ("ray", "pipelines", "jobs", "deepspeed")
sys.modules |= dict.fromkeys(ABSENT)  # importing them raises ModuleNotFoundError
import mmray
for module in pkgutil.walk_packages(mmray.__path__, "mmray."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        print(module.name, error.name)
print(len([name for name in sys.modules if name.startswith("mmray.")]))
"""


def test_the_library_is_imported_whole_where_there_is_no_ray(tmp_path):
    """Nor the other rooms; and without DeepSpeed all but what trains with it."""
    environment = {"PYTHONPATH": str(PACKAGE.parent), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    *failed, imported = done.stdout.splitlines()
    assert int(imported) > 40
    assert set(failed) <= {"mmray.training.engine deepspeed"}


def imported_packages(path):
    """The top packages that a module imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_of_the_library_imports_ray(path):
    assert not {"ray", "pipelines", "jobs", "tests"} & set(imported_packages(path))


def test_the_ignore_index_is_written_once():
    places = [
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub)
        and isinstance(node.operand, ast.Constant)
        and node.operand.value == 100
    ]
    assert places == ["loss/rules.py"]


@pytest.mark.parametrize("path", [path for path in MODULES if path.read_text()], ids=lambda path: path.stem)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
