"""Positions of a packed row: for each sample those that the real model would give it alone."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmray.families import FAMILIES, PackedRow, Tile, family_of
from mmray.families.base import positions_in_sample
from mmray.loss.labels import segment_ids
from tests.mmray.families.small_models import small_model
from tests.mmray.families.zoo import ZOO

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
    start, end = map(family.token_id, family.placeholder_unit.split(family.placeholder))
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


def check_row(processor, folder, name, row: list[list[Part]], *, dummy=False):
    """processor, folder: functions, of the zoo's members by name."""
    family = family_of(processor(name), model_type=ZOO[name].model_type)
    model = small_model(name, folder(name))
    ids = [tokens(family, sample) for sample in row]
    expected = [by_the_model(model, family, sample) for sample in row]
    images = [part for sample in row for part in sample if not isinstance(part, int)]
    if dummy:
        ids.append(tokens(family, [(1, 1)], markers=False))
        expected.append(by_the_model(model, family, [(1, 1)], markers=False))
        images.append((1, 1))
    side = family.tile_multiple
    found = family.position_ids(packed_row(ids, [(columns * side, rows * side) for columns, rows in images]))
    assert found.dtype == torch.int64
    assert found.shape == (4, sum(len(each) for each in ids))
    assert torch.equal(found, torch.cat(expected, dim=1))


def packed_row(ids: list[list[int]], sizes: list[tuple[int, int]]) -> PackedRow:
    """Samples one after another, with one frame a picture."""
    lengths = torch.tensor([len(each) for each in ids])
    return PackedRow(
        input_ids=torch.tensor([token for each in ids for token in each]),
        lengths=lengths,
        segment_ids=segment_ids(lengths),
        tiles=tuple(Tile(0, size, (size,)) for size in sizes),
    )


M_ROPE = pytest.mark.parametrize(
    "name",
    [
        name
        for name, member in ZOO.items()
        if any(family.position_rows == 4 and member.model_type in family.model_types for family in FAMILIES)
    ],
)


@M_ROPE
@pytest.mark.parametrize("row", LAYOUTS)
@pytest.mark.parametrize("dummy", [False, True])
def test_chosen_layouts(zoo_processor, zoo_folder, name, row, dummy):
    check_row(zoo_processor, zoo_folder, name, row, dummy=dummy)


@M_ROPE
@settings(deadline=None, max_examples=60)
@given(row=rows, dummy=st.booleans())
@example(row=[[1], [1], [1]], dummy=True)
def test_random_layouts(zoo_processor, zoo_folder, name, row, dummy):
    check_row(zoo_processor, zoo_folder, name, row, dummy=dummy)


@pytest.mark.parametrize("model_type", ["idefics3", "smolvlm"])
def test_plain_positions_restart_at_each_sample(processors, model_type):
    family = family_of(processors[model_type])
    found = family.position_ids(packed_row([[family.image_token_id] * length for length in (4, 1, 3, 1)], [(64, 64)]))
    assert found.tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 0]]


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=10))
def test_positions_in_sample(lengths):
    expected = [position for length in lengths for position in range(length)]
    assert positions_in_sample(torch.tensor(lengths, dtype=torch.int32)).tolist() == expected
