"""Rows to samples: the real processor's tokens, the blocks that stand for images, and what is too much or wrong."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmray.errors import RowError, UserError
from mmray.families import family_of, load_processor
from mmray.families.base import Span
from mmray.images import TilingPolicy, cut_tiles, load_image, plan_tiles
from mmray.loss.rules import IGNORE_INDEX, LossRule
from mmray.loss.settings import RoleLoss
from mmray.packing.settings import PackingSettings
from mmray.rows.encode import Encoder
from mmray.rows.preflight import sample_labels
from mmray.rows.read import RawRow
from mmray.rows.sample import RejectedRow, Sample
from mmray.rows.settings import DataSettings
from mmray.synthetic.documents import make_document
from mmray.synthetic.processors import write_processor
from tests.mmray.preparing import PACKING, PICTURES, Preparation, chat

ROOMY = PackingSettings(token_capacity=10_000, visual_capacity=10_000)
LABELLED = {"grid": (2, 2), "tile_size": (56, 56), "overview": (56, 56), "labels": True, "min_area": 5000}
TEXT = make_document(0, 0).text


@pytest.fixture(scope="session")
def prepare(processors, pictures):
    """A function that makes a Preparation of one set of rows."""

    def make(kind, family="qwen2_vl", *, tiling=None, packing=ROOMY, loss="sampled", data=None, **settings):
        dataset = {"files": ("rows.jsonl",), "kind": kind, "image_root": str(pictures)} | settings
        return Preparation(processors[family], dataset, tiling=tiling, packing=packing, loss=loss, **(data or {}))

    return make


def page_row(*names, text=TEXT):
    return {"id": "r", "text": "".join(f"<image>\n{text}" for _ in names) or text, "images": list(names)}


def expected_ids(preparation, row, pictures, *, add_special_tokens=True):
    """What the real processor makes of the row on its real images, cut as the policy says."""
    family, policy = preparation.family, preparation.policy
    plans = [plan_tiles(PICTURES[name], policy) for name in row["images"]]
    tiles = [tile for name, plan in zip(row["images"], plans) for tile in cut_tiles(load_image(pictures / name), plan)]
    head, *tails = row["text"].split("<image>")
    for plan, tail in zip(plans, tails, strict=True):
        head += "".join(
            f"{label}\n{family.placeholder_unit}" if label else family.placeholder_unit for label in plan.labels
        )
        head += tail
    options = {"add_special_tokens": add_special_tokens, **family.processor_kwargs}
    return family.processor(text=[head], images=tiles or None, **options)["input_ids"][0]


# ---- Tokens ----


@pytest.mark.parametrize("tiling", [None, {"grid": (2, 3), "tile_size": (56, 84), "overlap": 0.1}, LABELLED])
@pytest.mark.parametrize("names", [(), ("page.png",), ("small.png", "wide.png", "page.png")])
def test_tokens_are_those_of_the_real_processor(prepare, pictures, model_type, tiling, names):
    preparation = prepare("pretrain", model_type, tiling=tiling)
    row = page_row(*names)
    sample = preparation.sample(row)
    expected = expected_ids(preparation, row, pictures)
    assert sample.input_ids.tolist() == [*expected, preparation.family.tokenizer.eos_token_id]
    assert sample.input_ids.dtype == np.int32
    assert sample.visual_tokens == expected.count(preparation.family.image_token_id)
    assert sample.sizes == tuple(PICTURES[name] for name in names)
    assert (sample.id, sample.source, sample.rule) == ("r", "/nowhere/rows.jsonl:1", LossRule.ALL)


def test_the_end_of_document_token_can_be_left_out(prepare, pictures):
    with_eos, without = prepare("pretrain"), prepare("pretrain", add_eos=False)
    row = page_row("page.png")
    assert with_eos.sample(row).input_ids.tolist() == [
        *without.sample(row).input_ids.tolist(),
        with_eos.family.tokenizer.eos_token_id,
    ]
    assert without.sample(row).input_ids.tolist() == expected_ids(without, row, pictures)


def test_the_end_of_document_token_can_be_named(prepare):
    named = prepare("pretrain", end_of_document="<|endoftext|>")
    assert named.family.tokenizer.eos_token != "<|endoftext|>"
    assert named.sample(page_row("page.png")).input_ids[-1] == named.family.token_id("<|endoftext|>")
    with pytest.raises(UserError, match=r"end_of_document: .* has no token '<nothing>'"):
        prepare("pretrain", end_of_document="<nothing>").sample(page_row("page.png"))


def test_chats_have_no_token_after_the_template(prepare, model_type):
    preparation = prepare("chat", model_type)
    row = chat("<image>What is it?", "A page.", images=["page.png"])
    sample = preparation.sample(row)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A page."},
    ]
    processor = preparation.family.processor
    text = processor.apply_chat_template(messages, tokenize=False)
    bos = processor.tokenizer.bos_token
    special = not (bos and text.startswith(bos))
    page = Image.new("RGB", PICTURES["page.png"])
    assert (
        sample.input_ids.tolist() == processor(text=[text], images=[page], add_special_tokens=special)["input_ids"][0]
    )
    assert sample.rule == LossRule.GIVEN


LOSSES = {"sampled": "sampled", "all": "all", "roles": RoleLoss(), "inputs": RoleLoss(train_on_inputs=True)}


@pytest.mark.parametrize(
    ("loss", "chat_rule", "tokenized_rule"),
    [("sampled", "GIVEN", "GIVEN"), ("all", "ALL", "ALL"), ("roles", "ROLES", "ROLES"), ("inputs", "ALL", "ALL")],
)
def test_the_loss_is_a_rule_of_its_rows(prepare, loss, chat_rule, tokenized_rule):
    """That of `pretrain` rows is always every token."""
    ready = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    rows = {"chat": chat("Hi", "Yes"), "tokenized": ready, "pretrain": {"text": "Hi"}}
    rules = {kind: prepare(kind, loss=LOSSES[loss]).sample(row).rule.name for kind, row in rows.items()}
    assert rules == {"chat": chat_rule, "tokenized": tokenized_rule, "pretrain": "ALL"}


def test_a_batch_gives_what_its_rows_give_one_by_one(prepare):
    preparation = prepare("pretrain", tiling=LABELLED)
    texts = [make_document(1, number).text for number in range(40)]
    rows = [page_row(*list(PICTURES)[: number % 4], text=text) for number, text in enumerate(texts)]
    rows[7], rows[21] = {"text": 7}, {"images": []}
    together = preparation.encode(*rows, verify=False)
    for number, row in enumerate(rows):
        (alone,) = preparation.encode(row)
        assert type(alone) is type(together[number])
        if isinstance(alone, Sample):
            assert alone.input_ids.tolist() == together[number].input_ids.tolist()
            assert alone.blocks.tolist() == together[number].blocks.tolist()
    assert [type(result) for result in together].count(RejectedRow) == 2


def test_sets_of_one_job_are_read_each_in_its_way(processors, pictures):
    root = {"files": ("x",), "image_root": str(pictures)}
    preparation = Preparation(
        processors["qwen2_vl"],
        root | {"kind": "pretrain", "placeholder": "[img]"},
        root | {"kind": "chat", "columns": {"messages": "turns"}},
        packing=ROOMY,
    )
    values = [{"text": "[img] <image>", "images": ["page.png"]}, {"turns": chat("Hi", "Yes")["messages"]}]
    rows = [RawRow(f"x:{number}", number, value) for number, value in enumerate(values)]
    first, second = preparation.encoder.encode(rows)
    assert (first.rule, second.rule) == (LossRule.ALL, LossRule.GIVEN)
    crossed = [replace(row, dataset=1 - row.dataset) for row in rows]
    assert [result.reason for result in preparation.encoder.encode(crossed)] == ["missing_column", "missing_column"]


def test_a_tokenizer_file_that_cuts_texts_does_not_cut_rows(prepare, processors):
    good = prepare("pretrain")
    processor = copy.deepcopy(processors["qwen2_vl"])
    processor.tokenizer.backend_tokenizer.enable_truncation(16)
    processor.tokenizer.backend_tokenizer.enable_padding(length=500)
    encoder = Encoder(good.data, good.data.train, family_of(processor), good.policy, ROOMY)
    (sample,) = encoder.encode([RawRow("r:1", 0, page_row())])
    assert sample.input_ids.tolist() == good.sample(page_row()).input_ids.tolist()


def test_rows_that_need_an_end_token_need_a_tokenizer_that_has_one(processors):
    processor = copy.deepcopy(processors["qwen2_vl"])
    processor.tokenizer.eos_token = None
    dataset = {"files": ("x",), "kind": "pretrain"}
    with pytest.raises(UserError, match="add_eos: false"):
        Preparation(processor, dataset)
    assert Preparation(processor, dataset | {"add_eos": False}).sample(page_row()).input_ids.size


# ---- Images in the sample ----


@pytest.mark.parametrize("tiling", [None, LABELLED])
def test_blocks_are_the_tokens_that_stand_for_each_image(prepare, model_type, tiling):
    """All image tokens lie in the blocks, and with labels the first label and those between the tiles too."""
    preparation = prepare("pretrain", model_type, tiling=tiling)
    family = preparation.family
    sample = preparation.sample(page_row("page.png", "small.png", "wide.png"))
    inside = np.zeros(len(sample.input_ids), dtype=bool)
    for (start, count), name in zip(sample.blocks, ("page.png", "small.png", "wide.png"), strict=True):
        assert not inside[start : start + count].any()
        inside[start : start + count] = True
        text = family.tokenizer.decode(sample.input_ids[start : start + count])
        plan = plan_tiles(PICTURES[name], preparation.policy)
        assert text.startswith(plan.labels[0] or family.tokenizer.decode(family.span(plan.tile_sizes[0]).token_ids[:1]))
        assert [text.count(label) for label in plan.labels if label] == [1] * len(
            [each for each in plan.labels if each]
        )
    assert inside[sample.input_ids == family.image_token_id].all()
    outside = family.tokenizer.decode(sample.input_ids[~inside])
    assert "row1" not in outside
    assert "global" not in outside
    assert TEXT in outside


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3"])
def test_a_label_that_shares_a_token_with_the_text_before_is_in_the_block(tmp_path, pictures, family):
    """Many vocabularies have ".<" as one token."""
    processor = load_processor(write_processor(tmp_path, family, texts=["see.<row1_col1>\n" * 9]))
    dataset = {"files": ("x",), "kind": "pretrain", "image_root": str(pictures)}
    preparation = Preparation(processor, dataset, tiling=LABELLED | {"overview": None}, packing=ROOMY)
    alone, joined = (
        preparation.sample({"text": f"{text}<image>", "images": ["page.png"]}) for text in ("see. ", "see.")
    )
    tokenizer = preparation.family.tokenizer
    starts = [tokenizer.decode(sample.input_ids[sample.blocks[0][0] :])[:12] for sample in (alone, joined)]
    assert starts == ["<row1_col1>\n", ".<row1_col1>"]
    after = 1 + (family == "qwen2_vl")  # the end of the image, the end of the document
    assert [sample.blocks[0].sum() + after for sample in (alone, joined)] == [
        len(alone.input_ids),
        len(joined.input_ids),
    ]


def test_the_bucket_is_the_shape_that_all_images_share(prepare):
    preparation = prepare("pretrain", tiling={"preset": "ocr_pages", "tile_size": (56, 56)})
    assert preparation.sample(page_row()).bucket == "text"
    assert preparation.sample(page_row("page.png")).bucket == "2x3@56x56"
    assert preparation.sample(page_row("page.png", "small.png")).bucket == "2x3@56x56"
    assert preparation.sample(page_row("page.png", "wide.png")).bucket == "mixed"
    assert prepare("pretrain").sample(page_row("page.png", "wide.png")).bucket == "page"


def test_images_may_be_bytes(prepare, pictures):
    preparation = prepare("pretrain")
    data = (pictures / "page.png").read_bytes()
    sample = preparation.sample(page_row("page.png") | {"images": [data]})
    assert sample.input_ids.tolist() == preparation.sample(page_row("page.png")).input_ids.tolist()
    assert sample.images[0].data == data
    broken = preparation.rejected(page_row("page.png") | {"images": [data[:20]]})
    assert broken.reason == "image_unreadable"
    assert json.loads(broken.row)["images"] == ["<bytes>"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stored_turned_is_measured_upright(prepare, tmp_path, orientation):
    """Idefics3 writes its rows and columns as tokens, so a page measured lying has other tokens."""
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("L", (40, 160), 90).save(tmp_path / "turned.jpg", exif=exif)
    preparation = prepare("pretrain", "idefics3", image_root=str(tmp_path))
    sample = preparation.sample(page_row("turned.jpg"))
    assert sample.sizes == ((160, 40) if orientation >= 5 else (40, 160),)
    page = load_image(tmp_path / "turned.jpg")
    expected = preparation.family.processor(text=[f"<image>\n{TEXT}"], images=[page])["input_ids"][0]
    assert sample.input_ids[:-1].tolist() == expected


# ---- Rows set aside ----


@pytest.mark.parametrize(
    ("images", "reason", "words"),
    [
        (["nowhere.png"], "image_missing", ["nowhere.png", "image_root"]),
        (["notes.txt"], "image_unreadable", ["notes.txt", "text, which begins"]),
        (["empty.jpg"], "image_unreadable", ["empty.jpg", "the file is empty"]),
        (["../page.png"], "image_outside_root", ["'../page.png'", "image_root"]),
        (["http://host/page.png"], "image_scheme", ["http://host/page.png", "local paths or of"]),
        (["file:///page.png"], "image_scheme", ["file:///page.png"]),
        (["a\0b"], "image_unreadable", [r"a\x00b"]),
        (["."], "image_unreadable", ["is a folder"]),
    ],
)
def test_images_that_cannot_be_used(prepare, tmp_path, images, reason, words):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    rejected = prepare("pretrain", image_root=str(tmp_path)).rejected(page_row(*images))
    assert rejected.reason == reason
    assert all(word in rejected.message for word in words), rejected.message


def test_an_image_with_too_many_pixels_is_set_aside(prepare):
    limit = 170 * 220
    assert prepare("pretrain", data={"max_image_pixels": limit}).sample(page_row("page.png"))
    rejected = prepare("pretrain", data={"max_image_pixels": limit - 1}).rejected(page_row("page.png"))
    assert rejected.reason == "image_too_large"
    assert "37400 pixels, more than 37399" in rejected.message


def test_an_image_too_long_for_the_processor_is_set_aside(prepare, tmp_path):
    Image.new("L", (2, 600)).save(tmp_path / "line.png")
    rejected = prepare("pretrain", image_root=str(tmp_path)).rejected(page_row("line.png"))
    assert rejected.reason == "image_shape"
    assert "(2, 600)" in rejected.message


@pytest.mark.parametrize("kind", ["pretrain", "chat", "tokenized"])
def test_a_row_is_rejected_whole_when_it_is_over_a_capacity(prepare, kind):
    row = page_row("page.png")
    ids = prepare("pretrain").sample(row).input_ids
    if kind == "chat":
        row = chat(f"<image>{TEXT}", "Yes.", images=["page.png"])
    if kind == "tokenized":
        row = {"input_ids": ids.tolist(), "labels": ids.tolist(), "images": ["page.png"]}
    sample = prepare(kind).sample(row)
    tokens, visual = len(sample.input_ids), sample.visual_tokens
    fits = PackingSettings(token_capacity=tokens, visual_capacity=visual)
    assert prepare(kind, packing=fits).sample(row).input_ids.tolist() == sample.input_ids.tolist()

    rejected = prepare(kind, packing=fits.model_copy(update={"token_capacity": tokens - 1})).rejected(row)
    assert rejected.reason == "too_long"
    assert f"{tokens} tokens, packing.token_capacity is {tokens - 1}" in rejected.message
    rejected = prepare(kind, packing=fits.model_copy(update={"visual_capacity": visual - 1})).rejected(row)
    assert rejected.reason == "too_many_visual_tokens"
    assert f"{visual} visual tokens, packing.visual_capacity is {visual - 1}" in rejected.message


def test_a_rejected_row_shows_its_place_id_and_content(prepare):
    rejected = prepare("pretrain").rejected({"id": "a#1", "text": "", "note": "ü" * 1000})
    assert (rejected.id, rejected.source, rejected.reason) == ("a#1", "/nowhere/rows.jsonl:1", "empty_text")
    assert rejected.row.startswith('{"id": "a#1", "text": "", "note": "üüü')
    assert len(rejected.row) == 500


@pytest.mark.parametrize("row_id", [None, True, float("nan"), ["a"], {"a": "b" * 1000}])
def test_a_rejected_row_without_an_id_goes_by_its_place(prepare, row_id):
    assert prepare("pretrain").rejected({"id": row_id, "text": ""}).id == "/nowhere/rows.jsonl:1"


def test_a_row_that_could_not_be_read_keeps_its_reason(prepare):
    rejected = prepare("pretrain").rejected(RowError("bad_json", "the line is not JSON"))
    assert (rejected.reason, rejected.message, rejected.row) == ("bad_json", "the line is not JSON", "{}")


def test_rows_that_nest_to_the_limit_are_rejected(prepare):
    """A nest that the parser just took can be too deep for whatever looks at it later."""
    nest: object = "x"
    for _ in range(5000):
        nest = [nest]
    for row in ({"text": nest}, {"text": "<image>", "images": [nest]}, {"id": nest, "text": "x"}):
        assert prepare("pretrain").rejected(row).reason in ("bad_json", "wrong_type")
    assert prepare("chat").rejected({"messages": [nest]}).reason in ("bad_json", "wrong_type")


def test_on_bad_row_error_stops_at_the_first_with_file_line_reason_and_way_out(prepare):
    preparation = prepare("pretrain", data={"on_bad_row": "error"})
    with pytest.raises(UserError) as caught:
        preparation.encode(page_row(), {"text": 7}, {"text": ""})
    message = str(caught.value)
    assert message.startswith("/nowhere/rows.jsonl:2: wrong_type: text must be a string, not int 7")
    assert "on_bad_row: reject" in message
    assert "\n" not in message
    too_long = prepare("pretrain", data={"on_bad_row": "error"}, packing=PACKING)
    with pytest.raises(UserError, match=r"rows.jsonl:1: too_long"):
        too_long.encode({"text": TEXT * 20})


# ---- Tokenized rows ----


@pytest.fixture(params=[None, LABELLED], ids=["untiled", "tiled"])
def ready(request, prepare, model_type):
    """A Preparation of tokenized rows, and such a row with two images, made as a user would: by the processor."""
    text = prepare("pretrain", model_type, tiling=request.param)
    ids = text.sample(page_row("page.png", "small.png")).input_ids.tolist()
    labels = [token if number % 3 else IGNORE_INDEX for number, token in enumerate(ids)]
    row = {"id": "t", "input_ids": ids, "labels": labels, "images": ["page.png", "small.png"]}
    return prepare("tokenized", model_type, tiling=request.param), row


def test_ready_made_tokens_stay_as_they_are(ready, prepare):
    preparation, row = ready
    sample = preparation.sample(row)
    assert sample.input_ids.tolist() == row["input_ids"]
    assert sample.given_mask.tolist() == [label != IGNORE_INDEX for label in row["labels"]]
    assert sample.rule == LossRule.GIVEN
    image_tokens = np.flatnonzero(sample.input_ids == preparation.family.image_token_id)
    assert sample.visual_tokens == len(image_tokens)
    inside = np.concatenate([np.arange(start, start + count) for start, count in sample.blocks])
    assert set(image_tokens) <= set(inside)
    text = {"text": page_row("page.png", "small.png")["text"], "images": row["images"]}
    same = prepare("pretrain", model_type_of(preparation), tiling=preparation.tiling).sample(text)
    assert [start + count for start, count in sample.blocks] == [start + count for start, count in same.blocks]
    assert sample.bucket == same.bucket


def model_type_of(preparation):
    return {"Qwen2VLProcessor": "qwen2_vl", "Qwen2_5_VLProcessor": "qwen2_5_vl", "Idefics3Processor": "idefics3",
            "SmolVLMProcessor": "smolvlm"}[type(preparation.family.processor).__name__]  # fmt: skip


def test_ready_made_tokens_must_be_as_many_as_their_images_make(ready):
    preparation, row = ready
    image_token = preparation.family.image_token_id
    place = row["input_ids"].index(image_token)
    one_less = {name: row[name][:place] + row[name][place + 1 :] for name in ("input_ids", "labels")}
    rejected = preparation.rejected(row | one_less)
    assert rejected.reason == "image_tokens"
    assert str(list(map(PICTURES.get, row["images"]))) in rejected.message
    assert preparation.rejected(row | {"images": ["page.png"]}).reason == "image_tokens"
    assert preparation.rejected(row | {"images": []}).reason == "image_tokens"
    none_left = [token for token in row["input_ids"] if token != image_token]
    rejected = preparation.rejected(row | {"input_ids": none_left, "labels": none_left})
    assert rejected.reason == "placeholder_count"


def test_ready_made_tokens_must_stand_in_the_order_of_the_images(prepare, model_type):
    """Both orders have as many image tokens, but the model would read one image's features as the other's."""
    names = ["page.png", "strip.png"]
    ids = prepare("pretrain", model_type).sample(page_row(*names)).input_ids.tolist()
    row = {"input_ids": ids, "labels": ids, "images": names}
    assert prepare("tokenized", model_type).sample(row).sizes == tuple(map(PICTURES.get, names))
    rejected = prepare("tokenized", model_type).rejected(row | {"images": names[::-1]})
    assert rejected.reason == "image_tokens"
    assert "in the order of images" in rejected.message


def test_markers_around_ready_made_image_tokens_must_be_the_processors(prepare, processors):
    preparation = prepare("tokenized", "idefics3")
    ids = prepare("pretrain", "idefics3").sample(page_row("page.png")).input_ids
    marker = processors["idefics3"].tokenizer.convert_tokens_to_ids("<row_1_col_1>")
    ids = np.where(ids == marker, marker + 1, ids).tolist()
    assert preparation.rejected({"input_ids": ids, "labels": ids, "images": ["page.png"]}).reason == "image_tokens"


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"input_ids": None}, "missing_column", "'input_ids'"),
        ({"labels": None}, "missing_column", "the row has no 'labels' and no 'sampled_mask'"),
        (
            {"sampled_mask": "010"},
            "wrong_type",
            "sampled_mask must be a list of true and false (or 1 and 0), not '010'",
        ),
        ({"sampled_mask": [0, 1, 2]}, "wrong_type", "[0, 1, 2]"),
        ({"sampled_mask": [0, 1.0, 1]}, "wrong_type", "[0, 1.0, 1]"),
        ({"sampled_mask": [0, None, 1]}, "wrong_type", "[0, None, 1]"),
        ({"sampled_mask": [0, 1]}, "wrong_type", "the row has 3 tokens and sampled_mask 2 entries"),
        ({"sampled_mask": [1, 1, 1]}, "wrong_type", "labels[0] is -100 but sampled_mask[0] is 1: they disagree"),
        ({"sampled_mask": [0, 1, 0]}, "wrong_type", "labels[2] is 3 but sampled_mask[2] is 0: they disagree"),
        ({"input_ids": "123"}, "wrong_type", "'123'"),
        ({"input_ids": [1.0, 2, 3]}, "wrong_type", "[1.0, 2, 3]"),
        ({"input_ids": [True, 2, 3]}, "wrong_type", "[True, 2, 3]"),
        ({"input_ids": []}, "wrong_type", "input_ids has 0 entries"),
        ({"labels": [1, 2]}, "wrong_type", "the row has 3 tokens and labels 2 entries"),
        ({"labels": [1, 7, 3]}, "wrong_type", "labels[1] is 7: a label is its token (2) or -100"),
        ({"labels": [1, -1, 3]}, "wrong_type", "labels[1] is -1"),
        ({"input_ids": [1, -2, 3], "labels": [1, -2, 3]}, "wrong_type", "input_ids[1] is -2: the tokenizer has 0 to"),
        ({"input_ids": [1, 2, 10**6], "labels": [1, 2, -100]}, "wrong_type", "input_ids[2] is 1000000"),
        ({"input_ids": [1, 2**31, 3]}, "wrong_type", "input_ids holds a number that is no token id"),
        ({"labels": [1, 10**30, 3]}, "wrong_type", "labels holds a number"),
    ],
)
def test_ready_made_rows_that_cannot_be_used(prepare, changes, reason, words):
    row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    assert prepare("tokenized").sample(row).given_mask.tolist() == [False, True, True]
    rejected = prepare("tokenized").rejected(row | changes)
    assert rejected.reason == reason
    assert words in rejected.message


@pytest.mark.parametrize("flags", [[False, True, False], [0, 1, 0], [0, True, False]])
@pytest.mark.parametrize("labels", [{}, {"labels": None}, {"labels": [-100, 2, -100]}])
def test_ready_made_rows_may_say_what_was_sampled(prepare, flags, labels):
    sample = prepare("tokenized").sample({"input_ids": [1, 2, 3], "sampled_mask": flags} | labels)
    assert sample.given_mask.tolist() == [False, True, False]
    assert sample.rule == LossRule.GIVEN


@pytest.mark.parametrize("flags", [[0, 1, 1, 0], [False, True, True, False]])
def test_what_is_masked_from_attention_never_trains(prepare, flags):
    row = {"input_ids": [1, 2, 3, 3], "labels": [1, 2, 3, 3], "attention_mask": flags}
    assert prepare("tokenized").sample(row).given_mask.tolist() == [False, True, True, False]
    whole = prepare("tokenized").sample(row | {"attention_mask": None})  # the same ids: a pad's number says nothing
    assert whole.given_mask[1:].tolist() == [True, True, True]
    rejected = prepare("tokenized").rejected(row | {"attention_mask": [1, 1]})
    assert "the row has 4 tokens and attention_mask 2 entries" in rejected.message
    assert (
        "attention_mask must be a list" in prepare("tokenized").rejected(row | {"attention_mask": [0, 2, 1, 1]}).message
    )
    renamed = prepare("tokenized", columns={"attention_mask": "seen"})
    sample = renamed.sample({"input_ids": [1, 2, 3], "labels": [1, 2, 3], "seen": [1, 1, 0]})
    assert sample.given_mask[1:].tolist() == [True, False]


@pytest.mark.parametrize("loss", [LOSSES["all"], LOSSES["roles"], LOSSES["inputs"]])
def test_what_is_masked_from_attention_trains_in_no_mode(prepare, loss):
    preparation = prepare("tokenized", loss=loss)
    found = preparation.sample({"input_ids": [1, 2, 3, 4], "attention_mask": [1, 1, 0, 0]})
    (labels,) = sample_labels([found], preparation.labels)
    assert labels[2:].tolist() == [IGNORE_INDEX] * 2


def test_the_mask_may_stand_in_another_column(prepare):
    preparation = prepare("tokenized", columns={"sampled_mask": "loss_mask", "labels": "targets"})
    sample = preparation.sample({"input_ids": [1, 2], "loss_mask": [0, 1], "labels": "not read", "sampled_mask": 7})
    assert sample.given_mask.tolist() == [False, True]
    rejected = preparation.rejected({"input_ids": [1, 2], "labels": [1, 2]})
    assert (rejected.reason, "'targets' and no 'loss_mask'" in rejected.message) == ("missing_column", True)


@pytest.mark.parametrize("loss", [LOSSES["all"], LOSSES["roles"], LOSSES["inputs"]])
@pytest.mark.parametrize("own", [{}, {"labels": "nonsense"}, {"sampled_mask": [1], "labels": [7, 7, 7]}])
def test_other_modes_do_not_read_labels(prepare, loss, own):
    sample = prepare("tokenized", loss=loss).sample({"input_ids": [1, 2, 3]} | own)
    assert (sample.input_ids.tolist(), len(sample.given_mask)) == ([1, 2, 3], 0)
    assert prepare("tokenized", loss=loss).rejected({"input_ids": []} | own).reason == "wrong_type"


# ---- Verification ----


def wrong_family(processor, change):
    """A family of qwen2_vl whose spans are not the processor's."""
    right = family_of(processor)

    class Wrong(type(right)):
        def _measure_span(self, tile_size, num_tiles):
            return change(super()._measure_span(tile_size, num_tiles))

    return Wrong(processor)


