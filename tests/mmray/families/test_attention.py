"""Masks made for models that see some tokens both ways: those that the real model makes for each sample alone."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmray.config.compatibility import check_model
from mmray.errors import UserError
from mmray.families import PackedRow, family_of
from mmray.families.attention import causal_mask, given_mask, run_numbers, sample_numbers, seeing_blocks, within_window
from mmray.loss.labels import segment_ids
from tests.mmray.families.small_models import small_model
from tests.mmray.families.test_packed_equals_unpacked import error, logits_of
from tests.mmray.families.zoo import ZOO

Sample = list[int]
"""A number of text tokens, or less than zero an image of so many; for PaliGemma the prompt ends at the last image."""

TYPES = {"gemma3": "token_type_ids", "gemma4, images seen whole": "mm_token_type_ids", "paligemma": "token_type_ids"}
CASES = [(name, attention) for name in TYPES for attention in ZOO[name].attentions]
samples = st.lists(st.one_of(st.integers(1, 20), st.integers(-20, -1)), min_size=1, max_size=5)
rows = st.lists(samples, min_size=1, max_size=5)

LONG: list[Sample] = [[30], [2, -20, 3, -4, 20], [-17, 40], [-3], [25, -20]]


def tokens(family, sample: Sample) -> list[int]:
    """Text of an image's last token too, so that runs of images end where their sample does."""
    ids: list[int] = []
    for number, part in enumerate(sample):
        ids += [20 + number + k for k in range(part)] if part > 0 else [family.image_token_id] * -part
        ids += [10] if part < 0 and number + 1 < len(sample) else []
    return ids


def answered(family, ids: list[int]) -> list[bool]:
    """What of a sample comes after its last image."""
    last = max((place for place, token in enumerate(ids) if token == family.image_token_id), default=-1)
    return [place > last for place in range(len(ids))]


def packed_row(family, row: list[Sample], *, dummy: int = 0) -> PackedRow:
    """dummy: image tokens of an added picture at the end."""
    ids = [tokens(family, sample) for sample in row]
    trained = [flag for sample in ids for flag in answered(family, sample)] + [False] * dummy
    ids += [[family.image_token_id] * dummy] if dummy else []
    lengths = torch.tensor([len(each) for each in ids])
    padding = torch.tensor([False] * len(row) + [True] * bool(dummy))
    flat = torch.tensor([token for each in ids for token in each])
    return PackedRow(flat, lengths, segment_ids(lengths, padding), (), trained=torch.tensor(trained))


EMBEDDINGS = torch.randn((999, 64), generator=torch.Generator().manual_seed(7))


def embedded(ids: list[int]) -> torch.Tensor:
    """Other features for each token and place, as those of an image have; [1, n, 64]."""
    return EMBEDDINGS[[(17 * token + place) % len(EMBEDDINGS) for place, token in enumerate(ids)]][None]


def alone(name, model, family, sample: Sample) -> torch.Tensor:
    """The logits of the real model with the types of tokens that its own processor would give."""
    ids = tokens(family, sample)
    types = answered(family, ids) if name == "paligemma" else [token == family.image_token_id for token in ids]
    return logits_of(model, {"inputs_embeds": embedded(ids), TYPES[name]: torch.tensor([types]).long()})


@pytest.fixture
def build(zoo_processor, zoo_folder):
    """A function: the family and the small model of a member."""

    def build(name, attention):
        return family_of(zoo_processor(name)), small_model(name, zoo_folder(name), attention)

    return build


def largest_error(name, family, model, row, *, dummy=0, change=lambda inputs: inputs):
    packed = packed_row(family, row, dummy=dummy)
    each = [embedded(ids.tolist()) for ids in packed.input_ids.split(packed.lengths.tolist())]
    inputs = {"inputs_embeds": torch.cat(each, dim=1), "position_ids": family.position_ids(packed)}
    inputs |= family.attention_inputs(packed, torch.float32, model.config)
    logits = logits_of(model, change(inputs)).split(packed.lengths.tolist())
    return max(error(found, alone(name, model, family, sample)) for found, sample in zip(logits, row))


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_masks_are_those_of_each_sample_alone(build, name, attention):
    family, model = build(name, attention)

    @settings(max_examples=12, deadline=None)
    @given(row=rows, dummy=st.sampled_from([0, 5]))
    @example(row=LONG, dummy=5)
    @example(row=[[1], [1]], dummy=0)
    @example(row=[[-4], [-4], [3]], dummy=4)
    def check(row, dummy):
        assert largest_error(name, family, model, row, dummy=dummy) < 1e-5

    check()


def without_window(inputs):
    """A mask for all layers."""
    masks = inputs["attention_mask"]
    return inputs | {"attention_mask": dict.fromkeys(masks, masks["full_attention"])}


