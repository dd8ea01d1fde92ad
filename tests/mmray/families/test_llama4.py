"""Llama 4: pictures of any size, and the length up to which rows pack."""

import importlib.util

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.errors import UserError
from mmray.families import load_processor
from tests.mmray.families.pictures import changed_family, check_picture, many, sizes
from tests.mmray.families.test_packed_equals_unpacked import error, logits_error, logits_of, make_case  # noqa: F401

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
needs_torchvision = pytest.mark.skipif(not HAS_TORCHVISION, reason="llama4 needs torchvision")


@pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision is here")
@pytest.mark.parametrize("name", ["llama4", "lfm2_vl"])
def test_a_processor_that_needs_torchvision_says_so(zoo_folder, name):
    with pytest.raises(UserError, match="install the missing dependencies") as caught:
        load_processor(zoo_folder(name))
    assert "torchvision" in str(caught.value)


@needs_torchvision
@many
@given(side=st.sampled_from([28, 56]), most=st.integers(1, 8), largest=st.booleans(), size=sizes)
def test_any_picture(zoo_processor, side, most, largest, size):
    family = changed_family(
        "llama4", zoo_processor("llama4"), size={"height": side, "width": side}, max_patches=most,
        resize_to_max_canvas=largest,
    )  # fmt: skip
    check_picture("llama4", family, size)


@needs_torchvision
def test_rows_pack_up_to_the_limit_and_no_further(make_case, monkeypatch):  # noqa: F811
    case = make_case("llama4")
    batch = case.micro_batch(0)
    length = len(batch.masked.input_ids)
    scaled = [case.model.config.text_config, *(each for each in case.model.modules() if hasattr(each, "floor_scale"))]
    for limit, packs in ((length + 1, True), (length, False)):
        for each in scaled:
            monkeypatch.setattr(each, "floor_scale", limit)
        problem = case.family.packing_problem(case.model.config, sample_tokens=length, row_tokens=length)
        assert (problem is None) == packs
        assert packs or f"from {length} tokens on" in problem
        error = logits_error(case, batch, [0])
        assert error < 1e-5 if packs else error > 1e-4


@needs_torchvision
@pytest.mark.parametrize(("name", "value"), [("attn_temperature_tuning", False), ("no_rope_layers", [1, 1, 1, 1])])
def test_without_growing_queries_there_is_no_limit(make_case, monkeypatch, name, value):  # noqa: F811
    case = make_case("llama4")
    assert case.family.packing_problem(case.model.config, sample_tokens=10, row_tokens=8192) is not None
    monkeypatch.setattr(case.model.config.text_config, name, value)
    assert case.family.packing_problem(case.model.config, sample_tokens=10, row_tokens=8192) is None


@needs_torchvision
def test_chunks_begin_with_the_sample(make_case, monkeypatch):  # noqa: F811
    case = make_case("llama4")
    batch = case.micro_batch(0)
    alone, _ = next(case.samples([0]))
    whole = logits_of(case.model, alone)
    monkeypatch.setattr(case.model.config.text_config, "attention_chunk_size", 7)
    assert error(logits_of(case.model, alone), whole) > 1e-2
    assert logits_error(case, batch, [0]) < 1e-5
