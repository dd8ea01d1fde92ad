"""Pictures that cannot be used when training: left out with a word, or the end of the run; passing errors neither."""

import errno
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmray.batches.micro_batch import Masked, MicroBatch, Place, Rendered, from_table, mask, render, to_table
from mmray.errors import RowError, UserError
from mmray.images import render_tiles
from mmray.images import retries as passing
from mmray.images.retries import is_transient, with_retries
from mmray.loss.rules import IGNORE_INDEX
from tests.mmray.noise import noise
from tests.mmray.preparing import Preparation, write_rows

CPU = torch.device("cpu")
PLACE = Place(0, 0, 0)


class World:
    """Three rows with a picture each, one of them with two, and one without, in one bin."""

    def __init__(self, folder, processor):
        self.folder = folder
        for seed, name in enumerate(("a.png", "b.png", "c.png", "d.png")):
            noise((90, 60), seed).save(folder / name)
        rows = [
            {"id": "a", "text": "<image>\nTotal 12.50", "images": ["a.png"]},
            {"id": "bc", "text": "Two: <image> and <image>.", "images": ["b.png", "c.png"]},
            {"id": "d", "text": "A label: <image>", "images": ["d.png"]},
            {"id": "plain", "text": "All trains run daily."},
        ]
        preparation = Preparation(processor, {"files": write_rows(folder / "rows.jsonl", rows), "kind": "pretrain"})
        self.prepared = preparation.write(folder / "prepared")
        self.family, self.labels = preparation.family, preparation.labels
        assert len(self.prepared) == 1

    def micro_batch(self, render_page=render_tiles, on_bad_row="reject", **changes):
        packed = replace(self.prepared.bin(0), **changes)
        rendered = render([packed], PLACE, self.family, self.prepared.tiling, render_page, on_bad_row=on_bad_row)
        received = from_table(Rendered, to_table(rendered))
        masked = from_table(Masked, to_table(mask(received, self.family, self.labels, CPU)))
        return MicroBatch(masked, self.family)

    def labels_of(self, batch):
        """The trained labels of each sample."""
        ids = self.prepared.bin(0).sample_ids
        parts = batch.labels[0].split(batch.masked.lengths.tolist())
        return {row_id: part[part != IGNORE_INDEX].tolist() for row_id, part in zip(ids, parts, strict=True)}


@pytest.fixture
def world(tmp_path, processors):
    return World(tmp_path, processors["qwen2_vl"])


@pytest.mark.parametrize(
    ("spoil", "reason", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "image_corrupt", "truncated"),
        (lambda path: noise((91, 60)).save(path), "image_changed", "planned for 90 x 60 pixels, the image now has 91"),
        (lambda path: path.unlink(), "image_missing", "no such file"),
        (lambda path: path.write_bytes(b""), "image_unreadable", "the file is empty"),
        (lambda path: path.write_text("a text"), "image_unreadable", "text, which begins"),
    ],
)
def test_a_sample_whose_picture_broke_is_out_of_the_loss_and_named(world, spoil, reason, message):
    sound = world.micro_batch()
    assert sound.skipped == []
    spoil(world.folder / "c.png")
    batch = world.micro_batch()
    (skipped,) = batch.skipped
    assert (skipped.id, skipped.reason) == ("bc", reason)
    assert skipped.source == f"{world.folder}/rows.jsonl:2"
    assert message in skipped.message
    assert str(skipped).count(str(world.folder / "c.png")) == 1
    assert world.labels_of(batch) == world.labels_of(sound) | {"bc": []}
    assert batch.num_samples == sound.num_samples == 4
    assert batch.num_tokens == sound.num_tokens
    assert np.array_equal(batch.masked.input_ids, sound.masked.input_ids)
    assert np.array_equal(batch.masked.frame_sizes, sound.masked.frame_sizes)
    with pytest.raises(UserError, match=rf"row 'bc' \(.*rows\.jsonl:2\): {reason}: .*on_bad_row: reject"):
        world.micro_batch(on_bad_row="error")


