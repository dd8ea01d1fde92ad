"""Model families: what packing, masks and pixels need to know of each, behind one contract (`base.Family`)."""

from typing import Any

from mmray.errors import UserError
from mmray.families.base import Family, RoleMarkers, Span
from mmray.families.idefics3 import Idefics3
from mmray.families.processors import load_processor
from mmray.families.qwen2_vl import Qwen2VL

FAMILIES: tuple[type[Family], ...] = (Qwen2VL, Idefics3)

__all__ = ["FAMILIES", "Family", "RoleMarkers", "Span", "family_of", "load_processor"]


def family_of(processor: Any, *, tiled: bool = False) -> Family:
    """The family that serves a processor, bound to it.

    tiled: pages are cut by an mmray tiling policy, so the processor must take each tile as it is.
    Raises UserError naming the class found and the classes known.
    """
    name = type(processor).__name__
    for family in FAMILIES:
        if name in family.processor_classes:
            return family(processor, tiled=tiled)
    known = ", ".join(name for family in FAMILIES for name in family.processor_classes)
    raise UserError(f"no model family of mmray serves the processor {name}; those it knows: {known}")