@pytest.mark.parametrize(
    "change",
    [
        lambda span: Span(span.token_ids[:-1], span.visual_tokens - 1),
        lambda span: Span(np.append(span.token_ids, span.token_ids[:1]), span.visual_tokens + 1),
        lambda span: Span(np.append(span.token_ids[:-1], 5).astype(np.int32), span.visual_tokens - 1),
    ],
    ids=["one short", "one long", "another token"],
)
@pytest.mark.parametrize("add_eos", [True, False])
def test_verification_stops_a_family_that_measures_wrong(prepare, processors, pictures, change, add_eos):
    good = prepare("pretrain", add_eos=add_eos)
    wrong = wrong_family(processors["qwen2_vl"], change)
    encoder = Encoder(good.data, good.data.train, wrong, TilingPolicy(), ROOMY)
    rows = [RawRow(f"r:{line}", 0, page_row(*names)) for line, names in enumerate([(), ("page.png",), ("page.png",)])]
    assert len(encoder.encode(rows, verify=[0])) == 3  # text alone is measured well
    with pytest.raises(UserError, match=r"^r:1: row 'r' has \d+ tokens by mmray and \d+ by Qwen2VLProcessor"):
        encoder.encode(rows, verify=[1])


def test_verification_passes_over_rejected_rows(prepare):
    assert prepare("pretrain").rejected({"text": ""}, verify=True).reason == "empty_text"


def test_data_settings_refuse_columns_that_do_not_exist():
    with pytest.raises(ValueError, match="'txt' is not a field of pretrain rows; they have id, text, images"):
        DataSettings(train=[{"files": "x", "kind": "pretrain", "columns": {"txt": "a"}}])
