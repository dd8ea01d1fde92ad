"""The whole way, judged by what comes out of it: a small model learns to read.

Rows → prepared dataset → training, killed and resumed on another number of workers → export → transformers alone reads
numbers that it has never seen. Digits are drawn at random, so that there is no other way to know them than the picture:
wrong sizes, tiles, order of tiles, positions, labels, packing, resume or export end at chance, nine of ten characters
wrong.
"""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mmray.config.job import Job
from mmray.prepared import PreparedDataset
from mmray.run.callback import Callback
from mmray.run.evaluation import Reader, Scores, score_row
from mmray.run.export import export_model
from mmray.run.history import read_history
from mmray.synthetic.numbers import PROMPT, write_numbers, write_reader
from tests.here import prepare_here, train_here

STEPS, SAVED, KILLED = 240, 80, 86


@dataclass
class Kill(Callback):
    """Kills its rank after a step, without any farewell."""

    step: int
    name = "kill"

    def after_step(self, loop: Any, done: Any) -> None:
        if loop.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Pictures of one, two and four digits, cut into two labelled tiles, ten and more of them in a bin."""
    write_reader(tmp_path)
    rows = {split: write_numbers(tmp_path / "data", split, count) for split, count in (("train", 2400), ("eval", 90))}
    return Job.model_validate(
        {
            "name": "reads",
            "model": {"config": str(tmp_path / "model"), "processor": str(tmp_path / "processor"), "dtype": "fp32"},
            "data": {split: [{"files": str(file), "kind": "pretrain"}] for split, file in rows.items()},
            "images": {"grid": [2, 1], "native_resolution": True, "min_area": 1000, "labels": True},
            "packing": {"token_capacity": 512, "visual_capacity": 256, "window_rows": 512},
            "training": {
                "steps": STEPS, "global_batch_bins": 4, "learning_rate": 4e-3, "warmup_steps": 10, "zero_stage": 1,
                "checkpoint_every_steps": SAVED,
            },
            "output": {"prepared": str(tmp_path / "prepared"), "run": str(tmp_path / "run")},
        }
    )  # fmt: skip


def test_a_model_learns_to_read(job: Job, tmp_path: Path) -> None:
    for split in job.data.splits:
        prepare_here(job, split)
    prepared = PreparedDataset(job.prepared_path("train"))
    bins = {packed.bucket: packed for packed in prepared.bins(0, len(prepared))}
    assert {"1x1@28x28", "2x1@28x28", "2x1@56x28"} <= set(bins), "pictures of three sizes, two of them cut"
    assert all(len(packed.sample_ids) > 8 for packed in bins.values()), "many samples in a bin"

    with pytest.raises(AssertionError, match=r"exit codes .*-9"):
        train_here(job, Kill(KILLED), ranks=2)
    lines = train_here(job, ranks=1)
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, STEPS + 1)]
    resumed = [event for event in read_history(Path(job.output.run)) if event["event"] == "resume"]
    assert [(event["step"], event["workers"]) for event in resumed] == [(SAVED, 1)]

    reader = Reader(export_model(job.output.run, str(tmp_path / "exported"), settings=job.model).folder)
    decode = reader.prompt.family.tokenizer.decode
    assert "<row1_col2>" in decode(bins["2x1@56x28"].input_ids), "tiles are labelled"
    scores = []
    for row in map(json.loads, Path(job.data.eval[0].files[0]).read_text().splitlines()):
        read = reader.read(PROMPT, [str(tmp_path / "data" / row["images"][0])], max_new_tokens=8)
        scores.append(score_row(row["text"].removeprefix(PROMPT), read))
    cer = Scores.of(scores).cer
    assert cer is not None
    assert cer < 0.05
