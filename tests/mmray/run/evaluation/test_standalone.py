"""An evaluation of rows: what it writes, that it continues after a kill, and that it tells of bad rows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForImageTextToText

from mmray.config.job import Job
from mmray.errors import UserError
from mmray.families import load_family
from mmray.run.evaluation.model import EvaluatedModel
from mmray.run.evaluation.prompts import PromptCutter
from mmray.run.evaluation.rows import EvaluationData, RowBatch, RowRenderer
from mmray.run.evaluation.standalone import EvaluationPlan, evaluate, run_here
from mmray.run.scoring.settings import EvaluationSettings
from mmray.training.model import build_model
from tests.conftest import Inputs
from tests.here import prepare_here, train_here
from tests.mmray.noise import noise
from tests.mmray.preparing import write_rows

SETTINGS = EvaluationSettings.model_validate({"generate": {"max_new_tokens": 5, "batch_rows": 4}})
QUESTION = [{"type": "image"}, {"type": "text", "text": "Read."}]
PAGES = [
    {"id": "one", "text": "<image>\nTotal 12.50", "images": ["a.png"]},
    {"id": "text", "text": "no picture at all", "images": []},
    {"id": "two", "text": "<image>\n<image>\nSeen twice, said once", "images": ["a.png", "b.png"]},
    {"id": "lost", "text": "<image>\nnever seen", "images": ["missing.png"]},
    {"id": "wrong", "text": 5, "images": []},
]
CHATS = [
    {
        "id": "turns", "images": ["b.png"],
        "messages": [
            {"role": "user", "content": QUESTION}, {"role": "assistant", "content": "First."},
            {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Second."},
        ],
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def job(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("standalone")
    for seed, name in enumerate(("a.png", "b.png")):
        noise((150, 90 + 40 * seed), seed).save(folder / name)
    sets = [
        {"files": write_rows(folder / "pages.jsonl", PAGES), "kind": "pretrain"},
        {"files": write_rows(folder / "chats.jsonl", CHATS), "kind": "chat"},
    ]
    return Job.model_validate(inputs.job(folder, data__eval=sets))


def plan_of(job: Job, name: str, **changes: Any) -> EvaluationPlan:
    settings = SETTINGS.model_copy(update={"generate": SETTINGS.generate.model_copy(update=changes)})
    return EvaluationPlan(job, EvaluatedModel(name, "base"), EvaluationData.of(job, "eval"), settings)


@pytest.fixture(scope="module")
def done(job: Job) -> tuple[dict[str, Any], Path]:
    plan = plan_of(job, "whole", turns="all")
    values, is_new = evaluate(plan)
    assert is_new
    return values, Path(plan.folder)


def test_the_metrics_are_those_of_the_predictions(done: tuple[dict[str, Any], Path]) -> None:
    values, folder = done
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "predictions.parquet", "report.html"]
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(values))
    rows = pq.read_table(folder / "predictions.parquet").to_pylist()
    read = [row for row in rows if row["turn"] is not None]
    assert [(row["id"], row["reference"]) for row in read] == [
        ("one", "Total 12.50"), ("two", "Seen twice, said once"), ("turns", "First."), ("turns", "Second."),
    ]  # fmt: skip
    errors, characters = (sum(row[name] for row in read) for name in ("character_errors", "characters"))
    assert characters == sum(len(row["reference"]) for row in read)
    assert values["all"]["cer"] == pytest.approx(errors / characters)
    assert values["all"]["texts"] == 4
    assert values["all"]["rows"] == 4, "the page without a picture has a loss alone"
    assert set(values["by_set"]) == {"0", "1"}
    assert set(values["by_bucket"]) == {row["bucket"] for row in rows}
    assert {name.rpartition("/")[2] for name in values["by_file"]} == {"pages.jsonl", "chats.jsonl"}
    losses = [row for row in rows if row["loss_sum"] is not None]
    loss = sum(row["loss_sum"] for row in losses) / sum(row["trained_tokens"] for row in losses)
    assert values["all"]["loss"] == pytest.approx(loss)
    assert values["all"]["perplexity"] == pytest.approx(np.exp(loss))
    assert {row["id"] for row in read if row["picture"]} == {"one", "two", "turns"}


def test_bad_rows_are_counted_and_named(done: tuple[dict[str, Any], Path]) -> None:
    bad = done[0]["bad_rows"]
    assert bad["count"] == 3
    assert {row["id"]: row["reason"] for row in bad["rows"]} == {
        "lost": "image_missing", "wrong": "wrong_type", "text": "no_text",
    }  # fmt: skip
    assert all(row["set"] == "0" and row["message"] and ":" in row["source"] for row in bad["rows"])
    page = (done[1] / "report.html").read_text()
    assert "image_missing" in page
    assert "data:image/jpeg;base64," in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_loss_is_that_of_transformers_alone(job: Job, done: tuple[dict[str, Any], Path]) -> None:
    """Of the row without a picture: its tokens, one sample, and the model's own loss."""
    (row,) = (r for r in pq.read_table(done[1] / "predictions.parquet").to_pylist() if r["id"] == "text")
    family = load_family(job.model.processor_source, model_type="qwen2_vl")
    ids = family.tokenizer("no picture at all" + family.tokenizer.eos_token, return_tensors="pt")["input_ids"]
    model = build_model(job.model.model_copy(update={"attention": "sdpa"})).eval()
    assert isinstance(model, AutoModelForImageTextToText._model_mapping[type(model.config)])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert row["trained_tokens"] == ids.shape[1] - 1
    assert row["loss_sum"] == pytest.approx(float(loss) * row["trained_tokens"], rel=1e-5)


