"""Micro-batches: rendered, masked, sent between processes, and dealt to ranks."""

import io
import json
import warnings
from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import PretrainedConfig

from mmray.batches import micro_batch as batch_module
from mmray.batches.micro_batch import Masked, MicroBatch, Place, Rendered, from_table, mask, render, to_table
from mmray.batches.plan import BatchMaker, BatchPlan
from mmray.config.resources import TileCacheSettings
from mmray.errors import UserError
from mmray.images import tile_cache
from mmray.images.header import MAX_PIXELS, opened_image
from mmray.loss.rules import IGNORE_INDEX
from mmray.packing.settings import PackingSettings
from mmray.schedule.schedule import Schedule
from tests.mmray.noise import noise
from tests.mmray.preparing import Preparation, blank_unseen, chat, write_rows

CPU = torch.device("cpu")
PLACE = Place(step=7, rank=2, micro=1)
CONFIG = PretrainedConfig()
SIZES = {"wide.png": (150, 90), "tall.png": (60, 170), "small.png": (40, 40)}


class World:
    """Rows of all kinds with their pictures, prepared."""

    def __init__(self, folder, processor, *, tiled=False):
        self.folder = folder
        for seed, (name, size) in enumerate(SIZES.items()):
            noise(size, seed).save(folder / name)
        pages = [
            {"id": "wide", "text": "<image>\nTotal 12.50", "images": ["wide.png"]},
            {"id": "pair", "text": "Two: <image> and <image>.", "images": ["tall.png", "small.png"]},
            {"id": "plain", "text": "All trains run daily."},
        ]
        chats = [
            chat("Which? <image>", "A label.", "Sure?", "Yes.", images=["small.png"], id="label"),
            chat("Who?", "Anna Berg.", id="who"),
        ]
        tokens = processor.tokenizer("Emma Fischer, Mill Lane 4")["input_ids"]
        labels = [token if number % 3 else IGNORE_INDEX for number, token in enumerate(tokens)]
        ready = [{"id": "ready", "input_ids": tokens, "labels": labels}]
        side = 64 if processor.image_processor.to_dict().get("max_image_size") else 56
        self.preparation = Preparation(
            processor,
            {"files": write_rows(folder / "pages.jsonl", pages), "kind": "pretrain"},
            {"files": write_rows(folder / "chats.jsonl", chats), "kind": "chat"},
            {"files": write_rows(folder / "ready.jsonl", ready), "kind": "tokenized"},
            tiling={"grid": (2, 2), "tile_size": (side, side)} if tiled else {},
            packing=PackingSettings(token_capacity=130, visual_capacity=130),
        )
        self.family, self.labels = self.preparation.family, self.preparation.labels
        self.prepared = self.preparation.write(folder / "prepared")

    def bins(self):
        return [self.prepared.bin(number) for number in range(len(self.prepared))]

    def render(self, bins) -> Rendered:
        return render(bins, PLACE, self.family, self.prepared.tiling)

    def mask(self, bins) -> Masked:
        return mask(self.render(bins), self.family, self.labels, CPU)

    def bin_of(self, row_id):
        (found,) = [each for each in self.bins() if row_id in each.sample_ids]
        return found


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, processors):
    """Built when asked for; not to be changed."""
    made = {}

    def world(model_type, tiled=False):
        if (model_type, tiled) not in made:
            folder = tmp_path_factory.mktemp(model_type)
            made[model_type, tiled] = World(folder, processors[model_type], tiled=tiled)
        return made[model_type, tiled]

    return world


@pytest.fixture
def own_world(tmp_path, processors):
    """A world to break."""
    return World(tmp_path, processors["qwen2_vl"])


def assert_same(found, expected):
    for field in fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert one.dtype == other.dtype, field.name
        assert one.shape == other.shape, field.name
        assert one.tobytes() == other.tobytes(), field.name


# ---- What a micro-batch holds ----


