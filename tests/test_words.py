"""The words of the code: no names that hide what they hold, no docstring that needs its neighbours to be understood.

What still has them is listed in `words_remaining.txt`, one place a line; a place that is mended is taken off the list:
`python -m tests.test_words` writes it anew.
"""

import ast
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REMAINING = Path(__file__).with_name("words_remaining.txt")

PRIVATE_WORDS = {"each", "found", "given", "own", "together", "told"}
"""Names of values that say nothing of what they hold."""

HANGING = re.compile(
    r"(Of|The same|Those|That|These|This one|It|They|And|But|Nor|Also|As (for|of|before)|So|Then|Whose|Whether|What|"
    r"Which|Where|When|For the|From|Not|Nothing|Has to|Beside)\b"
)
"""Beginnings of a first sentence that cannot stand alone."""


def values(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that holds a value: variables, parameters, loop variables; with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def docstrings(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The docstrings of classes and functions, and those under public values and settings; with whose they are."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield node.name, text
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for before, after in itertools.pairwise(body):
            if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
                continue
            target = before.targets[0] if isinstance(before, ast.Assign) else getattr(before, "target", None)
            if isinstance(target, ast.Name) and isinstance(after.value.value, str):
                yield target.id, after.value.value


def places() -> Counter[str]:
    """Where the words are that should go, by file and name: lines move too often to be named."""
    counted: Counter[str] = Counter()
    for folder in ("mmray", "pipelines", "jobs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            name = path.relative_to(ROOT).as_posix()
            counted.update(f"{name}: a value is called {value}" for value, _ in values(tree) if value in PRIVATE_WORDS)
            counted.update(f"{name}: docstring of {whose}" for whose, text in docstrings(tree) if HANGING.match(text))
    return counted


def lines() -> list[str]:
    return sorted(f"{place} ({count})" for place, count in places().items())


def test_no_new_private_words() -> None:
    assert lines() == REMAINING.read_text(encoding="utf-8").splitlines()


def test_a_private_word_and_a_hanging_docstring_would_be_seen() -> None:
    tree = ast.parse('def f(own):\n    """Of a step: its bins."""\n    for each in own:\n        found = each\n')
    assert [value for value, _ in values(tree) if value in PRIVATE_WORDS] == ["own", "each", "found"]
    assert [whose for whose, text in docstrings(tree) if HANGING.match(text)] == ["f"]
    tree = ast.parse('class Settings:\n    lr: float = 1.0\n    """The same as before."""\n')
    assert [whose for whose, text in docstrings(tree) if HANGING.match(text)] == ["lr"]


if __name__ == "__main__":
    REMAINING.write_text("".join(f"{line}\n" for line in lines()), encoding="utf-8")