def test_a_killed_evaluation_continues_and_ends_like_a_whole_one(job: Job, done: tuple[dict[str, Any], Path]) -> None:
    plan = plan_of(job, "killed", turns="all", batch_rows=1)
    batches = []

    def dies(plan: EvaluationPlan, chunks: Any, names: Any) -> Iterator[Any]:
        for batch in run_here(plan, chunks, names):
            if len(batches) == 2:
                raise KeyboardInterrupt
            batches.append(batch[0])
            yield batch

    with pytest.raises(KeyboardInterrupt):
        evaluate(plan, run_batches=dies)
    assert not (Path(plan.folder) / "metrics.json").exists()
    later = []

    def watched(plan: EvaluationPlan, chunks: Any, names: Any) -> Iterator[Any]:
        for batch in run_here(plan, chunks, names):
            later.append(batch[0])
            yield batch

    counts: list[tuple[int, int]] = []
    values, _ = evaluate(plan, run_batches=watched, on_progress=lambda *count: counts.append(count))
    assert not set(batches) & set(later), "no batch is done twice"
    assert counts[0][0] > 0
    assert counts[-1] == (6, 6)
    assert values["all"] == pytest.approx(done[0]["all"]), "whatever the batches"
    again, is_new = evaluate(plan, run_batches=watched)
    assert not is_new
    assert again == json.loads(json.dumps(values))


def test_other_settings_begin_anew(job: Job) -> None:
    first, _ = evaluate(plan_of(job, "settings", turns="last"))
    second, is_new = evaluate(plan_of(job, "settings", turns="all"))
    assert is_new
    assert (first["all"]["texts"], second["all"]["texts"]) == (3, 4)