@pytest.mark.parametrize("tiled", [False, True])
def test_bins_become_one_row(worlds, model_type, tiled):
    world = worlds(model_type, tiled)
    bins = world.bins()
    assert len(bins) > 1
    masked = world.mask([bins[0], None, *bins[1:]])
    assert masked.bins.tolist() == list(range(len(bins)))
    assert masked.input_ids.tolist() == [token for each in bins for token in each.input_ids]
    assert masked.lengths.tolist() == [length for each in bins for length in each.sample_lengths]
    assert not masked.padding.any()
    assert masked.trained_tokens == sum(each.trained_tokens for each in bins) == (masked.labels != IGNORE_INDEX).sum()
    assert len(masked.blocks) == sum(len(each.images) for each in bins)
    unit = set(world.family.media_token_ids)
    for start, count in masked.blocks:
        assert set(masked.input_ids[start : start + count]) & unit
        assert (masked.labels[start : start + count] == IGNORE_INDEX).all()
    outside = np.ones(len(masked.input_ids), bool)
    for start, count in masked.blocks:
        outside[start : start + count] = False
    assert world.family.image_token_id not in masked.input_ids[outside]
    assert masked.tiles[:, 3].sum() == len(masked.frame_sizes)
    assert len(masked.pixels) == sum(width * height * 3 for width, height in masked.frame_sizes.tolist())


def test_given_labels_are_kept(worlds, model_type):
    world = worlds(model_type)
    bins = world.bins()
    masked = world.mask(bins)
    row = json.loads((world.folder / "ready.jsonl").read_text())
    ids = [row_id for each in bins for row_id in each.sample_ids]
    start = int(masked.lengths[: ids.index("ready")].sum())
    assert masked.labels[start : start + len(row["labels"])].tolist() == row["labels"]


def test_place_and_bins_are_kept(worlds):
    world = worlds("qwen2_vl")
    batch = MicroBatch(world.mask([None, world.bins()[1]]), world.family)
    assert batch.place == PLACE
    assert batch.bins == [1]
    assert batch.labels.shape == (1, len(batch.masked.input_ids))


def test_an_empty_micro_batch(worlds, model_type):
    world = worlds(model_type)
    batch = MicroBatch(from_table(Masked, to_table(world.mask([None, None]))), world.family)
    assert batch.place == PLACE
    assert batch.bins == []
    assert (batch.labels == IGNORE_INDEX).all()
    assert batch.model_inputs(CPU, torch.float32, CONFIG)["pixel_values"].numel() > 0


def test_a_sample_with_more_positions_than_the_model_is_told_once(worlds, model_type, caplog, monkeypatch):
    """Those of rows and columns where the model takes such: a picture has fewer than tokens."""
    monkeypatch.setattr(batch_module, "_reported_limits", set())
    world = worlds(model_type)
    masked = world.mask(world.bins())
    most = max(int(masked.position_ids[-1].max()), int(masked.position_ids[-3:].max())) + 1
    batch = MicroBatch(masked, world.family)
    for limit in (most, most - 1, most - 1):
        config = PretrainedConfig(max_position_embeddings=limit)
        batch.model_inputs(CPU, torch.float32, config)
    (said,) = (record.getMessage() for record in caplog.records)
    assert f"a sample has {most} positions, more than the {most - 1} that the model was made for" in said


# ---- Between processes ----


@pytest.mark.parametrize("tiled", [False, True])
def test_tables_keep_every_bit(worlds, model_type, tiled):
    world = worlds(model_type, tiled)
    for bins in (world.bins(), [None], [None, world.bins()[0]], [world.bin_of("who")]):
        rendered = world.render(bins)
        received = from_table(Rendered, to_table(rendered))
        assert_same(received, rendered)
        masked = mask(rendered, world.family, world.labels, CPU)
        assert_same(mask(received, world.family, world.labels, CPU), masked)
        arrived = from_table(Masked, to_table(masked))
        assert_same(arrived, masked)
        expected = MicroBatch(masked, world.family).model_inputs(CPU, torch.float32, CONFIG)
        found = MicroBatch(arrived, world.family).model_inputs(CPU, torch.float32, CONFIG)
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name])


