"""An evaluation of rows: what it writes, that it continues after a kill, and that it tells of bad rows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForImageTextToText

from mmray.config.compatibility import job_family
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.families import load_family
from mmray.images import TilingPolicy
from mmray.rows.read import chunk_rows
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
    assert set(batches) & set(later) == {"000000000-bad"}, "no batch is done twice, but bad rows are tried again"
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


def test_a_limit_is_exact_and_a_file_is_read_like_its_kind(job: Job, tmp_path: Path) -> None:
    data = EvaluationData.of(job, "eval")
    plan = EvaluationPlan(job, EvaluatedModel("limited", "base"), data, SETTINGS, limit=3)
    assert plan.folder.endswith("evaluations/limited-limit3"), "a quick look takes no whole evaluation's place"
    values, _ = evaluate(plan)
    rows = pq.read_table(Path(plan.folder) / "predictions.parquet").to_pylist()
    assert {row["id"] for row in [*rows, *values["bad_rows"]["rows"]]} == {"one", "text", "turns"}
    with pytest.raises(UserError, match="--limit 1: there are 2 sets, and each gets a row; give at least 2"):
        data.chunks(1)
    folder = Path(data.datasets[1].files[0]).parent
    other = EvaluationData.of(job, str(folder / "chats.jsonl"))
    assert (other.sets[0].name, other.sets[0].dataset.kind) == ("chats.jsonl", "chat")
    plan = EvaluationPlan(job, EvaluatedModel("file", "base"), other, SETTINGS)
    assert plan.folder.endswith("evaluations/file-chats")
    with pytest.raises(UserError, match="no rows"):
        EvaluationData.of(job.model_copy(update={"data": job.data.model_copy(update={"eval": ()})}), "eval")


def ids_of(data: EvaluationData, limit: int | None) -> list[str]:
    return [row.value["id"] for chunk in data.chunks(limit) for row in chunk_rows(chunk)]


def test_the_rows_of_a_limit_are_each_files_first_ones(job: Job, tmp_path: Path) -> None:
    """Blank lines are no rows; of a set that preparing takes in part only those rows count that it takes."""
    counts = {"a": 12, "b": 100, "c": 3}
    lines = {name: [f'{{"id": "{name}{n}", "text": "t"}}' for n in range(count)] for name, count in counts.items()}
    for name in counts:
        (tmp_path / f"{name}.jsonl").write_text("\n\n" + "\n\n".join(lines[name]) + "\n")

    def data(*sets: dict[str, Any]) -> EvaluationData:
        rows = [
            {"kind": "pretrain", **one, "files": [str(tmp_path / f"{f}.jsonl") for f in one["files"]]} for one in sets
        ]
        return EvaluationData.of(Job.model_validate(job.model_dump() | {"data": {"train": rows}}), "train")

    def first(a: int, b: int, c: int = 0) -> set[str]:
        return {f"{name}{n}" for name, count in zip("abc", (a, b, c)) for n in range(count)}

    one_set, three_sets = data({"files": ["a", "b"]}), data({"files": ["a"]}, {"files": ["b"]}, {"files": ["c"]})
    for limit, expected in ((5, first(1, 4)), (14, first(2, 12)), (112, first(12, 100)), (500, first(12, 100))):
        ids = ids_of(one_set, limit)
        assert (len(ids), set(ids)) == (len(expected), expected)
    for limit, expected in ((3, first(1, 1, 1)), (5, first(1, 3, 1)), (30, first(3, 26, 1)), (900, first(12, 100, 3))):
        ids = ids_of(three_sets, limit)
        assert (len(ids), set(ids)) == (len(expected), expected)
    drawn = data({"files": ["b"], "max_rows": 20}, {"files": ["a"], "repeat": 3})
    taken = [row_id for row_id in ids_of(drawn, None) if row_id[0] == "b"]
    assert len(taken) == 20
    limited = ids_of(drawn, 8)
    assert len(limited) == 8
    assert [row_id for row_id in limited if row_id[0] == "b"] == taken[:5]


def test_the_pictures_of_a_file_lie_below_its_folder_or_the_one_that_is_given(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    noise((60, 40), 7).save(elsewhere / "p.png")
    file = write_rows(tmp_path / "mine.jsonl", [{"id": "x", "text": "<image>\nhi", "images": ["p.png"]}])
    roots = job.model_copy(update={"data": job.data.model_copy(update={"eval": (
        job.data.eval[0].model_copy(update={"image_root": "/the/jobs/own"}),
    )})})  # fmt: skip

    def problem(image_root: str | None) -> list[str]:
        data = EvaluationData.of(roots, file, image_root)
        (chunk,) = data.chunks(None)
        encoder = plan_of(job, "roots").encoder()
        encoder._data = data
        return [bad.message for batch in encoder.batches(chunk) for bad in batch.bad]

    assert str(tmp_path / "p.png") in problem(None)[0]
    assert problem(str(elsewhere)) == []
    monkeypatch.chdir(tmp_path)
    assert EvaluationData.of(roots, file, "elsewhere").datasets[0].image_root == str(elsewhere), "actors are elsewhere"
    assert problem("") != []
    with pytest.raises(UserError, match=r"--image-root is for --data FILE; data.train has its own"):
        EvaluationData.of(job, "train", str(elsewhere))


def test_the_kind_of_a_files_rows_is_known_by_their_columns(job: Job, tmp_path: Path) -> None:
    """Also of a table, of which a reader of pages would not read the column of chats, and with a column of the job's
    own name."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    pq.write_table(pa.Table.from_pylist([{"id": "1", "messages": turns}]), tmp_path / "chats.parquet")
    write_rows(tmp_path / "dialogs.jsonl", [{"id": "1", "dialog": turns}])
    sets = (job.data.eval[0], job.data.eval[1].model_copy(update={"columns": {"messages": "dialog"}}))
    renamed = job.model_copy(update={"data": job.data.model_copy(update={"eval": sets})})
    kind = EvaluationData.of(job, str(tmp_path / "chats.parquet")).datasets[0].kind
    (dialogs,) = EvaluationData.of(renamed, str(tmp_path / "dialogs.jsonl")).datasets
    assert (kind, dialogs.kind, dialogs.columns) == ("chat", "chat", {"messages": "dialog"})


