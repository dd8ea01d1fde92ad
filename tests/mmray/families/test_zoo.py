"""Every family against its own processor: tokens from sizes alone, pixels from uint8 frames, and which turns train."""

import copy

import numpy as np
import pytest
import torch

from mmray.errors import UserError
from mmray.families import FAMILIES, Tile, family_of
from mmray.images import TilingPolicy, cut_tiles, plan_tiles
from mmray.loss.rules import IGNORE_INDEX, LossRule
from mmray.loss.settings import RoleLoss
from mmray.loss.sources import label_maker
from mmray.packing.settings import PackingSettings
from mmray.prepared.fingerprint import processor_record
from tests.mmray.families.zoo import ZOO
from tests.mmray.noise import noise
from tests.mmray.preparing import Preparation, png

SIZES = [(150, 90), (64, 64), (31, 200), (300, 140), (47, 53), (20, 20)]
"""Wide, square, narrow, larger than the processors' limits, no multiple of anything, small."""
TEXTS = ["<image>\nTotal 12.50", "Page:\n\n<image>\n\nas printed", "See <image> and\n<image><image>.", "No picture."]


def variants(member, processor):
    """The processor as it is, and with each of the member's changes of settings."""
    yield processor
    for changes in member.settings:
        images = processor.image_processor
        assert changes.keys() <= images.to_dict().keys()
        changed = copy.copy(processor)
        changed.image_processor = type(images)(**images.to_dict() | changes)
        yield changed


def families(member, processor):
    for changed in variants(member, processor):
        yield family_of(changed, model_type=member.model_type)


# ---- Lengths ----


@pytest.mark.proves("exact lengths")
def test_rows_have_the_processor_s_tokens(member, zoo_processor):
    for family in families(member, zoo_processor(member.name)):
        for first in range(len(SIZES)):
            check_tokens(family, [noise(SIZES[(first + k) % len(SIZES)], k) for k in range(3)])


def check_tokens(family, pictures, **options):
    packing = PackingSettings(token_capacity=100_000, visual_capacity=100_000)
    dataset = {"files": "rows.jsonl", "kind": "pretrain", "add_eos": False}
    preparation = Preparation(family, dataset, packing=packing, **options)
    for text in TEXTS:
        own = pictures[: text.count("<image>")]
        if not own and not family.takes_text_only:
            continue
        sample = preparation.sample({"text": text, "images": [png(picture) for picture in own]})
        plans = [plan_tiles(picture.size, preparation.policy) for picture in own]
        units = [
            "".join(
                f"{label}\n{family.placeholder_unit}" if label else family.placeholder_unit for label in plan.labels
            )
            for plan in plans
        ]
        head, *tails = text.split("<image>")
        rendered = head + "".join(unit + tail for unit, tail in zip(units, tails, strict=True))
        tiles = [tile for picture, plan in zip(own, plans) for tile in cut_tiles(picture, plan)]
        expected = family.process(rendered, tiles, add_special_tokens=True)["input_ids"][0]
        assert sample.input_ids.tolist() == list(expected)
        assert sample.visual_tokens == list(expected).count(family.image_token_id)


@pytest.mark.proves("exact lengths")
def test_tiled_rows_have_the_processor_s_tokens(tiling, zoo_processor):
    family = family_of(zoo_processor(tiling.name), tiled=True, model_type=tiling.model_type)
    for size in SIZES[:3]:
        check_tokens(family, [noise(size, seed) for seed in range(3)], tiling=tiling.tiling)


# ---- Pixels ----


