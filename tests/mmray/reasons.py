"""The words that rows are rejected with, as they stand in the code."""

import ast
import functools
from pathlib import Path

import mmray

PACKAGE = Path(mmray.__file__).parent


@functools.cache
def reasons_in_code() -> frozenset[str]:
    """The first argument of every RowError that mmray makes; each must be a word written out."""
    calls = [
        node
        for text in (path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))
        if "RowError" in text
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "RowError"
    ]
    reasons = [call.args[0] for call in calls]
    unclear = [ast.unparse(reason) for reason in reasons if not isinstance(reason, ast.Constant)]
    assert not unclear, f"reasons that are no literal words: {unclear}"
    return frozenset(reason.value for reason in reasons)