def test_pictures_are_not_copied(worlds):
    rendered = worlds("qwen2_vl").render(worlds("qwen2_vl").bins())
    received = from_table(Rendered, to_table(rendered))
    assert np.shares_memory(received.pixels, rendered.pixels)


def test_one_row_of_a_larger_table_or_file(worlds):
    world = worlds("qwen2_vl")
    rendered = [world.render(bins) for bins in (world.bins(), [None], [world.bins()[0]])]
    table = pa.concat_tables(map(to_table, rendered))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    arrived = pa.ipc.open_stream(sink.getvalue()).read_all()
    for source in (table, table.combine_chunks(), arrived):
        for number, expected in enumerate(rendered):
            assert_same(from_table(Rendered, source.slice(number, 1)), expected)


def test_arrays_of_a_table_pass_to_torch_without_a_warning(worlds):
    world = worlds("qwen2_vl")
    table = to_table(world.render(world.bins()))
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            masked = mask(from_table(Rendered, table), world.family, world.labels, CPU)
            MicroBatch(from_table(Masked, to_table(masked)), world.family).model_inputs(CPU, torch.float32, CONFIG)
    finally:
        torch.set_warn_always(False)


# ---- What is wrong with the data ----


def test_a_picture_of_another_size(own_world):
    noise((151, 90)).save(own_world.folder / "wide.png")
    with pytest.raises(UserError, match=r"row 'wide' \(.*pages\.jsonl:1\)") as caught:
        own_world.render(own_world.bins())
    message = str(caught.value)
    assert str(own_world.folder / "wide.png") in message
    assert "150 x 90" in message
    assert "151 x 90" in message
    assert "\n" not in message


def test_another_picture_of_the_same_size_is_taken(own_world):
    before = own_world.render(own_world.bins())
    noise(SIZES["wide.png"], 99).save(own_world.folder / "wide.png")
    after = own_world.render(own_world.bins())
    assert (before.pixels != after.pixels).any()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "image_corrupt"),
        (lambda path: path.write_bytes(b"no picture"), "image_unreadable"),
    ],
)
def test_a_picture_that_is_gone_or_broken(own_world, spoil, message):
    path = own_world.folder / "small.png"  # the second picture of one row, the only one of another
    spoil(path)
    for row_id in ("pair", "label"):
        lone = own_world.bin_of(row_id)
        images = [image for image in lone.images if lone.sample_ids[image["sample"]] == row_id]
        with pytest.raises(UserError, match=message) as caught:
            own_world.render([replace(lone, images=images)])
        assert f"row '{row_id}'" in str(caught.value)
        assert str(path) in str(caught.value)
        assert str(caught.value).count(str(path)) == 1


def test_pictures_as_bytes(tmp_path, processors):
    """Rows may carry their pictures; Parquet files do. A broken one is named by its row."""
    noise((90, 60)).save(tmp_path / "a.png")
    noise((90, 60)).save(tmp_path / "a.jpg", quality=95)
    frames = []
    for name, images in (("path", ["a.png"]), ("data", [{"bytes": (tmp_path / "a.png").read_bytes()}])):
        pq.write_table(pa.Table.from_pylist([{"id": name, "text": "<image> A", "images": images}]), tmp_path / name)
        preparation = Preparation(
            processors["qwen2_vl"], {"files": str(tmp_path / name), "kind": "pretrain", "format": "parquet"}
        )
        prepared = preparation.write(tmp_path / f"prepared-{name}")
        packed = prepared.bin(0)
        frames.append(render([packed], PLACE, preparation.family, prepared.tiling).pixels)
    assert np.array_equal(*frames)
    image = {**packed.images[0], "data": (tmp_path / "a.jpg").read_bytes()[:-500]}
    with pytest.raises(UserError, match=r"row 'data' \(.*\): image_corrupt: image of \d+ bytes"):
        render([replace(packed, images=[image])], PLACE, preparation.family, prepared.tiling)


