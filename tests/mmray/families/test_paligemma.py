"""What of a row PaliGemma sees as a whole and what it learns, against its processor's own `suffix`."""

import numpy as np
import pytest
import torch

from mmray.batches.micro_batch import MicroBatch, Place, mask, render
from mmray.config.compatibility import check_model, check_packing
from mmray.errors import UserError
from mmray.families import family_of
from mmray.loss.rules import IGNORE_INDEX
from mmray.loss.sources import LossSource
from mmray.packing.settings import PackingSettings
from mmray.rows.preflight import described
from tests.mmray.families.small_models import small_model
from tests.mmray.families.test_packed_equals_unpacked import error, logits_of
from tests.mmray.families.zoo import ZOO
from tests.mmray.noise import noise
from tests.mmray.preparing import Preparation, write_rows

CPU = torch.device("cpu")
PICTURE = noise((50, 40))


@pytest.fixture
def processor(zoo_processor):
    return zoo_processor("paligemma")


@pytest.fixture
def preparation(processor, tmp_path):
    """A function: rows of a kind, written and prepared; pictures are a.png and b.png."""

    def prepare(*rows, kind="pretrain", **options):
        for seed, name in enumerate("ab"):
            noise((50, 40), seed).save(tmp_path / f"{name}.png")
        dataset = {"files": write_rows(tmp_path / "rows.jsonl", rows), "kind": kind}
        prepared = Preparation(
            family_of(processor), dataset, packing=PackingSettings(token_capacity=512, visual_capacity=256, **options)
        )
        return prepared, prepared.write(tmp_path / "prepared")

    return prepare


def micro_batch(prepared, dataset):
    assert len(dataset) == 1
    rendered = render([dataset.bin(0)], Place(0, 0, 0), prepared.family, dataset.tiling)
    return MicroBatch(mask(rendered, prepared.family, prepared.labels, CPU), prepared.family)


@pytest.mark.parametrize(
    ("text", "prompt", "answer"),
    [
        ("<image>\nTotal 12.50\n\nPaid.", "<image>", "Total 12.50\n\nPaid."),
        ("<image>Total 12.50", "<image>", "Total 12.50"),
        ("<image>\n\n\nTotal", "<image>", "\n\nTotal"),
        ("Read: <image>\n and <image> it", "Read: <image>\n and <image>", " it"),
        ("<image>\n  Total", "<image>", "  Total"),
    ],
)
def test_tokens_and_labels_are_those_of_the_processor(preparation, processor, text, prompt, answer):
    count = text.count("<image>")
    prepared, dataset = preparation({"text": text, "images": ["a.png", "b.png"][:count]})
    expected = processor(text=[prompt], images=[PICTURE] * count, suffix=[answer])
    packed = dataset.bin(0)
    assert packed.input_ids.tolist() == expected["input_ids"][0]
    batch = micro_batch(prepared, dataset)
    assert batch.labels[0].tolist() == expected["labels"][0].tolist()
    assert batch.masked.position_ids.tolist() == [list(range(1, len(packed.input_ids) + 1))]
    assert packed.trained_tokens == sum(expected["token_type_ids"][0])


def test_text_without_an_image_has_the_same_form(preparation, processor):
    prepared, dataset = preparation({"text": "Total 12.50"})
    tokenizer = processor.tokenizer
    text = tokenizer("Total 12.50<eos>")["input_ids"]
    assert dataset.bin(0).input_ids.tolist() == [*tokenizer("<bos>\n")["input_ids"], *text]
    labels = micro_batch(prepared, dataset).labels[0]
    assert labels[labels != IGNORE_INDEX].tolist() == text


def test_rows_that_end_with_an_image_train_their_end_alone(preparation, processor):
    prepared, dataset = preparation({"text": "What is it? <image>", "images": ["a.png"]})
    labels = micro_batch(prepared, dataset).labels[0]
    assert labels[labels != IGNORE_INDEX].tolist() == [processor.tokenizer.eos_token_id]


@pytest.mark.parametrize("loss", ["sampled", "all"])
def test_the_log_says_that_answers_train(processor, loss):
    preparation = Preparation(family_of(processor), {"files": "rows.jsonl", "kind": "pretrain"}, loss=loss)
    assert preparation.encoder.sources == [LossSource.ANSWER]
    assert described(LossSource.ANSWER, preparation.labels, ()) == "what follows each row's prompt"


def test_there_are_no_chats(processor):
    with pytest.raises(UserError, match=r"PaliGemmaProcessor knows no chats.*pretrain.*tokenized with labels"):
        Preparation(family_of(processor), {"files": "rows.jsonl", "kind": "chat"})


# ---- Prompts after the image ----

