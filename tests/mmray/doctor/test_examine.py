"""The doctor passes a good job, and each of its checks fails where what it looks at is wrong."""

import functools
import json
import math

import pytest
import torch
from typer.testing import CliRunner

from mmray import doctor
from mmray.cli import app
from mmray.config import Job
from mmray.doctor import Status, examine_settings
from mmray.doctor import model as doctor_model
from mmray.doctor import weights as doctor_weights
from mmray.families.base import positions_in_sample
from mmray.families.qwen2_vl import Qwen2VL
from mmray.training.loss import packed_loss_sum
from mmray.training.model import build_model
from mmray.training.settings import ModelSettings
from tests.mmray.preparing import write_rows

CHECKS = (
    "processor", "attention", "rows", "capacities", "chat template", "loss", "trained tokens", "exact lengths",
    "loss at step 0", "cache", "packed = unpacked", "accumulation steps", "loss of the weights",
)  # fmt: skip
NOT_APPLICABLE = {"loss of the weights"}


@pytest.fixture
def make_job(inputs, tmp_path):
    """A function: the job of the synthetic rows, changed."""
    return lambda **changes: inputs.job(tmp_path, packing__token_capacity=1024, **changes)


def findings(content):
    job = Job.model_validate(content)
    return [each for each in doctor.examine(job) if isinstance(each, doctor.Finding)]


def failed(content):
    """The details of the failed checks, by name."""
    return {each.check: f"{each.detail} {each.remedy}" for each in findings(content) if each.status is Status.FAIL}


def test_a_good_job_passes_every_check(make_job):
    found = findings(make_job())
    assert {each.check for each in found} == set(CHECKS)
    for each in found:
        expected = Status.NOT_APPLICABLE if each.check in NOT_APPLICABLE else Status.PASS
        assert each.status is expected, each
        assert each.detail


def test_all_sets_of_all_splits_are_looked_at(make_job):
    content = make_job()
    content["data"]["eval"] = content["data"]["train"][:1]
    said = " ".join(each.detail for each in findings(content))
    for name in ("data.train[0] (pretrain)", "data.train[1] (chat)", "data.eval[0] (pretrain)"):
        assert name in said


# ---- Settings ----


def test_a_processor_that_is_not_there_ends_it(make_job):
    (only,) = findings(make_job(model__processor="/nowhere"))
    assert only.status is Status.FAIL
    assert only.check == "processor"


def test_a_model_that_is_not_the_processor_s(make_job):
    content = make_job(model__config={"model_type": "idefics3"})
    assert "the model is a idefics3" in failed(content)["processor"]


def test_attention_that_is_not_installed(make_job):
    assert "flash_attn is not installed" in failed(make_job(model__attention="flash_attention_2"))["attention"]


def test_a_model_that_cannot_pack(make_job, monkeypatch):
    monkeypatch.setattr(Qwen2VL, "packing_problem", lambda *_, **__: "samples see each other")
    assert "samples see each other" in failed(make_job())["attention"]
    alone = {each.check: each.status for each in findings(make_job(packing__mode="none"))}
    assert Status.FAIL not in alone.values()
    assert alone["packed = unpacked"] is Status.NOT_APPLICABLE


def test_the_cheap_part_reads_no_row(make_job):
    content = make_job(data={"train": [{"files": "/nowhere.jsonl", "kind": "pretrain"}]})
    found = list(examine_settings(Job.model_validate(content)))
    assert [each.check for each in found] == ["processor", "attention"]
    assert not doctor.has_failed(found)


# ---- Rows ----


def with_rows(make_job, tmp_path, rows, kind="chat", **changes):
    files = write_rows(tmp_path / "rows.jsonl", rows)
    return make_job(data__train=[{"files": files, "kind": kind}], **changes)


def test_files_that_are_not_there(make_job):
    content = make_job(data={"train": [{"files": "/nowhere.jsonl", "kind": "pretrain"}]})
    assert "/nowhere.jsonl" in failed(content)["rows"]


def test_rows_that_are_all_bad(make_job, tmp_path):
    content = with_rows(make_job, tmp_path, [{"text": "<image>", "images": ["gone.jpg"]}] * 3, kind="pretrain")
    assert "gone.jpg" in failed(content)["rows"]


def test_a_bad_row_where_none_is_allowed(make_job):
    content = make_job()
    content["data"]["on_bad_row"] = "error"
    assert "image_missing" in failed(content)["rows"]


def test_capacities_below_the_rows(make_job):
    assert "packing.visual_capacity is 16" in failed(make_job(packing__visual_capacity=16))["capacities"]


def test_a_template_that_refuses(make_job, tmp_path, inputs):
    folder = tmp_path / "processor"
    folder.mkdir()
    for file in (inputs.folder / "processor").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")
    found = failed(make_job(model__processor=str(folder), loss="all"))
    assert "not today" in found["chat template"]
    assert "rows" in found


def test_boundaries_that_are_never_found(make_job):
    boundaries = [{"role": "assistant", "start": "### Answer", "end": "###"}]
    assert "### Answer" in failed(make_job(loss={"boundaries": boundaries}))["loss"]


def test_rows_of_which_nothing_trains(make_job, tmp_path):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}]
    found = failed(with_rows(make_job, tmp_path, rows, kind="tokenized"))
    assert "0.0%" in found["trained tokens"]
    assert "loss" in found


