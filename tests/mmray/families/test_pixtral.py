"""Pixtral and its kin: exact lengths for any setting and size, tool turns, and rows of hardly any picture."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmray.batches.micro_batch import MicroBatch, Place, mask, render
from mmray.families import family_of, load_processor
from mmray.loss.rules import IGNORE_INDEX, LossRule
from mmray.loss.settings import RoleLoss
from mmray.loss.sources import label_maker
from tests.mmray.families.pictures import changed_family, check_picture, many, sizes
from tests.mmray.families.small_models import small_model
from tests.mmray.families.test_packed_equals_unpacked import CPU, PICTURES, error, logits_of
from tests.mmray.noise import noise
from tests.mmray.preparing import Preparation, write_rows

sides = st.integers(14, 200)
limits = st.one_of(
    st.builds(lambda side: {"longest_edge": side}, sides),
    st.builds(lambda height, width: {"height": height, "width": width}, sides, sides),
)
crops = st.one_of(st.none(), st.builds(lambda height, width: {"height": height, "width": width}, sides, sides))


@many
@given(limit=limits, resize=st.sampled_from([True, True, False]), crop=crops, size=sizes, merge=st.booleans())
def test_any_picture(zoo_processor, limit, resize, crop, size, merge):
    name = "mistral3" if merge else "pixtral"
    changes = {"size": limit, "do_resize": resize}
    if crop:
        changes |= {"do_center_crop": True, "crop_size": crop}
    check_picture(name, changed_family(name, zoo_processor(name), **changes), size)


@many
@given(limit=limits, patch=st.sampled_from([14, 28, 7, {"height": 14, "width": 28}]), size=sizes)
def test_any_picture_of_lighton(zoo_processor, limit, patch, size):
    family = changed_family("lighton_ocr", zoo_processor("lighton_ocr"), size=limit, patch_size=patch)
    check_picture("lighton_ocr", family, size)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is here")
def test_the_processor_loads_without_torchvision_and_leaves_no_stand_in(zoo_folder):
    processor = load_processor(zoo_folder("pixtral"))
    assert type(processor).__name__ == "PixtralProcessor"
    assert processor.image_processor.backend == "pil"
    assert "transformers.models.pixtral.image_processing_pixtral" not in sys.modules


# ---- Turns ----

TOOLS = (
    "<s>[INST]Add both.[/INST][TOOL_CALLS]add</s>[TOOL_RESULTS]3[/TOOL_RESULTS][TOOL_RESULTS]4[/TOOL_RESULTS]It is 7."
    "</s>[INST]Sure?[/INST]Yes.</s>"
)


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("assistant", "[TOOL_CALLS]add</s>It is 7.</s>Yes.</s>"),
        ("tool", "34"),
        ("user", "Add both.Sure?"),
    ],
)
def test_turns_around_tools(zoo_processor, role, expected):
    """What follows the last result is the assistant's, what follows any other is the next result."""
    family = family_of(zoo_processor("mistral3"))
    ids = np.asarray(family.tokenizer(TOOLS, add_special_tokens=False)["input_ids"])
    maker = label_maker(RoleLoss(roles=(role,)), family)
    labels = maker.of_arrays(ids, np.asarray([len(ids)]), np.asarray([LossRule.ROLES]), np.zeros(len(ids), bool), [])
    assert family.tokenizer.decode(labels[labels != IGNORE_INDEX]) == expected


# ---- A row whose pictures make one feature ----

TINY = {"id": "tiny", "text": "An icon: <image> of a bell", "images": ["icon.png"]}
PAGE = {"id": "page", "text": "<image>\nTotal 12.50", "images": ["page.png"]}


def row_of(folder, family, rows):
    """The micro-batch of some rows, and where the icon's sample is in it."""
    dataset = {"files": write_rows(folder / f"{len(rows)}.jsonl", rows), "kind": "pretrain"}
    preparation = Preparation(family, dataset)
    prepared = preparation.write(folder / f"prepared-{len(rows)}")
    assert len(prepared) == 1
    packed = prepared.bin(0)
    rendered = render([packed], Place(0, 0, 0), family, prepared.tiling)
    batch = MicroBatch(mask(rendered, family, preparation.labels, CPU), family)
    number = packed.sample_ids.index("tiny")
    stop = int(packed.sample_lengths[: number + 1].sum())
    return batch, slice(stop - int(packed.sample_lengths[number]), stop)


def test_a_lone_feature_gets_company(zoo_folder, zoo_processor, tmp_path):
    """The model itself takes it for a vector and raises. Beside a page, the icon needs none."""
    noise((20, 20)).save(tmp_path / "icon.png")
    noise(PICTURES["wide.png"], 1).save(tmp_path / "page.png")
    family = family_of(zoo_processor("mistral3"))
    model = small_model("mistral3", zoo_folder("mistral3"))
    output = family.process(family.placeholder_unit, [noise((20, 20))], return_tensors="pt")
    with pytest.raises(RuntimeError, match="split_sizes"):
        logits_of(model, dict(output))
    alone, own = row_of(tmp_path, family, [TINY])
    beside, there = row_of(tmp_path, family, [TINY, PAGE])
    logits = [
        logits_of(model, batch.model_inputs(CPU, torch.float32, model.config))[where]
        for batch, where in ((alone, own), (beside, there))
    ]
    assert alone.masked.padding.tolist() == [False, True]
    assert beside.masked.padding.tolist() == [False, False]
    assert error(logits[0], logits[1]) < 1e-5
