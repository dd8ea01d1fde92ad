"""A run on pictures whose size is read otherwise today: told before step 1, and trained on with the prepared sizes."""

import json
from pathlib import Path

import pytest
from PIL import Image

from jobs.checks import open_prepared
from mmray.config.job import Job
from mmray.images import header, image_size
from mmray.prepared import writer
from mmray.prepared.verify import in_processes, verify
from mmray.run.metrics import METRICS_FILE, read_metrics
from tests.conftest import Inputs
from tests.here import prepare_here, train_here
from tests.mmray.images.test_render import signed_orientation
from tests.mmray.preparing import write_rows


def test_a_run_is_told_before_its_first_step_and_goes_on(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(signed_orientation(6))
    Image.new("L", (60, 80), 90).save(tmp_path / "plain.jpg")
    names = [*(f"{number}.jpg" for number in range(4)), "plain.jpg"]
    rows = [{"id": name, "text": "<image> a page", "images": [name]} for name in names]
    data = {"train": [{"files": write_rows(tmp_path / "rows.jsonl", rows), "kind": "pretrain"}]}
    packing = {"token_capacity": 256, "visual_capacity": 128, "window_rows": 64}
    job = Job.model_validate(inputs.job(tmp_path, data=data, packing=packing, training__steps=1))
    job = job.model_copy(update={"training": job.training.model_copy(update={"global_batch_bins": 1})})
    with monkeypatch.context() as before:  # as orientations were read then
        before.setattr(header, "_SIGNED_KINDS", {})
        before.setattr(header._exif_orientation, "__defaults__", (header._INTEGER_KINDS,))
        before.setattr(writer, "IMAGE_READING", 1)
        prepared = prepare_here(job)
    images = [image for packed in prepared.bins(0, len(prepared)) for image in packed.images]
    assert (images[0]["width"], images[0]["height"]) == (96, 64)
    assert image_size(str(tmp_path / "0.jpg")) == (64, 96), "today"

    datasets = open_prepared(job)
    assert list(datasets) == ["train"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "was prepared before orientations of signed kinds" in shown
    assert "with the sizes they were prepared with; prepare anew to turn them" in shown
    verified = verify(prepared.path, run_parts=in_processes(1))
    assert (verified.pictures, verified.broken) == (5, 0)
    train_here(job)
    (line,) = read_metrics(Path(job.output.run) / METRICS_FILE)
    assert line["skipped_samples"] == 0
    assert json.loads((Path(prepared.path) / "manifest.json").read_text())["image_reading"] == 1


def test_a_run_on_what_is_prepared_today_is_told_nothing(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job.model_validate(inputs.job(tmp_path))
    prepare_here(job)
    open_prepared(job)
    assert "was prepared before" not in capsys.readouterr().out