def check_pixels(member, family, groups):
    """groups: the pictures of each sample of a row."""
    for pictures in groups:
        text = " and ".join([family.placeholder_unit] * len(pictures))
        expected = family.process(text, pictures, return_tensors="pt")
        tiles, frames = [], []
        for picture in pictures:
            own = family.frames(picture, len(pictures))
            assert {(frame.dtype, frame.ndim, frame.shape[2]) for frame in own} == {(np.dtype("uint8"), 3, 3)}
            tiles.append(Tile(0, picture.size, tuple((frame.shape[1], frame.shape[0]) for frame in own)))
            frames += [torch.from_numpy(frame.copy()) for frame in own]
        found = family.pixel_inputs(tiles, frames, torch.float32)
        assert set(member.pixel_names) <= set(found)
        for name in member.pixel_names:
            is_float = expected[name].is_floating_point()
            dtype = torch.float32 if is_float else expected[name].dtype
            torch.testing.assert_close(found[name], expected[name].to(dtype), rtol=0, atol=1e-5 if is_float else 0)
        features = sum(map(family.feature_count, tiles))
        assert features == (expected["input_ids"] == family.image_token_id).sum()
        assert features == sum(family.span(picture.size, len(pictures)).visual_tokens for picture in pictures)
        assert family.pixel_inputs(tiles, frames, torch.bfloat16)["pixel_values"].dtype == torch.bfloat16


@pytest.mark.proves("pixels")
def test_pixels_are_the_processor_s(member, zoo_processor):
    pictures = [noise(size, seed) for seed, size in enumerate(SIZES)]
    for family in families(member, zoo_processor(member.name)):
        check_pixels(member, family, [[picture] for picture in pictures] + [pictures[:2], pictures[2:]])


@pytest.mark.proves("pixels")
def test_tiles_are_not_resampled(tiling, zoo_processor):
    family = family_of(zoo_processor(tiling.name), tiled=True, model_type=tiling.model_type)
    policy = family.resolve_tiling(TilingPolicy.model_validate(tiling.tiling))
    tiles = cut_tiles(noise((301, 411)), plan_tiles((301, 411), policy))
    assert len(tiles) > 2
    for tile in tiles:
        (frame,) = family.frames(tile, len(tiles))
        assert np.array_equal(frame, np.asarray(tile))
    check_pixels(tiling, family, [tiles, tiles[:1]])


def test_tiles_of_a_page_do_not_pass_through_the_processor(tiling, zoo_processor, monkeypatch):
    """On the CPU actors they cost a copy of their bytes."""
    family = family_of(zoo_processor(tiling.name), tiled=True, model_type=tiling.model_type)
    policy = family.resolve_tiling(TilingPolicy.model_validate(tiling.tiling))
    tiles = cut_tiles(noise((301, 411)), plan_tiles((301, 411), policy))

    def refuse(*args, **options):
        raise AssertionError("the image processor was run")

    for step in ("preprocess", "resize", "resize_and_split"):
        monkeypatch.setattr(type(family.processor.image_processor), step, refuse, raising=False)
    for tile in tiles:
        (frame,) = family.frames(tile, len(tiles))
        assert np.array_equal(frame, np.asarray(tile))


# ---- Masks ----

SYSTEM, ASKED, ANSWERED = "Be brief.", ("Who is it for?", "And why?"), ("Anna Berg, of course.", "She paid 12.50.")


def chat(turns):
    messages = [{"role": "system", "content": SYSTEM}] if turns.has_system else []
    for question, answer in zip(ASKED, ANSWERED):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def expected_text(turns, train_on_eos):
    """The trained text of the chat, by what its template writes."""
    ends = {"turn": ("assistant",), "all": tuple(turns.ends), "last": (), "none": ()}[train_on_eos]
    pieces = [turns.ends["system"]] if "system" in ends and turns.has_system else []
    for number, reply in enumerate(turns.replies(ANSWERED)):
        pieces.append(turns.ends["user"] if "user" in ends else "")
        is_last = train_on_eos == "last" and number == len(ANSWERED) - 1
        pieces.append(reply + (turns.ends["assistant"] if "assistant" in ends or is_last else ""))
    return "".join(pieces)