def test_a_continued_evaluation_tries_bad_rows_again(job: Job, tmp_path: Path) -> None:
    """Whose picture was missing or broken and is mended meanwhile; every row is counted once, as in a whole one."""
    rows = [{"id": f"r{n}", "text": f"<image>\nrow {n}" + " and more" * n, "images": [f"{n}.png"]} for n in range(5)]
    rows.append({"id": "text", "text": "no picture"})
    for n in range(5):
        noise((60 + n, 40), n).save(tmp_path / f"{n}.png")
    whole_picture = (tmp_path / "4.png").read_bytes()
    (tmp_path / "4.png").write_bytes(whole_picture[: len(whole_picture) // 2])  # its header can be read
    (tmp_path / "1.png").unlink()
    data = EvaluationData.of(job, write_rows(tmp_path / "rows.jsonl", rows))
    settings = SETTINGS.model_copy(update={"generate": SETTINGS.generate.model_copy(update={"batch_rows": 2})})
    plan = EvaluationPlan(job, EvaluatedModel("mended", "base"), data, settings)
    read: list[str] = []

    def killed_after(batches: int) -> Any:
        def run(plan: EvaluationPlan, chunks: Any, done: Any) -> Iterator[Any]:
            for number, batch in enumerate(run_here(plan, chunks, done)):
                if number == batches:
                    raise KeyboardInterrupt
                read.extend(result.id for result in batch[1])
                yield batch

        return run

    with pytest.raises(KeyboardInterrupt):
        evaluate(plan, run_batches=killed_after(3))
    assert 0 < len(read) < 5
    noise((61, 40), 1).save(tmp_path / "1.png")
    (tmp_path / "4.png").write_bytes(whole_picture)
    values, _ = evaluate(plan, run_batches=killed_after(100))
    assert sorted(read) == sorted(row["id"] for row in rows), "each once"
    assert (values["all"]["rows"], values["all"]["texts"]) == (6, 5)
    assert {row["id"]: row["reason"] for row in values["bad_rows"]["rows"]} == {"text": "no_text"}
    whole, _ = evaluate(EvaluationPlan(job, EvaluatedModel("unbroken", "base"), data, settings))
    assert values["all"] == pytest.approx(whole["all"])


def test_of_two_evaluations_into_one_folder_the_first_ends(job: Job) -> None:
    plan = plan_of(job, "twice", batch_rows=1)
    other: list[Any] = []

    def interrupted(plan: EvaluationPlan, chunks: Any, done: Any) -> Iterator[Any]:
        for number, batch in enumerate(run_here(plan, chunks, done)):
            if number == 2:
                other.append(evaluate(plan)[0])
            yield batch

    with pytest.raises(UserError, match="another evaluation into this folder was started and goes on"):
        evaluate(plan, run_batches=interrupted)
    assert json.loads((Path(plan.folder) / "metrics.json").read_text()) == json.loads(json.dumps(other[0]))
    assert other[0]["all"]["rows"] == 4


def test_other_weights_in_a_folder_and_another_tiling_are_another_evaluation(job: Job, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"some")
    data = EvaluationData.of(job, "eval")

    def identity(job: Job) -> dict[str, Any]:
        return EvaluationPlan(job, EvaluatedModel("m", "folder", str(tmp_path)), data, SETTINGS).identity

    first = identity(job)
    assert identity(job) == first
    tiled = job.model_copy(update={"images": TilingPolicy(tile_size=(56, 56), grid=(2, 2))})
    assert identity(tiled) != first
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert identity(job) != first


@pytest.mark.parametrize("lines", ["", "\n  \n\n"])
def test_a_file_without_rows_is_refused(job: Job, tmp_path: Path, lines: str) -> None:
    (tmp_path / "none.jsonl").write_text(lines)
    data = EvaluationData.of(job, str(tmp_path / "none.jsonl"))
    for limit in (None, 3):
        with pytest.raises(UserError, match=r"there is no row to evaluate in .*none\.jsonl"):
            data.chunks(limit)


def test_a_prompt_that_stands_for_pixels_is_refused(job: Job) -> None:
    asked = job.model_copy(update={"evaluation": EvaluationSettings(prompt="Read <|image_pad|>")})
    with pytest.raises(UserError, match=r"evaluation.prompt: '<\|image_pad\|>' stands for the pixels of an image"):
        job_family(asked)
    assert job_family(job.model_copy(update={"evaluation": EvaluationSettings(prompt="<image>Read<|im_end|>")}))


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
    asking = {
        "Read it:": "\nRead it:", "<image> and <image>: what?": ": what?", "": "\n",
        "<image><image>Read<|im_end|>": "Read<|im_end|>", "<image><image><|im_start|>user\n": "<|im_start|>user\n",
    }  # fmt: skip
    for prompt, ending in asking.items():
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
