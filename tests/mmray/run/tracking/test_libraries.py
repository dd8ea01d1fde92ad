"""Weights & Biases and MLflow themselves, without a network: a run that is killed, goes on and ends."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(  # not imported here: each takes a second of every process that collects tests
    not (find_spec("wandb") and find_spec("mlflow")), reason="needs the extra `trackers`"
)

RUN = """
import io, json, os, sys, time
from pathlib import Path
from PIL import Image
from mmray.run.scoring.metrics import score_row
from mmray.run.scoring.results import RowResult
from mmray.run.tracking import TrackedRun, TrackingSettings
from mmray.run.metrics import MetricsLog

folder, tracking, first, last, end = sys.argv[1:]
settings = {"training": {"steps": int(last)}, "api_key": "(hidden)"}
run = TrackedRun("pages", Path(folder), settings, commit="abc")
page = io.BytesIO()
Image.new("RGB", (8, 6), "red").save(page, "jpeg")
scores = score_row("Total 12", "Total 1")
text = RowResult(number=0, id="page-7", source="rows.jsonl:7", set="0", bucket="1x1", loss_sum=None, trained_tokens=0,
                 turn=0, reference="Total 12", prediction="Total 1", stopped=True, predicted_tokens=3, scores=scores,
                 picture=page.getvalue())
log = MetricsLog(run, int(first) - 1, TrackingSettings.model_validate_json(tracking).trackers())
for step in range(int(first), int(last) + 1):
    log.write(step, loss=10.0 / step, tokens=100)
    if step % 4 == 0:
        log.write(step, eval_loss=20.0 / step)
        log.show(step, [text])
if end == "killed":
    feed = log._trackers[-1]
    while feed._waiting.qsize() and not feed._ended.is_set():
        time.sleep(0.1)
    time.sleep(3)  # more than FLUSH_SECONDS
    os._exit(9)
log.close()
"""

LOSSES = [(step, pytest.approx(10.0 / step)) for step in range(1, 13)]
EVAL_LOSSES = [(step, pytest.approx(20.0 / step)) for step in (4, 8, 12)]


def run_twice(folder: Path, tracking: dict[str, object], **environment: str) -> str:
    """Steps 1 to 8 and death; from the checkpoint at 5 to the end. What it printed."""
    printed = ""
    everything = os.environ | environment
    for first, last, end in ((1, 8, "killed"), (6, 12, "finished")):
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(folder), json.dumps(tracking), str(first), str(last), end],
            env=everything, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == (9 if end == "killed" else 0), done.stderr
        printed += done.stdout + done.stderr
    return printed


def wandb_records(folder: Path) -> list[list[dict[str, object]]]:
    """Of each offline part of a run, in order, what W&B's own reader finds in it."""
    parts = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        parts.append([json.loads(line) for line in done.stdout.splitlines()])
    return parts


def test_wandb_offline(tmp_path: Path) -> None:
    tracking = {"wandb": {"project": "pages", "mode": "offline"}}
    printed = run_twice(tmp_path, tracking, WANDB_API_KEY="")
    assert "wandb:" not in printed
    parts = wandb_records(tmp_path)
    assert len(parts) == 2
    runs = [next(each["run"] for each in part if each["type"] == "run") for part in parts]
    assert len({run["run_id"] for run in runs}) == 1
    assert {(run["project"], run["display_name"]) for run in runs} == {("pages", "pages")}
    config = runs[1]["config"]["update"]
    assert config["training"] == {"steps": 12}
    assert config["git_commit"] == "abc"
    assert config["run_folder"] == str(tmp_path)
    history = [each["history"]["item"] for part in parts for each in part if each["type"] == "history"]
    assert [(item["step"], item["train/loss"]) for item in history if "train/loss" in item] == LOSSES
    assert [(item["step"], item["eval/loss"]) for item in history if "eval/loss" in item] == EVAL_LOSSES
    tables = [item for item in history if any(key.startswith("eval/texts") for key in item)]
    assert len(tables) >= 3
    for item in tables:  # as one value, or a key for each part of it
        table = item.get("eval/texts") or {key: item[f"eval/texts.{key}"] for key in ("_type", "nrows")}
        assert (table["_type"], table["nrows"]) == ("table-file", 1)
    written = [path.read_text() for path in tmp_path.glob("wandb/**/*.table.json")]
    assert written
    assert all('["Image","page-7"' in table for table in written)  # the page beside the texts, in the table's artifact
    axes = [each["metric"] for each in parts[1] if each["type"] == "metric"]
    assert any(axis.get("glob_name") == "*" and axis.get("step_metric") == "step" for axis in axes)


def test_wandb_without_a_key_is_one_warning(tmp_path: Path) -> None:
    environment = {"WANDB_API_KEY": "", "HOME": str(tmp_path), "WANDB_MODE": "", "NETRC": str(tmp_path / "none")}
    printed = run_twice(tmp_path, {"wandb": "pages"}, **environment)
    lines = [line for line in printed.splitlines() if line.startswith("tracking.wandb:")]
    assert lines, printed
    assert len(lines) <= 2  # one for each start
    assert "training goes on without it" in lines[-1]


def test_mlflow_in_a_file(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    run_twice(tmp_path, {"mlflow": "pages"}, MLFLOW_TRACKING_URI="")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=store, registry_uri=store)
    (run,) = client.search_runs([client.get_experiment_by_name("pages").experiment_id])
    found = {
        name: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)]
        for name in ("train/loss", "eval/loss")
    }
    assert found == {"train/loss": LOSSES, "eval/loss": EVAL_LOSSES}
    written = {file.path for file in client.list_artifacts(run.info.run_id, "evaluations/00000012")}
    assert {path.rpartition("/")[2] for path in written} >= {"text_0.md", "page_0.png"}
    (text,) = tmp_path.glob("mlartifacts/**/00000012/text_0.md")
    assert "Total 12" in text.read_text()
    assert run.info.run_name == "pages"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"training.steps": "8", "api_key": "(hidden)"}
    assert run.data.tags["changed.training.steps"] == "12"
    assert run.data.tags["mlflow.source.git.commit"] == "abc"
    assert run.data.tags["run_folder"] == str(tmp_path)
