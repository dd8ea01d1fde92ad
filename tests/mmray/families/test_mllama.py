"""Llama 3.2 Vision: pictures of any size, who looks at which, and why samples do not share a row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmray.families import PackedRow, Tile, family_of
from mmray.images import TilingPolicy
from tests.mmray.families.pictures import changed_family, check_picture, many, sizes
from tests.mmray.families.test_packed_equals_unpacked import logits_error, make_case  # noqa: F401
from tests.mmray.noise import noise

IMAGE = "<|image|>"


@many
@given(side=st.integers(10, 70), most=st.integers(1, 6), size=sizes)
def test_any_picture(zoo_processor, side, most, size):
    family = changed_family(
        "mllama", zoo_processor("mllama"), size={"height": side, "width": side}, max_image_tiles=most
    )
    check_picture("mllama", family, size)


@many
@given(parts=st.lists(st.sampled_from([IMAGE, IMAGE, "Total ", "12"]), max_size=8), size=sizes)
def test_who_looks_at_which_picture(zoo_processor, parts, size):
    """Pictures in any order with text, also several without text between them."""
    family = family_of(zoo_processor("mllama"))
    parts = [*parts, IMAGE]
    pictures = [noise((size if number % 2 else (100, 60)), number) for number in range(parts.count(IMAGE))]
    expected = family.process("".join(parts), pictures, return_tensors="pt")
    ids = expected["input_ids"][0]
    tiles = tuple(Tile(0, page.size, (family.frames(page)[0].shape[1::-1],)) for page in pictures)
    row = PackedRow(ids, torch.tensor([len(ids)]), torch.zeros_like(ids), tiles)
    found = family.attention_inputs(row, torch.float32, None)["cross_attention_mask"]
    assert found.dtype == expected["cross_attention_mask"].dtype
    assert found.equal(expected["cross_attention_mask"])


def test_samples_of_a_row_see_each_other_s_pictures(make_case):  # noqa: F811
    case = make_case("mllama")
    numbers = [case.prepared.bin(number).sample_ids[0] for number in range(len(case.prepared))]
    first, last = numbers.index("first"), numbers.index("last")  # the second has text before its picture
    assert logits_error(case, case.micro_batch(first), [first]) < 1e-5
    assert logits_error(case, case.micro_batch(first, last), [first, last]) > 0.1


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"grid": (2, 2), "tile_size": (168, 112)}, "168 x 112 pixels has 6 squares of 56"),
        ({"grid": (2, 2), "tile_size": (56, 56), "overview": (60, 300)}, "56 x 280 pixels has 5 squares"),
        ({"grid": (2, 2), "native_resolution": True}, "native_resolution"),
    ],
)
def test_tiles_it_would_resample_are_refused(zoo_processor, policy, message):
    family = family_of(zoo_processor("mllama"), tiled=True)
    with pytest.raises(ValueError, match=message):
        family.resolve_tiling(TilingPolicy.model_validate(policy))
