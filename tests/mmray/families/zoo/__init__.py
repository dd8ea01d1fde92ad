"""A small model and processor of each kind that mmray trains: every test of families runs on every member.

Each module here has `MEMBERS`; one file a family, as in `mmray/families`.
"""

import importlib
import pkgutil

from tests.mmray.families.zoo.base import Member, Turns

ZOO: dict[str, Member] = {
    member.name: member
    for module in sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
    for member in importlib.import_module(f"{__name__}.{module}").MEMBERS
}

SAME_MODELS = {"gemma4, images seen whole", "granite_docling (fine)", "paligemma2, long samples"}
MODELS = [name for name in ZOO if name not in SAME_MODELS]
"""One member of each kind of model, for tests of its modules: the others are of the same classes, and differ in what
their tokens see and how pictures are cut."""

__all__ = ["MODELS", "ZOO", "Member", "Turns"]
