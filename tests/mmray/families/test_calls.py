"""Under ZeRO-3 ranks gather weights when a module is called, so all must call the same ones in the same order.

Whatever pictures they have, and whichever experts their tokens go to. Where a family's model does not, the module
around those calls is one of its `leaf_modules`, whose weights are gathered at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmray.families import family_of, leaf_modules
from tests.mmray.families.layouts import CPU, LAYOUTS, micro_batch
from tests.mmray.families.small_models import small_model
from tests.mmray.families.zoo import ZOO


def calls(model: torch.nn.Module, inputs: dict[str, Any], leaves: set[str]) -> list[str]:
    """The names of the modules with weights of their own, or of the leaves around them, as they are called."""
    called: list[str] = []
    inside = [f"{name}." for name, module in model.named_modules() if type(module).__name__ in leaves]
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
        if (f"{name}." in inside or any(True for _ in module.parameters(recurse=False)))
        and not any(name.startswith(leaf) for leaf in inside)
    ]
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return called


def calls_of_layouts(name: str, folder: Path, processor: Any, leaves: set[str]) -> dict[str, list[str]]:
    member = ZOO[name]
    family = family_of(processor, model_type=member.model_type)
    model = small_model(name, folder, member.attentions[0])
    batches = {layout: micro_batch(family, pictures) for layout, pictures in LAYOUTS.items()}
    return {
        layout: calls(model, batch.model_inputs(CPU, torch.float32, model.config), leaves)
        for layout, batch in batches.items()
    }


def test_all_layouts_of_pictures_call_the_same_modules(
    member: Any, zoo_folder: Callable[[str], Path], zoo_processor: Callable[[str], Any]
) -> None:
    if member.missing_for_model:
        pytest.skip(f"its model needs {', '.join(member.missing_for_model)}")
    found = calls_of_layouts(
        member.name, zoo_folder(member.name), zoo_processor(member.name), leaf_modules(member.model_type)
    )
    expected = found["none but the dummy"]
    assert len(expected) > 20
    for layout, called in found.items():
        assert called == expected, layout


def test_the_calls_that_depend_on_pictures_are_seen(zoo_folder: Any, zoo_processor: Any) -> None:
    """Without its leaf PaddleOCR-VL's projector shows."""
    found = calls_of_layouts("paddleocr_vl", zoo_folder("paddleocr_vl"), zoo_processor("paddleocr_vl"), set())
    numbers = {layout: called.count("model.projector.linear_1") for layout, called in found.items()}
    assert numbers["five"] == 5
    assert numbers["one"] == numbers["none but the dummy"] == 1


def test_the_rows_of_the_embedding_are_known_without_the_model(
    member: Any, zoo_folder: Callable[[str], Path], zoo_processor: Callable[[str], Any]
) -> None:
    """Every id of the tokenizer has one."""
    if member.missing_for_model:
        pytest.skip(f"its model needs {', '.join(member.missing_for_model)}")
    family = family_of(zoo_processor(member.name), model_type=member.model_type)
    model = small_model(member.name, zoo_folder(member.name), member.attentions[0])
    assert family.embedding_rows(model.config) == model.get_input_embeddings().num_embeddings
    assert family.num_token_ids <= family.embedding_rows(model.config)
