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

__all__ = ["ZOO", "Member", "Turns"]
