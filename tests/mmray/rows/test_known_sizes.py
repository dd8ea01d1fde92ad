"""Rows encoded with known sizes of images are those encoded without, and no image is opened for them."""

import pyarrow as pa
import pytest

from mmray.images.size_cache import FILE_NAME, SIZES, SizeCache, merge_sizes, read_sizes
from mmray.prepared.window import samples_table
from mmray.rows.encode import Encoder
from mmray.rows.read import RawRow
from tests.mmray.preparing import PACKING, PICTURES, Preparation, blank_unseen, write_pictures

NO_SIZES = pa.table({name: [] for name in SIZES.names}, schema=SIZES)


@pytest.fixture
def rows(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"nothing")
    names = [*PICTURES, "broken.png", "missing.png", "page.png"]
    values = [{"text": f"<image> No. {number}", "images": [name]} for number, name in enumerate(names)]
    values.append({"text": "<image> <image>", "images": ["small.png", "wide.png"]})
    return [RawRow(f"{tmp_path}/rows.jsonl:{line}", 0, value) for line, value in enumerate(values, start=1)]


@pytest.fixture
def encoder(tmp_path, processors):
    """A function: an encoder, with the sizes in `cache`."""
    dataset = {"files": f"{tmp_path}/rows.jsonl", "kind": "pretrain", "image_root": str(tmp_path)}
    preparation = Preparation(processors["qwen2_vl"], dataset, tiling={"grid": (2, 1), "tile_size": (56, 56)})

    def encoder(cache=None, **data):
        settings = preparation.data.model_copy(update=data)
        known = {} if cache is None else {"measure": cache.measured}
        return Encoder(settings, settings.train, preparation.family, preparation.policy, PACKING, **known)

    return encoder


def encoded(encoder, rows):
    return samples_table(encoder.encode(rows))


def test_the_samples_are_the_same_whatever_is_known(encoder, rows, tmp_path):
    expected = encoded(encoder(), rows)
    assert sorted(filter(None, expected["reason"].to_pylist())) == ["image_missing", "image_unreadable"]
    first = SizeCache(NO_SIZES)
    assert encoded(encoder(first), rows).equals(expected)
    merge_sizes(str(tmp_path), [first.take_new()])
    assert len(read_sizes(str(tmp_path))) == len(PICTURES)
    again = SizeCache(read_sizes(str(tmp_path)))
    assert encoded(encoder(again), rows).equals(expected)
    assert len(again.take_new()) == 0
    whole = (tmp_path / FILE_NAME).read_bytes()
    (tmp_path / FILE_NAME).write_bytes(whole[:60] + b"\xff" + whole[61:])
    damaged = SizeCache(read_sizes(str(tmp_path)))
    assert encoded(encoder(damaged), rows).equals(expected)
    assert len(damaged.take_new()) == len(PICTURES)


def test_no_known_image_is_opened(encoder, rows, tmp_path):
    first = SizeCache(NO_SIZES)
    expected = encoded(encoder(first), rows)
    for name in PICTURES:
        blank_unseen(tmp_path / name)
    assert set(encoded(encoder(), rows)["reason"].to_pylist()) == {"image_unreadable", "image_missing"}
    merge_sizes(str(tmp_path), [first.take_new()])
    assert encoded(encoder(SizeCache(read_sizes(str(tmp_path)))), rows).equals(expected)


def test_the_limit_of_pixels_is_the_job_s(encoder, rows):
    cache = SizeCache(NO_SIZES)
    encoder(cache).encode(rows)
    reasons = encoded(encoder(cache, max_image_pixels=40 * 60), rows)["reason"].to_pylist()
    assert reasons.count("image_too_large") == len(PICTURES) + 1
