"""The rooms: the library knows neither Ray nor the rooms that use it, and what is defined once is defined once."""

import ast
import subprocess
import sys
from pathlib import Path

import mmray

PACKAGE = Path(mmray.__file__).parent
MODULES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}

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


def imported_packages(module):
    """The top packages that a module imports anywhere in it."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else (node.module or "").split(".")[0]


def test_no_module_of_the_library_imports_ray():
    """Nor another room, nor by a relative import."""
    wrong = {"ray", "pipelines", "jobs", "tests", "."}
    assert not [name for name, module in MODULES.items() if wrong & set(imported_packages(module))]


def test_the_ignore_index_is_written_once():
    places = [
        name
        for name, module in MODULES.items()
        for node in ast.walk(module)
        if isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub)
        and isinstance(node.operand, ast.Constant)
        and node.operand.value == 100
    ]
    assert places == ["loss/rules.py"]


def test_every_module_says_what_it_is():
    assert not [name for name, module in MODULES.items() if module.body and not ast.get_docstring(module)]