def whole_images_ahead(inputs):
    """Only the window's end behind a token, and none of what an image's tokens see ahead."""
    masks = inputs["attention_mask"]
    behind = {kind: mask & torch.ones_like(mask).tril() for kind, mask in masks.items()}
    return inputs | {"attention_mask": behind}


@pytest.mark.parametrize("name", ["gemma3", "gemma4, images seen whole"])
@pytest.mark.parametrize("change", [without_window, whole_images_ahead])
def test_a_mask_that_lacks_something_shows(build, name, change):
    family, model = build(name, "sdpa")
    assert largest_error(name, family, model, LONG, change=change) > 0.05


@pytest.mark.parametrize("name", ["gemma3", "gemma4, images seen whole"])
def test_layers_of_a_kind_share_a_mask(build, name):
    family, model = build(name, "sdpa")
    row = packed_row(family, LONG)
    masks = family.attention_inputs(row, torch.bfloat16, model.config)["attention_mask"]
    assert set(masks) == {"full_attention", "sliding_attention"}
    length = len(row.input_ids)
    assert {(mask.shape, mask.dtype) for mask in masks.values()} == {((1, 1, length, length), torch.bool)}


# ---- The masks themselves ----


few = st.lists(st.lists(st.sampled_from([1, 2, 5, -1, -2, -5]), min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(row=few, window=st.integers(1, 8))
def test_masks_by_definition(row, window):
    numbers = [number for number, sample in enumerate(row) for part in sample for _ in range(abs(part))]
    is_image = [part < 0 for sample in row for part in sample for _ in range(abs(part))]
    lengths = torch.tensor([sum(map(abs, sample)) for sample in row])
    ids = torch.tensor(is_image).long()
    found = sample_numbers(PackedRow(ids, lengths, segment_ids(lengths), ()))
    assert found.tolist() == numbers
    blocks = run_numbers(ids == 1, found)
    seen = seeing_blocks(causal_mask(found), blocks)
    windowed = within_window(seen, window).tolist()
    seen = seen.tolist()
    runs = [0]
    for place in range(1, len(numbers)):
        same = numbers[place] == numbers[place - 1] and is_image[place] == is_image[place - 1]
        runs.append(runs[-1] + (not same))
    for query in range(len(numbers)):
        for key in range(len(numbers)):
            expected = numbers[query] == numbers[key] and key <= query
            expected |= is_image[query] and runs[query] == runs[key]
            assert seen[query][key] == expected
            assert windowed[query][key] == (expected and key > query - window)


class Recorder(TorchDispatchMode):
    """Counts operations, and the bytes of the largest tensor that they return."""

    def __init__(self):
        super().__init__()
        self.operations, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *(leaf.untyped_storage().nbytes() for leaf in made)])
        return result


@pytest.mark.parametrize("name", TYPES)
def test_masks_take_a_byte_a_pair_and_no_loop(build, name):
    family, model = build(name, "sdpa")
    counts = set()
    for row in (LONG, LONG * 10):
        packed = packed_row(family, row)
        with Recorder() as recorder:
            family.attention_inputs(packed, torch.float32, model.config)
        counts.add(recorder.operations)
        assert recorder.largest == len(packed.input_ids) ** 2
    assert len(counts) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_adds_its_mask(build, dtype):
    config = build("gemma3", "eager")[1].config
    mask = torch.tensor([[True, False], [True, True]])
    found = given_mask(mask, config, dtype)
    lowest = torch.finfo(dtype).min
    assert found.dtype == dtype
    assert found.tolist() == [[[[0, lowest], [0, 0]]]]


# ---- What takes no masks ----


@pytest.mark.parametrize("name", TYPES)
def test_flash_attention_is_refused(zoo_processor, zoo_folder, name):
    family, config = family_of(zoo_processor(name)), ZOO[name].config(zoo_folder(name))
    config._attn_implementation = "sdpa"
    check_model(config, family)
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"cannot train like this: flash_attention_2 takes no mask.*attention: sdpa"):
        check_model(config, family)
    with pytest.raises(UserError, match="takes no mask"):
        family.attention_inputs(packed_row(family, LONG), torch.float32, config)


def test_a_causal_model_takes_any_attention(zoo_processor, zoo_folder):
    family, config = family_of(zoo_processor("gemma4")), ZOO["gemma4"].config(zoo_folder("gemma4"))
    config._attn_implementation = "flash_attention_2"
    check_model(config, family)
    row = packed_row(family, LONG)
    told = family.attention_inputs(row, torch.float32, config)
    ends = list(itertools.accumulate(row.lengths.tolist()))
    assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == [0, *ends]
    assert told["max_length_q"] == told["max_length_k"] == max(row.lengths.tolist())
