"""Granite for Docling: exact tokens of any page, also where a line break after it melts into the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.families import family_of
from tests.mmray.families.pictures import changed_family, check_picture, many, sizes
from tests.mmray.families.test_zoo import check_tokens
from tests.mmray.families.zoo import ZOO
from tests.mmray.noise import noise

grids = st.fixed_dictionaries(
    {
        "crop_to_patches": st.sampled_from([True, True, False]),
        "min_patches": st.integers(1, 2),
        "max_patches": st.integers(1, 12),
        "dense_max_patches": st.sampled_from([0, 16]),
        "dense_max_scale": st.sampled_from([0.0, 0.9]),
        "dense_min_aspect": st.sampled_from([0.0, 1.1]),
        "dense_max_aspect": st.sampled_from([0.0, 2.0]),
        "fine_route": st.booleans(),
    }
).filter(lambda settings: settings["min_patches"] <= settings["max_patches"])


@many
@given(settings=grids, size=sizes)
def test_any_picture(zoo_processor, settings, size):
    family = changed_family("granite_docling", zoo_processor("granite_docling"), **settings)
    check_picture("granite_docling", family, size)


@pytest.mark.parametrize("size", [(60, 60), (150, 60)])
def test_text_around_pages_of_one_square_and_of_several(zoo_processor, size):
    family = family_of(zoo_processor("granite_docling"))
    check_tokens(family, [noise(size, seed) for seed in range(3)])


def test_a_model_without_a_fine_path(zoo_folder, zoo_processor):
    config = ZOO["granite_docling"].config(zoo_folder("granite_docling"))
    coarse = family_of(zoo_processor("granite_docling"))
    fine = family_of(zoo_processor("granite_docling (fine)"))
    assert coarse.model_problem(config) is None
    assert fine.model_problem(config) is None
    config.vision_config.use_fine_route = False
    assert coarse.model_problem(config) is None
    assert "fine_route" in fine.model_problem(config)