def test_lengths_that_are_not_the_processor_s(make_job, monkeypatch):
    def wrong(self, tile_size, together):
        span = measure(self, tile_size, together)
        return type(span)(span.token_ids[1:], span.visual_tokens - 1)

    measure = Qwen2VL._measure_span
    monkeypatch.setattr(Qwen2VL, "_measure_span", wrong)
    found = failed(make_job())
    assert "cannot be trusted" in found["exact lengths"]


def test_pictures_that_cannot_be_decoded(make_job, tmp_path, inputs):
    page = next((inputs.folder / "data/pages").glob("*.jpg")).read_bytes()
    (tmp_path / "page.jpg").write_bytes(page[: len(page) // 2])
    content = with_rows(make_job, tmp_path, [{"text": "<image> A", "images": ["page.jpg"]}], kind="pretrain")
    assert "page.jpg" in failed(content)["exact lengths"]


# ---- The model ----


def test_samples_that_see_each_other(make_job, monkeypatch):
    def one_sample(self, row):
        whole = positions_in_sample(row.lengths.sum()[None])
        return whole.expand(4, -1)

    monkeypatch.setattr(Qwen2VL, "position_ids", one_sample)
    assert "samples of a row see each other" in failed(make_job())["packed = unpacked"]


def test_the_difference_of_naive_packing_is_shown(make_job):
    (found,) = [each for each in findings(make_job()) if each.check == "packed = unpacked"]
    right, naive = (float(word) for word in found.detail.split() if "e" in word and word[0].isdigit())
    assert right < 1e-5
    assert naive > 0.1


def test_weights_that_do_not_start_at_even_odds(make_job, inputs):
    config = json.loads((inputs.folder / "model/config.json").read_text())
    config["text_config"]["initializer_range"] = 2.0
    assert "ln(vocabulary)" in failed(make_job(model__config=config))["loss at step 0"]


def test_a_model_that_keeps_its_cache(make_job, monkeypatch):
    def caching(settings):
        model = build_model(settings)
        forward = model.forward
        model.forward = functools.wraps(forward)(lambda **inputs: forward(**inputs | {"use_cache": True}))
        return model

    monkeypatch.setattr(doctor_model, "build_model", caching)
    found = failed(make_job())
    assert "returns a cache" in found["cache"]
    assert "packed = unpacked" in found


def test_a_loss_that_is_a_mean_of_means(make_job, monkeypatch):
    def mean(model, inputs, labels):
        return packed_loss_sum(model, inputs, labels) / (labels[:, 1:] >= 0).sum() * 100

    monkeypatch.setattr(doctor_model, "packed_loss_sum", mean)
    assert "how a batch is split" in failed(make_job())["accumulation steps"]


# ---- Trained weights ----


@pytest.fixture
def saved(inputs, tmp_path):
    """A function: a folder with weights that learned the first row for some steps."""

    def save(steps):
        settings = ModelSettings(config=str(inputs.folder / "model"), dtype="fp32", attention="eager", seed=3)
        model = build_model(settings)
        ids = torch.arange(300, 340)[None].repeat(1, 8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        model.save_pretrained(tmp_path / "weights")
        rows = [{"input_ids": ids[0].tolist(), "labels": ids[0].tolist()}] * 3
        return str(tmp_path / "weights"), write_rows(tmp_path / "tokenized.jsonl", rows)

    return save


def weights_finding(make_job, saved, steps):
    path, files = saved(steps)
    content = make_job(data__train=[{"files": files, "kind": "tokenized"}])
    processor = content["model"]["processor"]
    content["model"] = {"path": path, "processor": processor, "dtype": "fp32"}
    return next(each for each in findings(content) if each.check == "loss of the weights")


@pytest.mark.parametrize(("steps", "status"), [(0, Status.FAIL), (9, Status.PASS)])
def test_the_loss_of_trained_weights(make_job, saved, steps, status):
    found = weights_finding(make_job, saved, steps)
    loss = float(found.detail.split()[0])
    assert found.status is status, found
    assert (loss > doctor_weights.SANE[1]) == (status is Status.FAIL)
    assert steps or loss == pytest.approx(math.log(700), rel=0.1)


def test_weights_larger_than_the_memory(make_job, saved, monkeypatch):
    monkeypatch.setattr(doctor_weights, "_free_bytes", lambda: 1000)
    found = weights_finding(make_job, saved, 0)
    assert found.status is Status.NOT_APPLICABLE
    assert "free" in found.detail


# ---- The command ----


def run(tmp_path, content, *options):
    (tmp_path / "job.yaml").write_text(json.dumps(content))
    return CliRunner().invoke(app, ["doctor", str(tmp_path / "job.yaml"), *options])


def test_the_command_prints_a_table_and_the_first_row(make_job, tmp_path):
    result = run(tmp_path, make_job())
    assert result.exit_code == 0, result.output
    for check in CHECKS:
        assert check in result.output
    assert "trained" in result.output


def test_the_command_s_exit_code_and_json(make_job, tmp_path):
    result = run(tmp_path, make_job(packing__visual_capacity=16), "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["ok"] is False
    (found,) = [each for each in report["findings"] if each["check"] == "capacities"]
    assert found["status"] == "fail"
    assert found["remedy"]
    assert json.loads(run(tmp_path, make_job(), "--json").stdout)["ok"] is True
