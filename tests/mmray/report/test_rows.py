"""What the rows of a dataset are like, against counts made by hand and by the real processor."""

import numpy as np
import pytest
from PIL import Image

from mmray.config.job import Job
from mmray.inspect.view import family_of_prepared
from mmray.packing.settings import PackingSettings
from mmray.prepared.estimate import estimate_split
from mmray.prepared.row_measures import RowMeasures, measured_bins
from mmray.report.rows import PERCENTILES, RowFacts, fit, odd_pages, percentiles, suggestion
from tests.here import prepare_here
from tests.mmray.preparing import Preparation, chat, other_packing, write_rows

SIZES = {"small.png": (56, 84), "wide.png": (300, 100)}


def rows_of(folder):
    """Pages of one and two pictures, of texts of known length, and chats."""
    for name, size in SIZES.items():
        Image.new("L", size, 220).save(folder / name)
    pages = [
        {"id": "one", "text": "<image>\n" + "a " * 7, "images": ["small.png"]},
        {"id": "two", "text": "<image><image> 31", "images": ["small.png", "wide.png"]},
        {"id": "empty", "text": "<image>\n ", "images": ["wide.png"]},
        {"id": "plain", "text": "025"},
    ]
    question = [{"type": "image"}, {"type": "text", "text": "Read it, every word of it."}]
    talk = {"id": "talk", "images": ["wide.png"], "messages": [
        {"role": "user", "content": question}, {"role": "assistant", "content": "1234"},
    ]}  # fmt: skip
    return write_rows(folder / "pages.jsonl", pages), write_rows(folder / "chats.jsonl", [talk, chat("5?", "6")])


def test_rows_are_measured_as_the_processor_and_a_person_would(tmp_path, processors):
    pages, chats = rows_of(tmp_path)
    processor = processors["qwen2_vl"]
    made = Preparation(processor, {"files": pages, "kind": "pretrain"}, {"files": chats, "kind": "chat"})
    prepared = made.write(tmp_path / "out")
    measures = measured_bins(prepared, made.family)
    rows = {name: place for place, name in enumerate(measures.ids.tolist())}
    assert len(rows) == 6

    def value(name, row_id):
        return int(getattr(measures, name)[rows[row_id]])

    pictures = {name: Image.new("RGB", size) for name, size in SIZES.items()}
    image_token = "<|image_pad|>"

    def real_visual(*names):
        text = "<|vision_start|><|image_pad|><|vision_end|>" * len(names)
        output = processor(text=[text], images=[pictures[name] for name in names])
        ids = list(output["input_ids"][0])
        return ids.count(processor.tokenizer.convert_tokens_to_ids(image_token))

    assert value("visual_tokens", "one") == real_visual("small.png")
    assert value("visual_tokens", "two") == real_visual("small.png", "wide.png")
    assert value("visual_tokens", "plain") == 0
    assert measures.visual_tokens.sum() == prepared.statistics["visual_tokens"]
    assert measures.tokens.sum() == prepared.statistics["tokens"]
    assert value("pixels", "two") == 56 * 84 + 300 * 100
    assert value("images", "two") == 2
    # Each digit is a token. No text to be written: a sample's first token, what a user says, templates, white space.
    assert [value("text_tokens", name) for name in ("two", "plain", "talk", "empty")] == [2, 2, 4, 0]
    assert value("text_tokens", "one") == 7
    assert [value("sets", name) for name in ("one", "talk")] == [0, 1]
    assert measures.sources[rows["plain"]] == f"{pages}:4"
    pictured = [measures.pictures[rows[name]] for name in ("two", "plain")]
    assert pictured == [str(tmp_path / "small.png"), ""]