def test_a_page_above_the_usual_limit_was_let_in_by_its_job(own_world, monkeypatch):
    """`data.max_image_pixels` may be raised; training must not refuse what preparing took."""
    seen, one_pixel = [], io.BytesIO()
    Image.new("RGB", (1, 1)).save(one_pixel, "PNG")

    def opened(source, max_pixels):
        seen.append(max_pixels)
        return opened_image(one_pixel, max_pixels)

    monkeypatch.setattr("mmray.images.render.opened_image", opened)
    whole = own_world.bin_of("wide")
    image = {**whole.images[0], "width": 30_000, "height": 20_000}
    with pytest.raises(UserError, match="30000 x 20000"):
        own_world.render([replace(whole, images=[image])])
    with pytest.raises(UserError, match="the image now has 1 x 1"):
        own_world.render([whole])
    assert seen == [600_000_000, MAX_PIXELS]


def test_image_tokens_that_do_not_fit_the_pictures(own_world):
    whole = own_world.bin_of("wide")
    assert "wide" in whole.sample_ids
    with pytest.raises(UserError, match=r"image tokens but .* image features.*prepare it anew"):
        own_world.render([replace(whole, images=whole.images[1:])])


def test_trained_tokens_that_are_not_those_prepared(own_world):
    whole = own_world.bins()[0]
    rendered = own_world.render([replace(whole, trained_tokens=whole.trained_tokens + 1)])
    with pytest.raises(
        RuntimeError,
        match=rf"bins \[0\]: {whole.trained_tokens} trained tokens, {whole.trained_tokens + 1} when prepared",
    ):
        mask(rendered, own_world.family, own_world.labels, CPU)


# ---- The loader ----


@pytest.fixture(scope="module")
def plan_of(tmp_path_factory, processor_folders, processors):
    """A function: a plan over a dataset of several bins."""
    folder = tmp_path_factory.mktemp("many")
    noise((60, 40)).save(folder / "page.png")
    rows = [
        {"id": f"row-{number}", "text": f"<image> No. {number}", "images": ["page.png"]}
        if number % 3
        else {"id": f"row-{number}", "text": f"Total {number}.50 and more"}
        for number in range(22)
    ]
    preparation = Preparation(
        processors["qwen2_vl"],
        {"files": write_rows(folder / "rows.jsonl", rows), "kind": "pretrain"},
        packing=PackingSettings(token_capacity=40, visual_capacity=40),
    )
    prepared = preparation.write(folder / "prepared")

    def make(world_size, micro_batch_bins=1, global_batch_bins=4):
        schedule = Schedule(len(prepared), global_batch_bins, seed=3, fingerprint=prepared.fingerprint)
        return BatchPlan(
            model_type=None,
            prepared=prepared.path, processor=str(processor_folders["qwen2_vl"]), trust_remote_code=False,
            loss="sampled", schedule=schedule, world_size=world_size, micro_batch_bins=micro_batch_bins,
        )  # fmt: skip

    return make


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_bins", [1, 2])
def test_ranks_cover_each_step_once(plan_of, world_size, micro_batch_bins):
    plan = plan_of(world_size, micro_batch_bins)
    schedule = plan.schedule
    assert schedule.num_bins % schedule.global_batch_bins > 0  # the last step is padded
    ranks = [list(BatchMaker(plan).steps(rank, 0, schedule.steps_per_epoch)) for rank in range(world_size)]
    epoch = []
    for step in range(schedule.steps_per_epoch):
        dealt = []
        for rank in range(world_size):
            assert len(ranks[rank][step]) == plan.micro_batches
            for micro, batch in enumerate(ranks[rank][step]):
                assert batch.place == Place(step, rank, micro)
                dealt += batch.bins
        assert sorted(dealt) == sorted(number for number in schedule.bins(step) if number is not None)
        epoch += dealt
    assert sorted(epoch) == list(range(schedule.num_bins))


