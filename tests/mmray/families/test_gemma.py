"""What is Gemma's alone: line breaks around images, turns that begin with one, budgets of tokens."""

import copy
import io

import pytest

from mmray.errors import UserError
from mmray.families import family_of
from mmray.images import TilingPolicy
from mmray.loss.rules import IGNORE_INDEX
from mmray.loss.settings import RoleLoss
from mmray.packing.settings import PackingSettings
from mmray.rows.preflight import sample_labels
from tests.mmray.noise import noise
from tests.mmray.preparing import Preparation


def page(size: tuple[int, int] = (50, 40)) -> dict[str, bytes]:
    buffer = io.BytesIO()
    noise(size).save(buffer, "png")
    return {"bytes": buffer.getvalue()}


def with_images(processor, **changes):
    """The processor with another image processor."""
    changed = copy.copy(processor)
    changed.image_processor = type(processor.image_processor)(**processor.image_processor.to_dict() | changes)
    return changed


GEMMA3 = pytest.mark.parametrize("name", ["gemma3", "gemma3n"])


@GEMMA3
def test_line_breaks_around_an_image_melt_into_the_text(zoo_processor, name):
    """Four breaks are one token of the processor: two of its own and two of the row."""
    family = family_of(zoo_processor(name))
    (four,) = family.tokenizer("\n\n\n\n", add_special_tokens=False)["input_ids"]
    preparation = Preparation(family, {"files": "rows.jsonl", "kind": "pretrain"})
    ids = preparation.sample({"text": "Page:\n\n<image>", "images": [page()]}).input_ids
    start = family.token_id(family.tokenizer.boi_token)
    assert ids[ids.tolist().index(start) - 1] == four


@GEMMA3
def test_turns_that_begin_with_an_image_are_found(zoo_processor, name):
    """The break of their header is one token with the image's: the ends of both turns train only if it is known."""
    loss = RoleLoss(train_on_eos="all")
    preparation = Preparation(zoo_processor(name), {"files": "rows.jsonl", "kind": "chat"}, loss=loss)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read it."}]},
        {"role": "assistant", "content": "Total 12.50"},
    ]
    sample = preparation.sample({"messages": messages, "images": [page()]})
    (labels,) = sample_labels([sample], preparation.labels)
    trained = preparation.family.tokenizer.decode(labels[labels != IGNORE_INDEX])
    assert trained == "<end_of_turn>Total 12.50<end_of_turn>"


@pytest.mark.parametrize("name", ["gemma3", "gemma3n", "paligemma"])
def test_pictures_of_no_fixed_size_are_refused(zoo_processor, name):
    processor = with_images(zoo_processor(name), size={"shortest_edge": 64})
    with pytest.raises(UserError, match=r"takes pictures of one size.*shortest_edge.*write height and width"):
        family_of(processor)


# ---- Gemma 4's budget ----


@pytest.mark.parametrize("part", ["tile_size", "overview"])
def test_tiles_over_the_budget_are_refused(zoo_processor, part):
    """8 pixels a token and direction, 70 tokens: 80 x 56 fit, 80 x 64 do not."""
    family = family_of(zoo_processor("gemma4"), tiled=True)
    settings = {"grid": (2, 2), "tile_size": (40, 40), "overview": (40, 40)}
    family.resolved_tiling(TilingPolicy(**settings | {part: (80, 56)}))
    with pytest.raises(UserError, match=r"80 x 64 pixels has 80 image tokens, and max_soft_tokens .* 70; use smaller"):
        family.resolved_tiling(TilingPolicy(**settings | {part: (80, 64)}))


def test_native_tiles_over_the_budget_reject_their_row(zoo_processor):
    preparation = Preparation(
        family_of(zoo_processor("gemma4"), tiled=True),
        {"files": "rows.jsonl", "kind": "pretrain"},
        tiling={"grid": (2, 2), "native_resolution": True},
        packing=PackingSettings(token_capacity=1000, visual_capacity=1000),
    )
    row = {"text": "<image>\nTotal"}
    assert preparation.sample(row | {"images": [page((160, 112))]}).visual_tokens == 4 * 70
    rejected = preparation.rejected(row | {"images": [page((168, 112))]})
    assert rejected.reason == "image_shape"
    assert "max_soft_tokens" in rejected.message


def test_pages_that_the_processor_does_not_resize_must_fit_its_patches(zoo_processor):
    family = family_of(with_images(zoo_processor("gemma4"), do_resize=False))
    picture = noise((48, 40))
    expected = family.process(family.placeholder, [picture], return_tensors="pt")
    span = family.span(picture.size)
    assert (expected["input_ids"] == family.image_token_id).sum() == span.visual_tokens == 30
    with pytest.raises(ValueError, match="its sides must divide by 8"):
        family.span((48, 44))
