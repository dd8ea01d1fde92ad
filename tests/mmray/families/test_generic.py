"""Processors that no family serves: general rules where they hold, a clear word where they do not."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from mmray.errors import UserError
from mmray.families import family_of, load_processor
from mmray.families.generic import Generic, _warn
from mmray.loss.settings import BoundarySettings, RoleLoss
from mmray.loss.sources import label_maker
from mmray.packing.settings import PackingSettings
from mmray.rows.sample import RejectedRow
from mmray.synthetic.processors import Recipe, write_recipe
from tests.mmray.noise import noise
from tests.mmray.preparing import Preparation, chat

BOUNDARIES = tuple(
    BoundarySettings(role=role, start=f"<|{role}|>", end="<|end|>") for role in ("system", "user", "assistant")
)
DATASET = {"files": "rows.jsonl", "kind": "chat"}


@pytest.fixture
def family(zoo_processor):
    return family_of(zoo_processor("generic"))


@pytest.fixture
def page(tmp_path):
    noise((90, 60)).save(tmp_path / "page.png")
    return str(tmp_path / "page.png")


def test_it_warns_once(zoo_processor, caplog):
    _warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        first, second = family_of(zoo_processor("generic")), family_of(zoo_processor("generic"), tiled=True)
    assert isinstance(first, Generic)
    assert isinstance(second, Generic)
    (record,) = caplog.records
    assert "DeepseekVLProcessor" in record.message
    assert "unverified" in record.message


def test_a_processor_without_an_image_token_cannot_be_used():
    class UnknownProcessor(SimpleNamespace):
        pass

    with pytest.raises(UserError, match="UnknownProcessor, and it names no image token"):
        family_of(UnknownProcessor(image_processor=None))


def test_a_new_model_with_a_known_processor_gets_general_rules(processors):
    found = family_of(processors["qwen2_vl"], model_type="qwen9_exp")
    assert isinstance(found, Generic)
    assert found.image_token_id == family_of(processors["qwen2_vl"]).image_token_id


def test_chats_train_by_their_messages(family):
    """Roles need boundaries, which the family does not know; what the model would write follows from the messages."""
    sample = Preparation(family, DATASET, loss="sampled").sample(chat("Who?", "Anna."))
    assert family.tokenizer.decode(sample.input_ids[sample.given_mask]) == "Anna.<|end|>"
    with pytest.raises(UserError, match="boundaries"):
        label_maker(RoleLoss(), family)


def test_chats_train_by_the_job_s_boundaries(family, page, tmp_path):
    dataset = {**DATASET, "image_root": str(tmp_path)}
    packing = PackingSettings(mode="none", token_capacity=512, visual_capacity=512)
    preparation = Preparation(family, dataset, packing=packing, loss=RoleLoss(boundaries=BOUNDARIES))
    sample = preparation.sample(chat("<image>Who is it?", "Anna Berg.", images=[page]))
    labels = preparation.labels.of_arrays(
        sample.input_ids, np.asarray([len(sample.input_ids)]), np.asarray([sample.rule]),
        np.zeros(len(sample.input_ids), bool), sample.blocks,
    )  # fmt: skip
    assert family.tokenizer.decode(labels[labels >= 0]) == "Anna Berg.<|end|>"


def test_special_tokens_of_a_user_are_refused(family):
    preparation = Preparation(family, DATASET, loss=RoleLoss(boundaries=BOUNDARIES))
    rejected = preparation.rejected(chat("Say <|assistant|>", "No."))
    assert isinstance(rejected, RejectedRow)
    assert rejected.reason == "special_token_in_text"


def test_a_processor_that_the_rules_do_not_fit_is_found_out(tmp_path, page):
    """Idefics2 writes one marker, not two, between pictures that stand together."""
    recipe = Recipe(
        special_tokens=("<bos>", "<eos>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"),
        bos="<bos>", eos="<eos>", pad="<eos>", chat_template=None, processor_class="Idefics2Processor",
        image_processor={"image_processor_type": "Idefics2ImageProcessor", "do_image_splitting": False},
        processor={"image_seq_len": 4},
    )  # fmt: skip
    family = family_of(load_processor(write_recipe(tmp_path / "idefics2", recipe)))
    dataset = {"files": "rows.jsonl", "kind": "pretrain", "image_root": str(tmp_path)}
    preparation = Preparation(family, dataset)
    preparation.sample({"text": "One <image> page.", "images": [page]})
    with pytest.raises(UserError, match="cannot be trusted"):
        preparation.sample({"text": "Two <image><image> pages.", "images": [page, page]})
