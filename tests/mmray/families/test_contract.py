"""What a family may ask of the rows it gets: gaps between samples, bins of one sample, an image in every row."""

import copy
import io
from itertools import accumulate

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PretrainedConfig

from mmray.batches.micro_batch import MicroBatch, Place, mask, render
from mmray.families.idefics3 import Idefics3
from mmray.families.qwen2_vl import Qwen2VL
from mmray.loss.rules import IGNORE_INDEX
from mmray.packing.settings import PackingSettings
from tests.mmray.noise import noise
from tests.mmray.preparing import Preparation, write_rows


class Gapped(Idefics3):
    sample_gap = 3


class NeedsImages(Idefics3):
    takes_text_only = False


def page(seed: int) -> dict[str, bytes]:
    buffer = io.BytesIO()
    noise((50, 40), seed).save(buffer, "png")
    return {"bytes": buffer.getvalue()}


ROWS = [{"id": str(number), "text": f"Total {number}.50 " + "more " * (number % 5)} for number in range(12)]


def prepared(tmp_path, family, **packing):
    tmp_path.mkdir(exist_ok=True)
    for number in (2, 7):
        noise((50, 40), number).save(tmp_path / f"{number}.png")
    rows = [
        row | {"text": f"<image>{row['text']}", "images": [f"{row['id']}.png"]} if row["id"] in "27" else row
        for row in ROWS
    ]
    dataset = {"files": write_rows(tmp_path / "rows.jsonl", rows), "kind": "pretrain"}
    preparation = Preparation(family, dataset, packing=PackingSettings(visual_capacity=500, **packing))
    return preparation, preparation.write(tmp_path / "prepared")


def test_gaps_stand_between_samples_alone(tmp_path, processors):
    family = Gapped(processors["idefics3"])
    preparation, dataset = prepared(tmp_path, family, token_capacity=90)
    assert len(dataset) > 1
    for number in range(len(dataset)):
        packed = dataset.bin(number)
        count = len(packed.sample_lengths)
        assert packed.sample_lengths.sum() + 3 * (count - 1) <= 90
        rendered = render([packed], Place(0, 0, 0), family, dataset.tiling)
        masked = mask(rendered, family, preparation.labels, torch.device("cpu"))
        samples = np.split(packed.input_ids, packed.sample_lengths.cumsum()[:-1])
        gap = [family.padding_id] * 3
        expected = [ids.tolist() for sample in samples for ids in (np.asarray(gap), sample)][1:]
        dummy = len(masked.lengths) - len(expected)
        assert dummy == (not packed.images)
        starts = [0, *accumulate(map(len, expected))]
        for start, ids, is_padding in zip(starts, expected, masked.padding):
            stop = start + len(ids)
            assert masked.input_ids[start:stop].tolist() == ids
            assert masked.position_ids[0, start:stop].tolist() == list(range(len(ids)))
            assert is_padding == (ids == gap)
            assert (masked.labels[start] == IGNORE_INDEX).all()
            assert (masked.labels[start + 1 : stop] == IGNORE_INDEX).all() == is_padding
        assert (masked.labels != IGNORE_INDEX).sum() == packed.trained_tokens
        for start, tokens in masked.blocks:
            assert family.image_token_id in masked.input_ids[start : start + tokens]
        batch = MicroBatch(masked, family)
        assert batch.num_tokens == len(packed.input_ids)
        inputs = batch.model_inputs(torch.device("cpu"), torch.float32, PretrainedConfig())
        assert inputs["input_ids"].shape == inputs["position_ids"].shape == (1, len(masked.input_ids))


def test_a_sample_that_fills_a_bin_needs_no_gap(tmp_path, processors):
    family = Gapped(processors["idefics3"])
    _, roomy = prepared(tmp_path / "roomy", family, token_capacity=500)
    longest = int(roomy.bin(0).sample_lengths.max())
    _, tight = prepared(tmp_path / "tight", family, token_capacity=longest)
    assert tight.statistics["rows_packed"] == len(ROWS)


def test_bins_of_one_sample(tmp_path, processors):
    _, dataset = prepared(tmp_path, Idefics3(processors["idefics3"]), token_capacity=500, mode="none")
    assert len(dataset) == len(ROWS)
    assert [dataset.bin(number).sample_ids for number in range(len(dataset))] == [[row["id"]] for row in ROWS]


def test_rows_without_an_image_are_rejected_where_a_model_cannot_learn_from_them(processors):
    preparation = Preparation(NeedsImages(processors["idefics3"]), {"files": "rows.jsonl", "kind": "pretrain"})
    assert preparation.rejected({"text": "No picture."}).reason == "needs_image"
    preparation.sample({"text": "<image>", "images": [page(0)]})


@pytest.mark.parametrize("num_tiles", [1, 3])
def test_the_number_of_pictures_reaches_the_family(tmp_path, processors, num_tiles):
    """Some processors treat a lone picture in another way."""
    seen = []

    class Counting(Idefics3):
        def span(self, tile_size, num_tiles=1):
            seen.append(num_tiles)
            return super().span(tile_size, num_tiles)

        def frames(self, tile: Image.Image, num_tiles: int = 1):
            seen.append(num_tiles)
            return super().frames(tile, num_tiles)

    noise((50, 40)).save(tmp_path / "page.png")
    row = {"text": "<image>" * num_tiles, "images": ["page.png"] * num_tiles}
    dataset = {"files": write_rows(tmp_path / "rows.jsonl", [row]), "kind": "pretrain"}
    preparation = Preparation(Counting(processors["idefics3"]), dataset)
    prepared = preparation.write(tmp_path / "prepared")
    assert set(seen) == {num_tiles}
    seen.clear()
    render([prepared.bin(0)], Place(0, 0, 0), preparation.family, prepared.tiling)
    assert seen == [num_tiles] * num_tiles


def test_blank_tokens_that_a_tokenizer_adds_are_no_structure(processors):
    """Gemma's vocabulary has line breaks among its added tokens; headers end with one."""
    processor = copy.deepcopy(processors["qwen2_vl"])
    processor.tokenizer.add_tokens(["\n"])
    family = Qwen2VL(processor)
    assert "\n" not in family.structure_tokens
    assert "<|im_start|>" in family.structure_tokens
