"""The metrics file across a crash and a resumption."""

import io
import json
from pathlib import Path

from PIL import Image

from mmray.run.metrics import METRICS_FILE, MetricsLog, read_metrics
from mmray.run.scoring.metrics import score_row
from mmray.run.scoring.results import RowResult
from mmray.run.tracking import TrackedRun


def test_steps_done_again_stand_once(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    log = MetricsLog(TrackedRun("test", tmp_path), 0)
    for step in range(1, 6):
        log.write(step, loss=1.0 / step, tokens=10)
    log.write(4, eval_loss=0.5)
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5, 4]

    resumed = MetricsLog(TrackedRun("test", tmp_path), 3)
    resumed.write(4, loss=float("nan"), grad_norm=2.0)
    resumed.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[2] == {"step": 3, "loss": 1.0 / 3, "tokens": 10}
    assert lines[3] == {"step": 4, "loss": None, "grad_norm": 2.0}
    assert not list(tmp_path.glob(".*"))


def test_tensorboard_shows_texts_and_their_pages(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    page = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(page, "jpeg")
    text = RowResult(
        number=0, id="page-7", source="rows.jsonl:7", set="0", bucket="1x1", loss_sum=None, trained_tokens=0, turn=0,
        reference="Total 12", prediction="Total 1", stopped=True, predicted_tokens=3,
        scores=score_row("Total 12", "Total 1"), picture=page.getvalue(),
    )  # fmt: skip
    log = MetricsLog(TrackedRun("test", tmp_path), 0)
    log.write(2, eval_loss=1.0, eval_loss_by_set={"0": 0.5, "1": None})
    log.show(2, [text])
    log.close()
    (line,) = read_metrics(tmp_path / METRICS_FILE)
    assert line["eval_loss_by_set"] == {"0": 0.5, "1": None}
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"eval/loss", "eval/loss_by_set/0"}
    assert events.Tags()["images"] == ["eval/page_0"]
    (written,) = events.Tensors("eval/text_0/text_summary")
    words = written.tensor_proto.string_val[0].decode()
    assert "page-7: CER 0.1250" in words
    assert "Total 12" in words


def test_tensorboard_mirrors_the_file(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(TrackedRun("test", tmp_path), 0)
    log.write(1, loss=3.0)
    log.write(2, loss=2.0)
    log.close()
    log = MetricsLog(TrackedRun("test", tmp_path), 1)
    log.write(2, epoch=0.5, loss=1.5)
    log.write(2, epoch=0.5, eval_loss=1.25)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert shown == {
        "train/loss": [(1, 3.0), (2, 1.5)],
        "train/epoch": [(2, 0.5)],
        "eval/loss": [(2, 1.25)],
        "eval/epoch": [(2, 0.5)],
    }