@pytest.mark.proves("masks")
@pytest.mark.parametrize("train_on_eos", ["turn", "all", "last", "none"])
def test_only_the_assistant_s_turns_train(chatting, zoo_processor, train_on_eos):
    family = chat_family(chatting, zoo_processor)
    found = trained_text(family, RoleLoss(train_on_eos=train_on_eos), chat(chatting.turns))
    assert found == expected_text(chatting.turns, train_on_eos)


@pytest.mark.proves("masks")
def test_sampled_tokens_are_the_assistant_s_with_what_ends_its_turns(chatting, zoo_processor):
    family, turns = chat_family(chatting, zoo_processor), chatting.turns
    end = turns.ends["assistant"]
    stops = [turns.stop or end, turns.final_stop or end]
    expected = "".join(reply + stop for reply, stop in zip(turns.replies(ANSWERED), stops))
    assert trained_text(family, "sampled", chat(turns)) == expected


@pytest.mark.proves("masks")
def test_every_role_can_be_trained_alone(chatting, zoo_processor):
    family, turns = chat_family(chatting, zoo_processor), chatting.turns
    assert {"user", "assistant"} <= {marker.role for marker in family.role_markers}
    found = {role: trained_text(family, RoleLoss(roles=(role,)), chat(turns)) for role in ("user", "assistant")}
    for role, own, others in (("user", ASKED, ANSWERED), ("assistant", ANSWERED, ASKED)):
        assert all(text in found[role] for text in own)
        assert not any(text in found[role] for text in others)


@pytest.mark.proves("masks")
def test_tokens_of_a_picture_never_train(member, zoo_processor):
    """By the family's media tokens alone: the stretches that stand for images are not told here."""
    family = family_of(zoo_processor(member.name), model_type=member.model_type)
    dataset = {"files": "rows.jsonl", "kind": "pretrain", "add_eos": False}
    packing = PackingSettings(token_capacity=100_000, visual_capacity=100_000)
    preparation = Preparation(family, dataset, packing=packing, loss="all")
    for size in SIZES:
        sample = preparation.sample({"text": "Look: <image> Total 12.50", "images": [png(noise(size))]})
        ids, (start, count) = sample.input_ids, sample.blocks[0]
        labels = preparation.labels.of_arrays(
            ids, np.asarray([len(ids)]), np.asarray([LossRule.ALL]), np.zeros(len(ids), bool), []
        )
        special = set(family.tokenizer.get_added_vocab().values())
        assert not special & set(labels[start : start + count].tolist())
        assert (labels != IGNORE_INDEX).any()


def chat_family(chatting, zoo_processor):
    return family_of(zoo_processor(chatting.name), model_type=chatting.model_type)


def trained_text(family, loss, messages):
    text = family.processor.apply_chat_template(messages, tokenize=False)
    ids = np.asarray(family.tokenizer(text, add_special_tokens=False)["input_ids"])
    rules = np.asarray([LossRule.ROLES])
    labels = label_maker(loss, family).of_arrays(ids, np.asarray([len(ids)]), rules, np.zeros(len(ids), bool), [])
    return family.tokenizer.decode(labels[labels != IGNORE_INDEX], skip_special_tokens=False)


def test_the_zoo_has_every_family():
    registered = {model_type for family in FAMILIES for model_type in family.model_types}
    assert registered <= {member.model_type for member in ZOO.values()}


def test_settings_of_a_processor_that_change_a_picture_s_tokens_change_its_record(member, zoo_processor):
    """A dataset prepared with one is not taken for that of the other."""
    processor = zoo_processor(member.name)
    numbers = [name for name, value in vars(processor).items() if type(value) is int and not name.endswith("_id")]
    for name in numbers:
        changed = copy.copy(processor)
        setattr(changed, name, getattr(processor, name) * 2)
        spans = [tokens_of(each, member.model_type) for each in (processor, changed)]
        if spans[0] != spans[1]:
            assert processor_record(changed) != processor_record(processor), name


def tokens_of(processor, model_type):
    try:
        return family_of(processor, model_type=model_type).span((224, 224)).token_ids.tolist()
    except (UserError, ValueError) as error:
        return str(error)
