"""One picture of any size, under any settings of the image processor."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mmray.families import Family, family_of
from tests.mmray.families.test_zoo import check_pixels
from tests.mmray.families.zoo import ZOO
from tests.mmray.noise import noise

many = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

sizes = st.one_of(
    st.tuples(st.integers(1, 300), st.integers(1, 300)), st.sampled_from([(1, 1), (1, 700), (700, 1), (3, 3), (2, 90)])
)


def changed_family(name: str, processor: Any, *, tiled: bool = False, **changes: Any) -> Family:
    """The family of a member of the zoo, its image processor with other settings."""
    images = processor.image_processor
    changed = copy.copy(processor)
    changed.image_processor = type(images)(**images.to_dict() | changes)
    return family_of(changed, tiled=tiled, model_type=ZOO[name].model_type)


def nothing_of_it(family: Family, output: Any) -> bool:
    """The processor's output has no token for the picture."""
    return family.image_token_id not in output["input_ids"][0].tolist()


def check_picture(
    name: str, family: Family, size: tuple[int, int], is_useless: Callable[[Family, Any], bool] = nothing_of_it
) -> None:
    """Tokens and pixels of a picture are the processor's; or the processor fails at it, or makes what the model cannot
    take, and then `span` raises ValueError."""
    picture = noise(size)
    try:
        output = family.process(family.placeholder_unit, [picture], return_tensors="pt", add_special_tokens=False)
        is_refused = is_useless(family, output)
    except (ValueError, IndexError, ZeroDivisionError, RuntimeError):
        is_refused = True
    if is_refused:
        with pytest.raises(ValueError, match="makes"):
            family.span(size)
        return
    check_pixels(ZOO[name], family, [[picture]])
    text = family.tokenizer_text(family.placeholder_unit, [size])
    ids = family.tokenizer(text, add_special_tokens=False)["input_ids"]
    place = ids.index(family.placeholder_id)
    ids[place : place + 1] = family.span(size).token_ids.tolist()
    assert ids == output["input_ids"][0].tolist()