def test_a_limit_takes_the_first_rows_and_a_file_is_read_like_its_kind(job: Job, tmp_path: Path) -> None:
    data = EvaluationData.of(job, "eval")
    plan = EvaluationPlan(job, EvaluatedModel("limited", "base"), data, SETTINGS, limit=2)
    values, _ = evaluate(plan)
    rows = pq.read_table(Path(plan.folder) / "predictions.parquet").to_pylist()
    assert len({row["id"] for row in [*rows, *values["bad_rows"]["rows"]]}) == 2
    folder = Path(data.datasets[1].files[0]).parent
    other = EvaluationData.of(job, str(folder / "chats.jsonl"))
    assert (other.sets[0].name, other.sets[0].dataset.kind) == ("chats.jsonl", "chat")
    plan = EvaluationPlan(job, EvaluatedModel("file", "base"), other, SETTINGS)
    assert plan.folder.endswith("evaluations/file-chats")
    with pytest.raises(UserError, match="no rows"):
        EvaluationData.of(job.model_copy(update={"data": job.data.model_copy(update={"eval": ()})}), "eval")


def test_which_model(job: Job, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint yet; give --model base"):
        EvaluatedModel.find(job)
    with pytest.raises(UserError, match="not both"):
        EvaluatedModel.find(job, folder="base", checkpoint="3")
    with pytest.raises(UserError, match="a step, best or last"):
        EvaluatedModel.find(job, checkpoint="first")
    with pytest.raises(UserError, match=r"holds no config.json"):
        EvaluatedModel.find(job, folder=str(tmp_path))
    assert EvaluatedModel.find(job, folder="base") == EvaluatedModel("base", "base")


def test_pages_may_be_asked_for_otherwise(job: Job) -> None:
    """The prompt's tokens stand where those before the text were."""
    plan = plan_of(job, "asked")
    encoder = plan.encoder()
    (chunk,) = plan.data.chunks(None)
    rows = {row.id: row for batch in encoder.batches(chunk) for row in batch.rows}
    evaluator = plan.evaluator(encoder, torch.device("cpu"))
    rendered = RowRenderer(encoder.family, encoder.policy)(RowBatch("x", (rows["two"],)))
    batch = evaluator._micro_batch(rendered.rendered[0])
    decode = encoder.family.tokenizer.decode
    plain = PromptCutter(encoder.family, SETTINGS.generate).tasks(batch, "pretrain")[0]
    for prompt, ending in (("Read it:", "\nRead it:"), ("<image> and <image>: what?", ": what?")):
        asked = PromptCutter(encoder.family, SETTINGS.generate, prompt).tasks(batch, "pretrain")[0]
        assert decode(asked.prompt_ids).endswith(f"<|vision_end|>{ending}")
        assert asked.reference == plain.reference == "Seen twice, said once"
        image = encoder.family.image_token_id
        assert (asked.prompt_ids == image).sum() == (plain.prompt_ids == image).sum()
        assert [frame.shape for frame in asked.frames] == [frame.shape for frame in plain.frames]


def test_a_checkpoint_has_the_loss_that_training_gave_it(inputs: Inputs, tmp_path: Path) -> None:
    """Unpacked and from the exported weights, against the packed evaluation of the run."""
    rows = [{"files": str(inputs.folder / "data" / "pages.jsonl"), "kind": "pretrain"}]
    job = Job.model_validate(
        inputs.job(tmp_path, data__eval=rows, training__steps=2, training__eval_every_steps=2, training__zero_stage=3)
    )
    for split in ("train", "eval"):
        prepare_here(job, split)
    *_, evaluation = train_here(job, ranks=2)
    data = EvaluationData.of(job, "eval")
    for checkpoint in (None, "last", "2"):
        model = EvaluatedModel.find(job, checkpoint=checkpoint)
        assert (model.name, model.step) == ("00000002", 2)
    values, _ = evaluate(EvaluationPlan(job, model, data, SETTINGS))
    assert values["all"]["trained_tokens"] == evaluation["eval_trained_tokens"]
    assert values["all"]["loss"] == pytest.approx(evaluation["eval_loss"], rel=1e-5)
    with pytest.raises(UserError, match="keeps no best checkpoint"):
        EvaluatedModel.find(job, checkpoint="best")