def test_of_many_rows_some_are_measured(tmp_path, processors):
    rows = [{"id": str(number), "text": "word " * 30} for number in range(400)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    made = Preparation(processors["qwen2_vl"], {"files": path, "kind": "pretrain"})
    prepared = made.write(tmp_path / "out")
    whole = measured_bins(prepared, made.family)
    part = measured_bins(prepared, made.family, most_tokens=prepared.statistics["tokens"] // 4)
    assert sorted(whole.ids) == sorted(str(number) for number in range(400))
    assert 0 < len(part) <= 200
    assert set(part.ids) < set(whole.ids)


def measures_of(tokens, visual=None, text=None, pixels=None, sets=None):
    """Measures of rows with one image each."""
    count = len(tokens)
    names = np.asarray([f"row {number}" for number in range(count)], dtype=object)
    return RowMeasures(
        sets=np.asarray([0] * count if sets is None else sets),
        tokens=np.asarray(tokens),
        visual_tokens=np.asarray([1] * count if visual is None else visual),
        text_tokens=np.asarray([5] * count if text is None else text),
        images=np.ones(count, dtype=np.int64),
        pixels=np.asarray([10_000] * count if pixels is None else pixels),
        buckets=np.full(count, "page", dtype=object),
        ids=names,
        sources=names,
        pictures=names,
    )


def test_percentiles_are_values_of_rows_at_their_rank():
    random = np.random.default_rng(0)
    tokens = random.integers(1, 5000, 1000)
    sets = np.repeat([0, 1], 500)
    table = [
        entry for entry in percentiles(measures_of(tokens, sets=sets), {0: "a", 1: "b"}) if entry.measure == "tokens"
    ]
    assert [entry.row_set for entry in table] == ["a", "b"]
    for entry, values in zip(table, (tokens[:500], tokens[500:])):
        ordered = sorted(values.tolist())
        assert entry.values == (*(ordered[500 * percent // 100 - 1] for percent in PERCENTILES), ordered[-1])


def test_rows_over_a_capacity_and_the_capacity_that_keeps_99_percent():
    needs = np.arange(1, 1001)
    of_all = fit("packing.token_capacity", 900, needs, np.ones(1000))
    assert (of_all.over, of_all.keeps) == (100, 990)
    # A packed row stands for ten, a rejected one for itself.
    weighted = fit("packing.token_capacity", 900, needs, np.where(needs > 900, 1.0, 10.0))
    total, kept = 900 * 10 + 100, 0
    expected = next(need for need in needs if (kept := kept + (1 if need > 900 else 10)) >= 0.99 * total)
    assert (weighted.over, weighted.keeps) == (100, expected)


def test_the_rows_that_a_prepare_rejected_as_too_long_count(tmp_path, processors):
    texts = ["word " * length for length in range(1, 101)] + ["word " * 900] * 25
    path = write_rows(tmp_path / "rows.jsonl", [{"id": str(n), "text": text} for n, text in enumerate(texts)])
    dataset = {"files": path, "kind": "pretrain"}
    made = Preparation(processors["qwen2_vl"], dataset, packing=PackingSettings(token_capacity=256, visual_capacity=64),
                       max_rejected_share=1.0)  # fmt: skip
    prepared = made.write(tmp_path / "out")
    rejected = prepared.statistics["rejected_by_reason"]["too_long"]
    assert rejected > 1
    (tokens,) = RowFacts.of_prepared(prepared, made.family).fits
    assert (tokens.setting, round(tokens.over), tokens.rows) == ("packing.token_capacity", rejected, 125)
    roomy = other_packing(made, token_capacity=tokens.keeps, max_rejected_share=1.0).write(tmp_path / "roomy")
    assert roomy.statistics["rows_packed"] == 125
    tight = other_packing(made, token_capacity=tokens.keeps - 1, max_rejected_share=1.0).write(tmp_path / "tight")
    assert tight.statistics["rows_packed"] < 0.99 * 125


def test_pages_without_text_and_with_far_too_little_or_too_much_of_it():
    text, pixels = [100] * 40, [1_000_000] * 40
    text[3], text[7], text[11], pixels[20] = 0, 2, 5000, 4000
    empty, little, much = odd_pages(measures_of([200] * 40, text=text, pixels=pixels))
    assert (empty.count, little.count, much.count) == (1, 1, 2)
    assert [odd.pages for odd in (empty, little, much)] == [40] * 3
    assert empty.examples[0].startswith("row 3, row 3: 0 tokens")
    assert little.examples[0].startswith("row 7,")
    assert [example.split(",")[0] for example in much.examples] == ["row 11", "row 20"]
    # Each set is compared with itself: pages of little text in a set of such pages are none to look at.
    sets = [0] * 20 + [1] * 20
    usual = odd_pages(measures_of([200] * 40, text=[100] * 20 + [3] * 20, pixels=[1_000_000] * 40, sets=sets))
    assert [odd.count for odd in usual] == [0, 0, 0]


def test_the_suggested_setting_fills_bins_as_it_says(tmp_path, processors):
    """Rows of more than half a bin, so that each has one alone."""
    rows = [{"id": str(number), "text": "12345" * (28 + number % 6)} for number in range(120)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    packing = PackingSettings(token_capacity=256, visual_capacity=64)
    made = Preparation(processors["qwen2_vl"], {"files": path, "kind": "pretrain"}, packing=packing)
    prepared = made.write(tmp_path / "out")
    assert prepared.statistics["token_fill"] < 0.85
    text = RowFacts.of_prepared(prepared, made.family).suggestion
    assert text is not None
    setting, _, rest = text.split("packing.")[1].partition(": ")
    value = int(rest.split()[0].replace(",", ""))
    better = other_packing(made, **{setting: value}).write(tmp_path / "better")
    assert f"they would be {better.statistics['token_fill']:.0%} full" in text
    assert better.statistics["token_fill"] > prepared.statistics["token_fill"]


def test_images_that_limit_bins_get_room():
    """A third of the tokens is visual, the visual capacity a quarter of the bin."""
    measures = measures_of([30] * 600, visual=[10] * 600)
    tight = PackingSettings(token_capacity=1200, visual_capacity=300)
    text = suggestion(measures, tight)
    assert text is not None
    assert "packing.visual_capacity: 512 " in text
    assert suggestion(measures, tight.model_copy(update={"visual_capacity": 512})) is None


def test_a_dry_run_sees_what_a_prepare_makes(inputs, tmp_path):
    job = Job.model_validate(inputs.job(tmp_path))
    prepared = prepare_here(job)
    family = family_of_prepared(prepared)
    assert family is not None
    after = RowFacts.of_prepared(prepared, family)
    before = RowFacts.of_estimate(estimate_split(job, "train", family, prepared.tiling), job, "train", family)
    rejected = prepared.statistics["rejected_by_reason"]
    assert rejected["too_long"] > 0
    assert [(fits.over, fits.keeps) for fits in before.fits] == [(fits.over, fits.keeps) for fits in after.fits]
    assert round(before.fits[0].over) == rejected["too_long"]
    assert "2 rows that are too long were not compared" in after.fits[1].text
    assert "compared" not in before.fits[1].text
    assert {entry.row_set: entry.rows for entry in before.percentiles if entry.measure == "tokens"} == {
        entry.row_set: entry.rows + 1  # the row of each set that is too long
        for entry in after.percentiles
        if entry.measure == "tokens"
    }


@pytest.mark.parametrize("mode", ["none", "equal_cost"])
def test_other_modes_of_packing_are_left_alone(mode):
    packing = PackingSettings(mode=mode, token_capacity=1000, visual_capacity=1000)
    assert suggestion(measures_of([600] * 50), packing) is None