ASKED = [("<image>ocr", "a.png", "Total 12.50"), ("<image>where is the total?", "b.png", "At the end of the page.")]


def test_in_tokenized_rows_the_prompt_ends_where_training_begins(preparation, processor, zoo_folder):
    """Samples with prompts of other lengths are those that the model makes of the processor's types of tokens."""
    model = small_model("paligemma", zoo_folder("paligemma"))
    alone = [
        processor(text=[text], images=[noise((50, 40), seed)], suffix=[suffix], return_tensors="pt")
        for seed, (text, _, suffix) in enumerate(ASKED)
    ]
    rows = [
        {
            "id": str(number),
            "input_ids": inputs["input_ids"][0].tolist(),
            "labels": inputs["labels"][0].tolist(),
            "images": [image],
        }
        for number, (inputs, (_, image, _)) in enumerate(zip(alone, ASKED))
    ]
    prepared, dataset = preparation(*rows, kind="tokenized")
    batch = micro_batch(prepared, dataset)
    logits = logits_of(model, batch.model_inputs(CPU, torch.float32, model.config))
    ordered = [alone[int(number)] for number in dataset.bin(0).sample_ids]
    for found, inputs in zip(logits.split([len(each["input_ids"][0]) for each in ordered]), ordered):
        expected = {name: value for name, value in inputs.items() if name != "labels"}
        assert error(found, logits_of(model, expected)) < 1e-5
        causal_prompt = expected | {"token_type_ids": (inputs["input_ids"] != model.config.image_token_id).long()}
        assert error(found, logits_of(model, causal_prompt)) > 0.01


def test_no_answer_shows_the_token_it_is_to_predict(preparation, processor, zoo_folder):
    """A changed answer changes nothing that comes before it, in its sample or in another."""
    model = small_model("paligemma", zoo_folder("paligemma"))
    rows = [{"text": "<image>\nTotal 12.50", "images": ["a.png"]}, {"text": "No picture here."}]
    prepared, dataset = preparation(*rows)
    inputs = micro_batch(prepared, dataset).model_inputs(CPU, torch.float32, model.config)
    logits = logits_of(model, inputs)
    lengths = dataset.bin(0).sample_lengths
    ends = lengths.cumsum()
    for number, end in enumerate(ends):
        ids = inputs["input_ids"].clone()
        ids[0, end - 3] += 1
        difference = (logits_of(model, inputs | {"input_ids": ids}) - logits).abs().amax(1)
        changed = np.flatnonzero(difference > 1e-3)
        assert changed[0] == end - 3, number
        assert changed[-1] < end


# ---- PaliGemma 2 ----


def config_of(zoo_folder, name, attention):
    config = ZOO[name].config(zoo_folder(name))
    config._attn_implementation = attention
    return config


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_its_text_model_takes_eager_attention_alone(processor, zoo_folder, attention):
    check_model(config_of(zoo_folder, "paligemma2", "eager"), family_of(processor))
    with pytest.raises(UserError, match=f"gemma2, runs without {attention}.*attention: eager"):
        check_model(config_of(zoo_folder, "paligemma2", attention), family_of(processor))


@pytest.mark.parametrize(("capacity", "fits"), [(512, True), (513, False)])
def test_samples_longer_than_its_window_are_not_packed(processor, zoo_folder, capacity, fits):
    config, family = config_of(zoo_folder, "paligemma2", "eager"), family_of(processor)
    packing = PackingSettings(token_capacity=capacity, visual_capacity=64)
    if fits:
        check_packing(config, family, packing, 4)
        return
    with pytest.raises(UserError, match=r"up to 513 tokens .* sliding window of its layers, 512 tokens"):
        check_packing(config, family, packing, 1)
    check_packing(config_of(zoo_folder, "paligemma", "sdpa"), family, packing, 1)


def test_a_long_sample_alone_keeps_the_window(preparation, processor, zoo_folder):
    """With a mask it would lose it; the samples of a bin within the window get masks all the same."""
    name = "paligemma2, long samples"
    model = small_model(name, zoo_folder(name), "eager")
    row = {"text": "<image>\nTotal 12.50, to be paid within thirty days of this letter.", "images": ["a.png"]}
    prepared, dataset = preparation(row, mode="none")
    batch = micro_batch(prepared, dataset)
    inputs = batch.model_inputs(CPU, torch.float32, model.config)
    assert "attention_mask" not in inputs
    logits = logits_of(model, inputs)
    model.config.get_text_config().sliding_window = 512  # of the masks alone: layers have read theirs
    try:
        masked = batch.model_inputs(CPU, torch.float32, model.config)
    finally:
        model.config.get_text_config().sliding_window = 12
    assert "token_type_ids" not in masked
    assert error(logits_of(model, masked), logits) > 0.05
