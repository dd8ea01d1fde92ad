"""Model families behind one contract (`base.Family`): how each one packs, masks and turns pictures into pixel
inputs."""

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from mmray.errors import UserError
from mmray.families.base import Family, PackedRow, RoleMarkers, Span, Tile
from mmray.families.gemma3 import Gemma3
from mmray.families.gemma3n import Gemma3n
from mmray.families.gemma4 import Gemma4
from mmray.families.generic import Generic
from mmray.families.glm4v import Glm4v
from mmray.families.granite_docling import GraniteDocling
from mmray.families.idefics3 import Idefics3
from mmray.families.internvl import InternVL
from mmray.families.lfm2_vl import Lfm2VL
from mmray.families.llama4 import Llama4
from mmray.families.llava import Llava
from mmray.families.llava_next import LlavaNext
from mmray.families.llava_onevision import LlavaOnevision
from mmray.families.mllama import Mllama
from mmray.families.paddleocr_vl import PaddleOCRVL
from mmray.families.paligemma import PaliGemma
from mmray.families.parts import Parts, parts_by_rules
from mmray.families.pixtral import LightOnOcr, Pixtral
from mmray.families.processors import load_processor
from mmray.families.qwen2_vl import Qwen2VL
from mmray.families.qwen3_5 import Qwen35
from mmray.families.qwen3_vl import Qwen3VL

FAMILIES: tuple[type[Family], ...] = (
    Qwen2VL,
    Qwen3VL,
    Qwen35,
    Glm4v,
    PaddleOCRVL,
    Idefics3,
    Llava,
    LlavaNext,
    LlavaOnevision,
    InternVL,
    Pixtral,
    LightOnOcr,
    Mllama,
    Llama4,
    Lfm2VL,
    GraniteDocling,
    Gemma3,
    Gemma3n,
    Gemma4,
    PaliGemma,
)

__all__ = [
    "FAMILIES",
    "Family",
    "PackedRow",
    "RoleMarkers",
    "Span",
    "Tile",
    "by_sample_problem",
    "family_of",
    "leaf_modules",
    "load_family",
    "load_processor",
    "model_parts",
]


def family_of(processor: Any, *, tiled: bool = False, model_type: str | None = None) -> Family:
    """The family that serves a processor, bound to it.

    Args:
        tiled: whether an mmray tiling policy cuts the pages, so that the processor must take each tile as it is.
        model_type: `config.model_type` of the model, where it is known: some processors serve several families.

    A processor or a model that no family serves gets general rules (`Generic`), with a warning.

    Raises UserError where the model belongs to another family than the processor.
    """
    name = type(processor).__name__
    served = [family for family in FAMILIES if name in family.processor_classes]
    for family in served:
        if model_type is None or model_type in family.model_types:
            return family(processor, tiled=tiled)
    if served and any(model_type in family.model_types for family in FAMILIES):
        types = ", ".join(known_type for family in served for known_type in family.model_types)
        raise UserError(
            f"the model is a {model_type}, but {name} is a processor of {types}; set model.processor to the model's own"
        )
    return Generic(processor, tiled=tiled)


def by_sample_problem(config: PretrainedConfig) -> str | None:
    """The reason why the text layers of a model cannot compute each sample apart; None where they can
    (`Family.by_sample_problem`)."""
    served = [family for family in FAMILIES if config.model_type in family.model_types] or [Generic]
    return next((problem for family in served if (problem := family.by_sample_problem(config))), None)


def leaf_modules(model_type: str) -> set[str]:
    """The class names that `Family.leaf_modules` lists for a model type."""
    return {name for family in FAMILIES if model_type in family.model_types for name in family.leaf_modules}


def model_parts(model: PreTrainedModel) -> Parts:
    """The parts of a model, by its family or, where no family serves it, by general rules; needs no processor.

    Families that share a model type name its parts alike. Raises UserError where a weight belongs to no part, or
    transformers does not tell the parts.
    """
    served = [family for family in FAMILIES if model.config.model_type in family.model_types]
    return served[0].module_names.of(model) if served else parts_by_rules(model)


def load_family(
    processor: str | Path, *, tiled: bool = False, model_type: str | None = None, trust_remote_code: bool = False
) -> Family:
    """The family of a processor's folder or hub name: `load_processor`, then `family_of`. Raises UserError as they
    do."""
    loaded = load_processor(processor, trust_remote_code=trust_remote_code)
    return family_of(loaded, tiled=tiled, model_type=model_type)