def test_the_same_samples_are_skipped_each_time(world):
    (world.folder / "a.png").unlink()
    for name in ("b.png", "c.png"):
        (world.folder / name).write_bytes(b"no picture")
    first, second = world.micro_batch(), world.micro_batch()
    assert [each.id for each in first.skipped] == ["a", "bc"]
    assert first.skipped == second.skipped
    for name in ("labels", "pixels", "problems", "skipped"):
        assert np.array_equal(getattr(first.masked, name), getattr(second.masked, name)), name


def test_trained_tokens_are_still_compared_with_those_prepared(world):
    (world.folder / "a.png").unlink()
    prepared = world.prepared.bin(0).trained_tokens
    with pytest.raises(RuntimeError, match=f"{prepared} trained tokens, {prepared + 1} when prepared"):
        world.micro_batch(trained_tokens=prepared + 1)


# ---- Passing errors ----


class Failing:
    """A `render_tiles` whose first calls fail."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.calls = 0

    def __call__(self, source, plan, *, max_pixels):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return render_tiles(source, plan, max_pixels=max_pixels)


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that were waited, without waiting."""
    waited = []
    monkeypatch.setattr(passing.time, "sleep", waited.append)
    return waited


def test_a_passing_error_is_waited_out(world, pauses, caplog):
    page = Failing(ConnectionResetError("reset"), TimeoutError("slow"), OSError(errno.ESTALE, "Stale file handle"))
    assert world.micro_batch(page).skipped == []
    assert pauses == list(passing.PAUSES)
    assert page.calls == 4 + len(passing.PAUSES)
    waited = ["reset; tried again in 1 s", "slow; tried again in 5 s", "Stale file handle; tried again in 25 s"]
    assert [message.split(": ", 1)[1] for message in caplog.messages] == waited


@pytest.mark.parametrize("on_bad_row", ["reject", "error"])
def test_a_passing_error_that_stays_stops_the_run_and_skips_nothing(world, pauses, on_bad_row):
    page = Failing(*[ConnectionRefusedError("refused")] * 100)
    with pytest.raises(UserError, match=r"a\.png: refused, also after 3 more tries within 31 s; .*see to the storage"):
        world.micro_batch(page, on_bad_row)
    assert page.calls == 1 + len(passing.PAUSES)


def test_a_broken_picture_is_not_waited_for(world, pauses):
    (world.folder / "a.png").unlink()
    assert len(world.micro_batch().skipped) == 1
    assert pauses == []


class _OtherConnectionError(Exception):
    """As botocore and requests have them: of the same name, and not Python's."""


_OtherConnectionError.__name__ = "ConnectionError"


def _raised_from(cause):
    error = RowError("image_corrupt", "a.png: broken")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "source", "passes"),
    [
        (ConnectionError(), "a.png", True),
        (_OtherConnectionError(), "s3://b/a.png", True),
        (_raised_from(_OtherConnectionError()), "s3://b/a.png", True),
        (_raised_from(OSError(errno.ENOTCONN, "Transport endpoint is not connected")), "/mnt/a.png", True),
        (_raised_from(OSError(errno.EIO, "Input/output error")), "/mnt/a.png", False),
        (_raised_from(OSError(errno.EIO, "Internal Error")), "s3://b/a.png", True),
        (_raised_from(OSError("image file is truncated")), "a.png", False),
        (_raised_from(FileNotFoundError(errno.ENOENT, "gone")), "s3://b/a.png", False),
        (PermissionError(errno.EACCES, "denied"), "a.png", False),
        (MemoryError(), "a.png", False),
        (UserError("s3:// needs s3fs"), "s3://b/a.png", False),
        (OSError(errno.EIO, "Input/output error"), b"bytes", False),
    ],
)
def test_what_passes(error, source, passes):
    assert is_transient(error, source) is passes


def test_errors_that_do_not_pass_go_through_at_once(pauses):
    def read():
        raise RowError("image_missing", "gone")

    with pytest.raises(RowError, match="gone"):
        with_retries(read, "a.png")
    assert pauses == []