def test_the_same_bins_make_the_same_micro_batch_on_any_rank(plan_of):
    one, two = plan_of(1), plan_of(2)
    first = {batch.bins[0]: batch for batch in next(BatchMaker(one).steps(0, 0, 1))}
    others = [batch for rank in range(2) for batch in next(BatchMaker(two).steps(rank, 0, 1)) if batch.bins]
    assert {batch.bins[0] for batch in others} == set(first)
    for batch in others:
        assert_same(replace(batch.masked, place=first[batch.bins[0]].masked.place), first[batch.bins[0]].masked)


def test_steps_start_anywhere(plan_of):
    maker = BatchMaker(plan_of(2))
    late = list(maker.steps(1, 2, 4))
    assert [[batch.place for batch in batches] for batches in late] == [
        [Place(step, 1, micro) for micro in range(maker.plan.micro_batches)] for step in (2, 3)
    ]
    assert_same(late[0][0].masked, list(maker.steps(1, 0, 3))[2][0].masked)


# ---- The tile cache ----


@pytest.fixture
def cached_maker(tmp_path, processors, processor_folders):
    """A function: a maker over two pages in one bin, with a tile cache where room is given for it."""
    world = World(tmp_path, processors["qwen2_vl"], tiled=True)
    bins = len(world.prepared)
    plan = BatchPlan(
        model_type=None,
        prepared=world.prepared.path, processor=str(processor_folders["qwen2_vl"]), trust_remote_code=False,
        loss="sampled", schedule=Schedule(bins, bins, seed=0, fingerprint=""), world_size=1, micro_batch_bins=bins,
    )  # fmt: skip

    def make(gigabytes=None):
        settings = gigabytes and TileCacheSettings(folder=str(tmp_path / "tiles"), max_gigabytes=gigabytes)
        return BatchMaker(plan, tile_cache=settings)

    return make


START = Place(0, 0, 0)


def test_micro_batches_from_kept_tiles_are_the_same(cached_maker, tmp_path):
    """And are made without the pictures."""
    expected = cached_maker().micro_batch(START).masked
    assert not (tmp_path / "tiles").exists()
    assert_same(cached_maker(1).micro_batch(START).masked, expected)
    entries = list((tmp_path / "tiles").glob("*/*.tiles"))
    assert len(entries) == len(SIZES)
    for name in SIZES:
        blank_unseen(tmp_path / name)
    assert_same(cached_maker(1).micro_batch(START).masked, expected)
    with pytest.raises(UserError, match="image_unreadable"):
        cached_maker().micro_batch(START)


def test_a_damaged_tile_cache_is_a_warning(cached_maker, tmp_path, caplog):
    expected = cached_maker(1).micro_batch(START).masked
    for entry in (tmp_path / "tiles").glob("*/*.tiles"):
        entry.write_bytes(entry.read_bytes()[:-7])
    for _ in range(2):
        assert_same(cached_maker(1).micro_batch(START).masked, expected)
    assert len(caplog.messages) == len(SIZES)
    assert all("the page is cut anew" in message for message in caplog.messages)


def test_a_full_disk_is_a_warning(cached_maker, tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tile_cache, "_fill", full)
    assert_same(cached_maker(1).micro_batch(START).masked, cached_maker().micro_batch(START).masked)
    (message,) = caplog.messages
    assert "No space left on device; pages are cut anew" in message


def test_the_tile_cache_keeps_to_its_bound(cached_maker, tmp_path):
    expected = cached_maker().micro_batch(START).masked
    assert_same(cached_maker(40e-6).micro_batch(START).masked, expected)
    sizes = [entry.stat().st_size for entry in (tmp_path / "tiles").glob("*/*.tiles")]
    assert 0 < len(sizes) < len(SIZES)
    assert sum(sizes) <= 40_000


def test_a_tile_cache_that_cannot_be_made_is_the_users_mistake(cached_maker, tmp_path):
    (tmp_path / "tiles").write_text("a file")
    with pytest.raises(UserError, match=r"tile cache .*name a folder on this machine's disk"):
        cached_maker(1).micro_batch(START)
