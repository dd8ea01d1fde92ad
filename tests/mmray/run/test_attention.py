"""The attention of new and resumed runs, by what their jobs and checkpoints say."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmray.config.job import Job
from mmray.run.attention import attention_note, with_attention
from mmray.training.checkpoint import MODEL_FILE
from tests.mmray.training import tiny


def job(attention: str | None = None) -> Job:
    chosen = {"attention": attention} if attention else {}
    model: dict[str, Any] = {"config": tiny.TINY_QWEN2_VL, "processor": "some/processor"} | chosen
    return Job.model_validate(
        {
            "name": "reads", "model": model, "training": {"steps": 1},
            "packing": {"token_capacity": 512, "visual_capacity": 512},
            "data": {"train": [{"files": "rows.jsonl", "kind": "pretrain"}]},
            "output": {"prepared": "prepared", "run": "/runs/reads"},
        }
    )  # fmt: skip


def checkpoint(folder: Path, attention: str | None) -> Path:
    """One that tells the attention of its run; None: as versions wrote it that did not tell settings."""
    if attention is not None:
        model: dict[str, Any] = {"config": tiny.TINY_QWEN2_VL, "attention": attention}
        content = {"mmray": "0.1", "model": model, "training": {"steps": 1}}
        (folder / MODEL_FILE).write_text(json.dumps(content))
    return folder


def test_a_new_run_is_packed():
    assert with_attention(job(), None).model.attention == "packed"
    for attention in ("packed", "sdpa", "eager"):
        assert with_attention(job(attention), None) == job(attention)


@pytest.mark.parametrize(("before", "goes_on"), [(None, "sdpa"), ("sdpa", "sdpa"), ("eager", "eager"), ("packed",) * 2])
def test_a_resumed_run_goes_on_as_it_began(tmp_path, before, goes_on):
    folder = checkpoint(tmp_path, before)
    assert with_attention(job(), folder).model.attention == goes_on
    note = attention_note(job(), folder)
    assert note == (
        None if goes_on == "packed" else f"/runs/reads began with model.attention: {goes_on} and goes on so"
    )


def test_another_attention_on_resume_is_told(tmp_path):
    folder = checkpoint(tmp_path, "sdpa")
    assert with_attention(job("packed"), folder).model.attention == "packed"
    told = "/runs/reads was trained with model.attention: sdpa so far and goes on with packed"
    assert attention_note(job("packed"), folder) == told
    assert attention_note(job("sdpa"), folder) is None
