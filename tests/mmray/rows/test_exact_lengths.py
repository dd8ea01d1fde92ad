"""The promise on real pages: stored tokens are those of the real processor on the real, upright, decoded images, and
preparing decodes none of them."""

import copy
import functools
import json

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
from PIL import Image

import mmray.images
from mmray.images import cut_tiles, load_image, plan_tiles
from mmray.packing.settings import PackingSettings
from tests.mmray.preparing import Preparation

PACKING = PackingSettings(token_capacity=16_384, visual_capacity=12_288, window_rows=32)
KINDS = {"pages": "pretrain", "chat": "chat"}


@pytest.fixture(scope="module", params=[None, {"preset": "ocr_pages"}], ids=["untiled", "ocr_pages"])
def preparation(request, shared_data, shared_processor):
    """Both shared row files, for each real processor, untiled and tiled."""
    datasets = [{"files": (str(shared_data / f"{name}.jsonl"),), "kind": kind} for name, kind in KINDS.items()]
    return Preparation(shared_processor, *datasets, tiling=request.param, packing=PACKING)


@pytest.fixture(scope="module")
def prepared(preparation, shared_data, tmp_path_factory):
    """What preparing makes of both files where decoding any image raises."""
    with pytest.MonkeyPatch.context() as patch:
        refuse_decoding(patch)
        with pytest.raises(Decoded), Image.open(shared_data / "pages/p0000.jpg") as page:
            page.convert("L")  # the trap works
        with pytest.raises(Decoded):
            mmray.images.load_image(shared_data / "pages/p0000.jpg")
        encode = preparation.encoder.encode
        some = lambda rows, **_: encode(rows, verify=range(0, len(rows), 32))  # noqa: E731
        patch.setattr(preparation.encoder, "encode", some)
        return preparation.write(tmp_path_factory.mktemp("exact") / "prepared")


@pytest.fixture(scope="module")
def rows(shared_data):
    """id -> (kind, row) of both files."""
    lines = {name: (shared_data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in KINDS}
    parsed = ((KINDS[name], json.loads(line)) for name in KINDS for line in lines[name])
    return {row["id"]: (kind, row) for kind, row in parsed}


def stored_tokens(prepared):
    """id -> token ids, of all samples of all bins."""
    stored = {}
    for number in range(len(prepared)):
        each = prepared.bin(number)
        samples = np.split(each.input_ids, each.sample_lengths.cumsum()[:-1])
        stored |= dict(zip(each.sample_ids, (ids.tolist() for ids in samples), strict=True))
    return stored


def real_tokens(kind, row, preparation, tiles):
    """What the processor makes of a row's text and decoded tiles: transformers alone, nothing of mmray's encoding.

    tiles: a list of images for each image of the row.
    """
    processor = preparation.family.processor
    unit = "<|vision_start|><|image_pad|><|vision_end|>" if "Qwen" in type(processor).__name__ else "<image>"
    if kind == "chat":
        text = processor.apply_chat_template(row["messages"], tokenize=False)
    else:
        text = row["text"].replace("<image>", unit)
    head, *tails = text.split(unit)
    text = head + "".join(unit * len(group) + tail for group, tail in zip(tiles, tails, strict=True))
    bos = processor.tokenizer.bos_token
    ids = processor(
        text=[text],
        images=[tile for group in tiles for tile in group] or None,
        add_special_tokens=not (kind == "chat" and bos and text.startswith(bos)),
        **preparation.family.processor_kwargs,
    )["input_ids"][0]
    return [*ids, processor.tokenizer.eos_token_id] if kind == "pretrain" else ids


@pytest.fixture
def pixels_once(preparation, monkeypatch):
    """The real image processor is called once for each list of pictures, as many rows share their page, and spares
    itself what changes the values of pixels alone: they are looked at in the tests of pixels, and not here."""
    kind, results = type(preparation.family.processor.image_processor), {}
    call = kind.__call__

    def called(self, images, *args, **options):
        key = tuple(id(picture) for group in images for picture in (group if isinstance(group, list) else [group]))
        if key not in results:
            plain = options | {"do_rescale": False, "do_normalize": False, "resample": Image.Resampling.NEAREST}
            results[key] = (images, call(self, images, *args, **plain))  # the pictures live on: an id is theirs
        return copy.copy(results[key][1])

    monkeypatch.setattr(kind, "__call__", called)


@pytest.mark.usefixtures("pixels_once")
def test_stored_tokens_are_the_real_processors_on_the_decoded_images(preparation, prepared, rows, shared_data):
    facts = prepared.statistics
    assert facts["rows_read"] == facts["rows_packed"] + facts["rows_rejected"] == len(rows)
    stored = stored_tokens(prepared)
    assert len(stored) == facts["rows_packed"] > 80
    assert stored.keys() | set(prepared.rejected()["id"].to_pylist()) == rows.keys()

    @functools.cache
    def tiles(name):
        image = load_image(shared_data / name)
        return cut_tiles(image, plan_tiles(image.size, preparation.policy))

    for row_id, ids in stored.items():
        kind, row = rows[row_id]
        expected = real_tokens(kind, row, preparation, [tiles(name) for name in row["images"]])
        assert len(ids) == len(expected), row_id
        assert ids == expected, row_id


class Decoded(BaseException):
    """Not an Exception: nothing on the way can take it for a broken image."""


def refuse_decoding(monkeypatch):
    """Decoding an image file raises. Pictures made in memory, as the verification uses, are none."""

    def refuse(*_, **__):
        raise Decoded

    load_in_memory = PIL.Image.Image.load

    def load(image):
        return refuse() if isinstance(image, PIL.ImageFile.ImageFile) else load_in_memory(image)

    monkeypatch.setattr(PIL.Image.Image, "load", load)
    for kind in [PIL.ImageFile.ImageFile, *subclasses(PIL.ImageFile.ImageFile)]:
        if "load" in vars(kind):
            monkeypatch.setattr(kind, "load", refuse)
    for module in (mmray.images, mmray.images.load):
        monkeypatch.setattr(module, "load_image", refuse)


def subclasses(kind):
    return [inner for direct in kind.__subclasses__() for inner in (direct, *subclasses(direct))]


def test_preparing_decodes_no_pixels(prepared):
    assert prepared.statistics["images"] > 50
    assert prepared.statistics["rows_packed"] > 80
