"""Positions of a packed row: for each sample those that the real model would give it alone."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmray.families import family_of
from mmray.families.base import positions_in_sample
from tests.mmray.families.small_models import small_model

Part = int | tuple[int, int]
"""A number of text tokens, or an image as (columns, rows) of its tokens."""

parts = st.one_of(st.integers(1, 12), st.tuples(st.integers(1, 7), st.integers(1, 7)))
samples = st.lists(parts, min_size=1, max_size=5)
rows = st.lists(samples, min_size=1, max_size=6)

LAYOUTS: list[list[list[Part]]] = [
    [[9]],
    [[(3, 2)]],
    [[(3, 2), 5], [4, (1, 6)], [2]],
    [[2, (4, 4), (2, 3), 1], [(5, 1)], [(1, 5)], [3]],
    [[7], [6], [(2, 2), 3, (2, 2), 3, (7, 7)]],
    [[(1, 1)], [(1, 1), (1, 1)], [1]],
]


def tokens(family, sample: list[Part], *, markers=True) -> list[int]:
    """Ids of a sample; its images stand between the family's markers, or bare, as the added dummy does."""
    start, end = family.token_id("<|vision_start|>"), family.token_id("<|vision_end|>")
    ids: list[int] = []
    for number, part in enumerate(sample):
        if isinstance(part, int):
            ids += [10 + number] * part
        else:
            pads = [family.image_token_id] * (part[0] * part[1])
            ids += [start, *pads, end] if markers else pads
    return ids


def by_the_model(model, family, sample: list[Part], *, markers=True) -> torch.Tensor:
    """int64 [4, n]: the text row, and the three of get_rope_index for the sample alone."""
    ids = torch.tensor([tokens(family, sample, markers=markers)])
    merge = family.images.merge_size
    grids = [(1, part[1] * merge, part[0] * merge) for part in sample if not isinstance(part, int)]
    grid = torch.tensor(grids) if grids else None
    types = (ids == family.image_token_id).int()
    positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grid)
    return torch.cat([torch.arange(ids.shape[1])[None], positions[:, 0]])


def check_row(processors, folders, model_type, row: list[list[Part]], *, dummy=False):
    family = family_of(processors[model_type])
    model = small_model(model_type, folders[model_type])
    ids = [tokens(family, sample) for sample in row]
    expected = [by_the_model(model, family, sample) for sample in row]
    images = [part for sample in row for part in sample if not isinstance(part, int)]
    if dummy:
        ids.append(tokens(family, [(1, 1)], markers=False))
        expected.append(by_the_model(model, family, [(1, 1)], markers=False))
        images.append((1, 1))
    found = family.position_ids(
        torch.tensor([token for each in ids for token in each]),
        torch.tensor([len(each) for each in ids]),
        [(columns * family.tile_multiple, rows * family.tile_multiple) for columns, rows in images],
    )
    assert found.dtype == torch.int64
    assert found.shape == (4, 1, sum(len(each) for each in ids))
    assert torch.equal(found[:, 0], torch.cat(expected, dim=1))


QWEN = pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])


@QWEN
@pytest.mark.parametrize("row", LAYOUTS)
@pytest.mark.parametrize("dummy", [False, True])
def test_chosen_layouts(processors, processor_folders, model_type, row, dummy):
    check_row(processors, processor_folders, model_type, row, dummy=dummy)


@QWEN
@settings(deadline=None, max_examples=150)
@given(row=rows, dummy=st.booleans())
@example(row=[[1], [1], [1]], dummy=True)
def test_random_layouts(processors, processor_folders, model_type, row, dummy):
    check_row(processors, processor_folders, model_type, row, dummy=dummy)


@pytest.mark.parametrize("model_type", ["idefics3", "smolvlm"])
def test_plain_positions_restart_at_each_sample(processors, model_type):
    family = family_of(processors[model_type])
    ids = torch.full((9,), family.image_token_id)
    found = family.position_ids(ids, torch.tensor([4, 1, 3, 1]), [(64, 64)])
    assert found.tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 0]]


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=10))
def test_positions_in_sample(lengths):
    expected = [position for length in lengths for position in range(length)]
    assert positions_in_sample(torch.tensor(lengths, dtype=torch.int32)).tolist() == expected
