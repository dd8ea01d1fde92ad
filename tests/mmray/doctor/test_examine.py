"""The doctor passes a good job, and each of its checks fails where what it looks at is wrong."""

import functools
import io
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.utils.import_utils import is_flash_attn_2_available
from typer.testing import CliRunner

from mmray import doctor
from mmray.batches.micro_batch import mask
from mmray.cli import app
from mmray.config.job import Job
from mmray.doctor import Status, examine_settings
from mmray.doctor import model as doctor_model
from mmray.doctor import rows as doctor_rows
from mmray.doctor import weights as doctor_weights
from mmray.errors import UserError
from mmray.families.base import positions_in_sample
from mmray.families.qwen2_vl import Qwen2VL
from mmray.training import model as training_model
from mmray.training import weights as training_weights
from mmray.training.loss import packed_loss_sum
from mmray.training.model import build_model, load_config
from mmray.training.settings import ModelSettings
from mmray.training.weights import StoredWeight
from tests.mmray.preparing import write_rows

CHECKS = (
    "processor", "attention", "weights", "parts", "rows", "capacities", "chat template", "loss", "trained tokens",
    "exact lengths", "pixels", "loss at step 0", "cache", "pictures are seen", "labels",
    "packed = unpacked", "accumulation steps", "loss of the weights",
)  # fmt: skip
NOT_APPLICABLE = {"weights", "loss of the weights"}


@pytest.fixture
def make_job(inputs, tmp_path):
    """A function: the job of the synthetic rows, changed."""
    return lambda **changes: inputs.job(tmp_path, packing__token_capacity=1024, **changes)


@pytest.fixture
def without_model(monkeypatch):
    """The small copy of the model, the slowest part, is left out."""
    monkeypatch.setattr(doctor, "examine_model", lambda *_: iter(()))


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


def finding(content, check, split="train"):
    """The only finding of a check, or that of a split."""
    found = [each for each in findings(content) if each.check == check]
    return found[0] if len(found) == 1 else next(each for each in found if f"data.{split}" in each.detail)


# ---- Settings ----


def test_a_processor_that_is_not_there_ends_it(make_job):
    (only,) = findings(make_job(model__processor="/nowhere"))
    assert only.status is Status.FAIL
    assert only.check == "processor"


def test_a_model_that_is_not_the_processor_s(make_job):
    content = make_job(model__config={"model_type": "idefics3"})
    assert "the model is a idefics3" in failed(content)["processor"]


@pytest.mark.parametrize(
    ("part", "key", "value", "check", "message"),
    [
        (
            "vision_config",
            "spatial_merge_size",
            4,
            "processor",
            "spatial_merge_size is 4, merge_size of the image",
        ),
        ("vision_config", "patch_size", 7, "processor", "patch_size is 7, patch_size of the image processor is 14"),
        ("text_config", "num_attention_heads", 7, "small copy", "the model stops at its first batch: RuntimeError"),
    ],
)
def test_a_configuration_that_does_not_fit_is_told_once(make_job, inputs, part, key, value, check, message):
    config = json.loads((inputs.folder / "model" / "config.json").read_text())
    config[part][key] = value
    (problem,) = failed(make_job(model__config=config)).items()
    assert problem[0] == check
    assert message in problem[1]
    assert "please report" not in problem[1]


@pytest.mark.usefixtures("without_model")
def test_a_token_that_was_added(make_job, tmp_path, inputs):
    tokenizer = AutoTokenizer.from_pretrained(inputs.folder / "processor")
    shutil.copytree(inputs.folder / "processor", tmp_path / "processor")
    tokenizer.add_tokens(["<page>"])
    tokenizer.save_pretrained(tmp_path / "processor")
    content = make_job(model__processor=str(tmp_path / "processor"))
    assert "it knows nothing of '<page>'" in failed(content)["processor"]
    content["model"]["resize_embeddings"] = True
    assert finding(content, "processor").detail.endswith("608 vectors become 609")


@pytest.fixture
def asked_for_kernels(monkeypatch) -> Iterator[list[str]]:
    """Names of the kernels that are asked for, on a machine with a GPU and the package kernels, without flash_attn."""
    names: list[str] = []

    def get_kernel(name: str, version: int) -> None:
        names.append(name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=get_kernel))
    is_flash_attn_2_available.cache_clear()
    yield names
    is_flash_attn_2_available.cache_clear()


def test_attention_that_is_not_installed(make_job, asked_for_kernels, monkeypatch):
    job = Job.model_validate(make_job(model__attention="flash_attention_2", model__dtype="bf16"))
    with monkeypatch.context() as without_gpu:
        without_gpu.setattr(torch.cuda, "is_available", lambda: False)
        _, finding, *_ = examine_settings(job)
    assert finding.status is Status.PASS
    assert "flash_attn is looked for where GPUs are" in finding.detail
    _, finding, *_ = examine_settings(job)
    assert finding.status is Status.FAIL
    assert "neither flash_attn is installed nor the kernel that transformers takes instead" in finding.detail
    assert "kernels-community/flash-attn2" in finding.detail
    assert asked_for_kernels == []


def test_a_kernel_of_the_hub_is_accepted_where_transformers_takes_it(make_job, asked_for_kernels, monkeypatch):
    job = Job.model_validate(make_job(model__attention="flash_attention_2", model__dtype="bf16"))
    monkeypatch.setattr("transformers.utils.import_utils.is_kernels_available", lambda: True)
    _, finding, *_ = examine_settings(job)
    assert finding.status is Status.PASS
    assert asked_for_kernels == ["kernels-community/flash-attn2"]


def test_what_an_adapter_touches_is_listed_and_what_is_not_there_refused(make_job):
    def finding(adapter):
        job = Job.model_validate(make_job(training__adapter=adapter))
        (only,) = [each for each in examine_settings(job) if each.check == "adapter"]
        return only.status, only.detail

    status, detail = finding({"rank": 4, "parts": ["language"], "save_whole": ["projector"]})
    assert status is Status.PASS
    assert detail.startswith("lora of rank 4; adapted in language: q_proj (2), ")
    assert "trained whole: ln_q (1)" in detail
    assert "other weights stay as they are: " in detail
    status, detail = finding({"parts": ["qproj"]})
    assert status is Status.FAIL
    assert "'qproj' is no part of the model and matches no name in it; did you mean 'q_proj' or" in detail
    status, detail = finding({"start_from": "/nowhere"})
    assert status is Status.FAIL
    assert "training.adapter.start_from: /nowhere holds no adapter that can be read" in detail
    assert "adapter_config.json" in detail


def test_a_key_that_deepspeed_does_not_know(make_job):
    """Found before work starts: a run and its plan do the same cheap part."""
    overrides = {"zero_optimization": {"reduce_bucket_sizes": 1}}
    found = {each.check: each for each in examine_settings(Job.model_validate(make_job(training__deepspeed=overrides)))}
    assert found["deepspeed"].status is Status.FAIL
    assert "did you mean zero_optimization.reduce_bucket_size?" in found["deepspeed"].detail
    overrides = {"zero_optimization": {"reduce_bucket_size": 1000}}
    found = {each.check: each for each in examine_settings(Job.model_validate(make_job(training__deepspeed=overrides)))}
    assert found["deepspeed"].status is Status.PASS


def test_a_model_that_cannot_pack(make_job, monkeypatch):
    monkeypatch.setattr(Qwen2VL, "packing_problem", lambda *_, **__: "samples see each other")
    assert "samples see each other" in failed(make_job())["attention"]
    alone = {each.check: each.status for each in findings(make_job(packing__mode="none"))}
    assert Status.FAIL not in alone.values()
    assert alone["packed = unpacked"] is Status.NOT_APPLICABLE


def test_the_cheap_part_reads_no_row(make_job):
    content = make_job(data={"train": [{"files": "/nowhere.jsonl", "kind": "pretrain"}]})
    found = list(examine_settings(Job.model_validate(content)))
    assert [each.check for each in found] == ["processor", "attention", "weights", "parts"]
    assert not doctor.has_failed(found)


def settings_findings(make_job, **training):
    content = make_job(**{f"training__{name}": value for name, value in training.items()})
    return {each.check: each for each in examine_settings(Job.model_validate(content))}


def test_parts_and_stages_are_told_with_what_they_cost(make_job):
    whole = settings_findings(make_job)["parts"]
    assert whole.status is Status.PASS
    assert whole.detail.count("learning_rate") == whole.detail.count("of states") == 4
    stages = [{"steps": 2, "parts": {"vision": "frozen", "language": "frozen", "embeddings": "frozen"}}]
    told = settings_findings(make_job, steps=6, stages=stages, parts={"vision": "frozen"})
    assert told["parts, stage 1"].detail.startswith("from step 1 to step 2: vision ")
    assert told["parts, stage 1"].detail.count("weights, frozen") == 3
    assert told["parts, stage 2"].detail.startswith("from step 3 to step 6: vision ")
    assert told["parts, stage 2"].detail.count("weights, frozen") == 1


@pytest.mark.parametrize(
    ("training", "check", "words"),
    [
        ({"parts": {"visoin": "frozen"}}, "parts", "nearest: vision"),
        ({"parts": {"*": "frozen"}}, "parts", "nothing would be trained"),
        ({"optimizer": "muon", "muon_learning_rate": 0.02}, "optimizer", "set training.max_grad_norm: null"),
        (
            {"optimizer": "muon", "muon_learning_rate": 0.02, "max_grad_norm": None, "zero_stage": 3},
            "optimizer", "set training.zero_stage to 0, 1 or 2",
        ),
        (
            {"optimizer": "adamw_8bit", "steps": 6, "stages": [{"steps": 2, "parts": {"vision": "frozen"}}]},
            "optimizer", "quantised in blocks of each worker's shard",
        ),
    ],
)  # fmt: skip
def test_parts_and_optimizers_that_cannot_be_are_refused(make_job, training, check, words):
    found = settings_findings(make_job, **training)[check]
    assert found.status is Status.FAIL
    assert words in found.detail


# ---- Rows ----


def with_rows(make_job, tmp_path, rows, kind="chat", **changes):
    files = write_rows(tmp_path / "rows.jsonl", rows)
    return make_job(data__train=[{"files": files, "kind": kind}], **changes)


def test_files_that_are_not_there(make_job):
    content = make_job(data={"train": [{"files": "/nowhere.jsonl", "kind": "pretrain"}]})
    assert "/nowhere.jsonl" in failed(content)["rows"]


def test_the_model_is_tried_though_rows_cannot_be_read(make_job):
    content = make_job(data={"train": [{"files": "/nowhere.jsonl", "kind": "pretrain"}]})
    found = {each.check: each.status for each in findings(content)}
    assert found["packed = unpacked"] is Status.PASS
    assert found["accumulation steps"] is Status.PASS
    assert found["loss of the weights"] is Status.NOT_APPLICABLE


@pytest.mark.usefixtures("without_model")
def test_eval_rows_are_looked_at_though_training_rows_cannot_be_read(make_job):
    content = make_job()
    content["data"] = {"train": [{"files": "/nowhere.jsonl", "kind": "pretrain"}], "eval": content["data"]["train"]}
    assert any("data.eval[1] (chat)" in each.detail for each in findings(content))


def tokenized(tmp_path, name, rows):
    return write_rows(tmp_path / f"{name}.jsonl", [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * rows)


@pytest.mark.usefixtures("without_model")
def test_first_rows_are_of_as_many_files_as_they_need(make_job, tmp_path):
    files = [tokenized(tmp_path, str(number), rows) for number, rows in enumerate((0, 3, 40, 40, 40))]
    content = make_job(data__train=[{"files": files, "kind": "tokenized"}])
    assert "64 of the first 64 rows are good" in finding(content, "rows").detail
    job = Job.model_validate(content)
    rows = doctor.FirstRows(job, "train", None, None)
    rows.encoder = SimpleNamespace(datasets=[None])
    assert {piece.uri for piece in rows.pieces} == set(files[1:4])


@pytest.mark.usefixtures("without_model")
def test_a_set_without_rows(make_job, tmp_path):
    content = make_job()
    content["data"]["train"].append({"files": tokenized(tmp_path, "none", 0), "kind": "tokenized"})
    assert "data.train[2] (tokenized): its files hold no rows" in failed(content)["rows"]
    said = finding(content, "loss").detail
    assert "data.train[2] (tokenized): row, not judged: no good row" in said
    assert "data.train[1] (chat): messages, what the assistant says, by the messages" in said
    assert "data.train[0] (pretrain): all, every token is trained on" in said


def test_rows_that_are_all_bad(make_job, tmp_path):
    content = with_rows(make_job, tmp_path, [{"text": "<image>", "images": ["gone.jpg"]}] * 3, kind="pretrain")
    assert "gone.jpg" in failed(content)["rows"]


@pytest.mark.usefixtures("without_model")
@pytest.mark.parametrize(
    ("rows", "bad", "stops"),
    [(46, 27, True), (46, 20, False), (90, 10, False), (4000, 20, True), (4000, 3, False)],
)  # fmt: skip
def test_bad_rows_are_judged_as_preparing_judges_them(make_job, tmp_path, rows, bad, stops):
    """The bad ones come first, so of many rows the first 64 stand for more than there are."""
    lines = [{"text": "" if number < bad else f"words {number}"} for number in range(rows)]
    content = with_rows(make_job, tmp_path, lines, kind="pretrain")
    found = finding(content, "rows")
    assert found.status is (Status.FAIL if stops else Status.PASS)
    assert f"{bad} empty_text, such as {tmp_path / 'rows.jsonl'}:1: text is empty" in found.detail
    assert ("data.max_rejected_share" in (found.remedy or "")) == stops
    found = finding(content | {"data": content["data"] | {"max_rejected_share": 0.6}}, "rows")
    assert found.status is Status.PASS


def test_a_bad_row_where_none_is_allowed(make_job):
    content = make_job()
    content["data"]["on_bad_row"] = "error"
    assert "image_missing" in failed(content)["rows"]


def test_capacities_below_the_rows(make_job):
    assert "packing.visual_capacity is 16" in failed(make_job(packing__visual_capacity=16))["capacities"]


@pytest.fixture
def one_long_row(make_job, tmp_path):
    """A function: a job of 40 rows of which one fits no bin."""
    rows = [{"text": "word " * (4000 if number == 7 else 5)} for number in range(40)]
    return lambda **data: (
        with_rows(make_job, tmp_path, rows, kind="pretrain")
        | ({"data": {"train": [{"files": str(tmp_path / "rows.jsonl"), "kind": "pretrain"}], **data}})
    )


@pytest.mark.usefixtures("without_model")
def test_the_part_of_rows_that_fit_no_bin_is_told(one_long_row):
    found = finding(one_long_row(), "capacities")
    assert found.status is Status.PASS
    assert "1 of the first 40 rows of data.train, 2.5%, fit no bin and will be rejected" in found.detail


@pytest.mark.usefixtures("without_model")
def test_rows_longer_than_the_model_s_positions_are_told(make_job, inputs):
    config = json.loads((inputs.folder / "model/config.json").read_text())
    assert "positions" not in finding(make_job(), "capacities").detail
    config["text_config"]["max_position_embeddings"] = 30
    said = finding(make_job(model__config=config), "capacities").detail
    assert re.search(r"; [1-9]\d* rows have more tokens than the model's 30 positions$", said), said


@pytest.mark.usefixtures("without_model")
def test_no_row_may_be_too_large_where_a_bad_row_is_an_error(one_long_row):
    found = finding(one_long_row(on_bad_row="error"), "capacities")
    assert found.status is Status.FAIL
    assert "1 of the first 40 rows" in found.detail


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
    def wrong(self, tile_size, num_tiles):
        span = measure(self, tile_size, num_tiles)
        return type(span)(span.token_ids[1:], span.visual_tokens - 1)

    measure = Qwen2VL._measure_span
    monkeypatch.setattr(Qwen2VL, "_measure_span", wrong)
    found = failed(make_job())
    assert "cannot be trusted" in found["exact lengths"]


def test_pictures_that_cannot_be_decoded(make_job, tmp_path, inputs):
    page = next((inputs.folder / "data/pages").glob("*.jpg")).read_bytes()
    (tmp_path / "page.jpg").write_bytes(page[: len(page) // 2])
    rows = [{"text": "<image> A", "images": ["page.jpg"]}, {"text": "B"}]
    content = with_rows(make_job, tmp_path, rows, kind="pretrain")
    found = failed(content)
    assert "page.jpg" in found["exact lengths"]
    assert "1 of 2 rows" in found["exact lengths"]
    assert "on_bad_row" not in found["exact lengths"], "it is what the job says"
    assert found.keys() == {"exact lengths"}

    (tmp_path / "sound.jpg").write_bytes(page)
    rows.append({"text": "<image> C", "images": ["sound.jpg"]})
    content = with_rows(make_job, tmp_path, rows, kind="pretrain")
    told = finding(content, "exact lengths")
    assert told.status is Status.PASS
    for words in ("1 of 3 rows", "page.jpg", "leaves them out of the loss"):
        assert words in told.detail
    content["data"]["on_bad_row"] = "error"
    assert "page.jpg" in failed(content)["exact lengths"]


@pytest.mark.usefixtures("without_model")
def test_tokenized_rows_are_not_compared(make_job, tmp_path):
    content = make_job(data__train=[{"files": tokenized(tmp_path, "ready", 3), "kind": "tokenized"}])
    alone = finding(content, "exact lengths")
    assert alone.status is Status.NOT_APPLICABLE
    assert alone.detail == "3 tokenized rows of data.train are taken as they are"
    content["data"]["train"] += make_job()["data"]["train"][:1]
    mixed = finding(content, "exact lengths")
    assert mixed.status is Status.PASS
    assert mixed.detail.startswith("4 rows of data.train have the tokens of Qwen2VLProcessor; 3 tokenized rows")


def test_a_check_of_rows_that_breaks_is_a_failed_one(make_job, monkeypatch):
    def broken(*_, **__):
        raise OSError("the disk is gone")

    monkeypatch.setattr(doctor_rows, "render", broken)
    found = failed(make_job())
    assert "OSError: the disk is gone" in found["exact lengths"]
    assert found.keys() == {"exact lengths"}


# ---- The model ----


def test_samples_that_see_each_other(make_job, monkeypatch):
    def one_sample(self, row):
        whole = positions_in_sample(row.lengths.sum()[None])
        return whole.expand(4, -1)

    monkeypatch.setattr(Qwen2VL, "position_ids", one_sample)
    assert "samples of a row see each other" in failed(make_job(model__attention="sdpa"))["packed = unpacked"]


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
    found = failed(make_job(model__attention="sdpa"))
    assert "returns a cache" in found["cache"]
    assert "packed = unpacked" in found
    found = failed(make_job())
    assert "returns a cache" in found["cache"]
    assert "packed = unpacked" not in found, "told where samples begin, the model does not look for them"


def test_a_cache_that_the_text_model_s_configuration_asks_for(make_job, monkeypatch):
    def caching(settings):
        model = build_model(settings)
        model.config.get_text_config().use_cache = True
        return model

    monkeypatch.setattr(doctor_model, "build_model", caching)
    assert "use_cache is on in the configuration of the text model" in failed(make_job())["cache"]


def pixels_changed(monkeypatch, change):
    """The patches of all pictures are changed before the model gets them."""

    def changed(self, tiles, frames, dtype):
        inputs = pixel_inputs(self, tiles, frames, dtype)
        return inputs | {"pixel_values": change(inputs["pixel_values"])}

    pixel_inputs = Qwen2VL.pixel_inputs
    monkeypatch.setattr(Qwen2VL, "pixel_inputs", changed)


@pytest.mark.usefixtures("without_model")
@pytest.mark.parametrize(
    "change",
    [lambda pixels: pixels.flip(0), torch.ones_like, lambda pixels: pixels + 0.03, lambda pixels: pixels * 1.02],
    ids=["patches in reverse order", "all pixels one", "another mean", "another deviation"],
)
def test_pixels_that_are_not_the_processor_s(make_job, monkeypatch, change):
    pixels_changed(monkeypatch, change)
    found = failed(make_job())
    assert found.keys() == {"pixels"}
    assert re.search(r"pixel_values of row '.*' \(.*jsonl:\d+\) differs from the processor's by", found["pixels"])


def test_pictures_that_the_model_does_not_see(make_job, monkeypatch):
    pixels_changed(monkeypatch, torch.ones_like)
    assert "does not see its pictures" in failed(make_job())["pictures are seen"]


def test_tokens_that_see_what_comes_after_them(make_job, monkeypatch):
    def looking_ahead(self, inputs):
        logits = all_logits(self, inputs)
        return logits + 0.1 * logits.mean(dim=0)

    all_logits = doctor_model._SmallCopy.logits
    monkeypatch.setattr(doctor_model._SmallCopy, "logits", looking_ahead)
    assert "see what comes after them" in failed(make_job())["pictures are seen"]


@pytest.mark.parametrize(
    "wrong", [lambda ids: np.roll(ids, 1), lambda ids: (ids * 7 + 3) % 600], ids=["shifted", "random"]
)
def test_labels_that_are_not_the_tokens(make_job, monkeypatch, wrong):
    """The loss of random weights is the same."""

    def mislabelled(rendered, family, labels, device):
        masked = mask(rendered, family, labels, device)
        kept = masked.labels != -100
        return replace(masked, labels=np.where(kept, wrong(masked.input_ids.astype(np.int64)), -100))

    monkeypatch.setattr(doctor_model, "mask", mislabelled)
    found = failed(make_job())
    assert "labels are not the token in their place" in found["labels"]
    assert "loss at step 0" not in found


def test_a_loss_that_is_shifted(make_job, monkeypatch):
    def shifted(model, inputs, labels):
        return packed_loss_sum(model, inputs, labels.roll(1, dims=1))

    monkeypatch.setattr(doctor_model, "packed_loss_sum", shifted)
    assert "labels are shifted against logits" in failed(make_job())["labels"]


def test_a_gradient_that_is_a_mean_of_means(make_job, monkeypatch):
    """Though the loss that is reported is right."""

    def mean(model, inputs, labels):
        right = packed_loss_sum(model, inputs, labels)
        wrong = right / (labels[:, 1:] >= 0).sum()
        return right.detach() + wrong - wrong.detach()

    monkeypatch.setattr(doctor_model, "packed_loss_sum", mean)
    found = failed(make_job())
    assert "how a batch is split" in found["accumulation steps"]
    assert found.keys() == {"accumulation steps"}


def test_a_model_that_cannot_be_made_small(make_job, monkeypatch):
    def broken(config):
        raise KeyError("hidden_size")

    monkeypatch.setattr(doctor_model, "shrunken", broken)
    assert "KeyError: 'hidden_size'" in failed(make_job())["small copy"]


def test_a_model_that_breaks_in_one_check(make_job, monkeypatch):
    def broken(self, batch):
        raise IndexError("no such image")

    monkeypatch.setattr(doctor_model._SmallCopy, "naive_inputs", broken)
    found = failed(make_job())
    assert found.keys() == {"packed = unpacked"}
    assert "IndexError: no such image" in found["packed = unpacked"]


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


def weights_finding(make_job, saved, steps, check="loss of the weights"):
    path, files = saved(steps)
    content = make_job(data__train=[{"files": files, "kind": "tokenized"}])
    processor = content["model"]["processor"]
    content["model"] = {"path": path, "processor": processor, "dtype": "fp32"}
    return next(each for each in findings(content) if each.check == check)


@pytest.mark.usefixtures("without_model")
def test_weights_that_are_not_in_the_files(make_job, saved, tmp_path):
    whole = weights_finding(make_job, saved, 0, "weights")
    assert whole.status is Status.PASS
    assert whole.detail.endswith("weights hold every weight of the model, in its shape, and no other")
    file = tmp_path / "weights/model.safetensors"
    state = load_file(file)
    save_file({name: weight for name, weight in state.items() if "down_proj" not in name}, file, {"format": "pt"})
    content = make_job()
    content["model"] = {"path": str(tmp_path / "weights"), "processor": content["model"]["processor"]}
    found = [each for each in examine_settings(Job.model_validate(content)) if each.status is Status.FAIL]
    assert [each.check for each in found] == ["weights"]
    assert "2 missing from the files, which would be drawn at random: model.language_model" in found[0].detail


def test_weights_of_the_hub(make_job, monkeypatch):
    """Their headers are asked for; nothing is fetched."""
    job = Job.model_validate(make_job())
    config = load_config(job.model)
    weights = build_model(job.model).state_dict().items()
    stored = {name: StoredWeight(tuple(weight.shape), "BF16") for name, weight in weights}
    monkeypatch.setattr(training_weights, "_hub_weights", lambda name: stored)
    monkeypatch.setattr(training_model, "_read_config", lambda _: config)
    of_hub = job.model_copy(update={"model": job.model.model_copy(update={"path": "owner/model"})})
    assert doctor_weights.examine_names(of_hub).status is Status.PASS
    name, weight = stored.popitem()
    stored[name] = StoredWeight((*weight.shape, 1), "BF16")
    with pytest.raises(UserError, match=f"1 of another shape: {re.escape(name)}"):
        doctor_weights.examine_names(of_hub)


@pytest.mark.parametrize(("steps", "status"), [(0, Status.FAIL), (9, Status.PASS)])
def test_the_loss_of_trained_weights(make_job, saved, steps, status):
    found = weights_finding(make_job, saved, steps)
    loss = float(found.detail.split()[0])
    assert found.status is status, found
    assert (loss > doctor_weights.PLAUSIBLE_LOSS[1]) == (status is Status.FAIL)
    assert steps or loss == pytest.approx(math.log(700), rel=0.1)


def test_weights_larger_than_the_memory(make_job, saved, monkeypatch):
    monkeypatch.setattr(doctor_weights, "_free_bytes", lambda: 1000)
    found = weights_finding(make_job, saved, 0)
    assert found.status is Status.NOT_APPLICABLE
    assert "free" in found.detail


@pytest.mark.usefixtures("without_model")
def test_a_broken_picture_costs_only_its_own_row(make_job, saved, tmp_path, inputs):
    """Of the loss of the weights: the other rows' is told, and the rest of the report."""
    path, _ = saved(0)
    page = next((inputs.folder / "data/pages").glob("*.jpg")).read_bytes()
    (tmp_path / "page.jpg").write_bytes(page[: len(page) // 2])
    rows = [{"text": f"Row {number}"} for number in range(9)] + [{"text": "<image> A", "images": ["page.jpg"]}]
    content = with_rows(make_job, tmp_path, rows, kind="pretrain")
    content["model"] = {"path": path, "processor": content["model"]["processor"], "dtype": "fp32"}
    result = run(tmp_path, content, "--json")
    assert result.exit_code == 1
    found = {each["check"]: each for each in json.loads(result.stdout)["findings"]}
    assert found["exact lengths"]["status"] == "pass"  # the picture is not among the rows it decodes
    weights = found["loss of the weights"]
    assert weights["status"] == "fail"
    assert "of 9 rows" in weights["detail"]
    assert "page.jpg" in weights["detail"]


def test_an_error_of_the_weights_is_a_finding(make_job, saved, monkeypatch):
    def broken(settings):
        raise MemoryError("too large")

    monkeypatch.setattr(doctor_weights, "build_model", broken)
    found = weights_finding(make_job, saved, 0)
    assert found.status is Status.FAIL
    assert "MemoryError: too large" in found.detail


def test_memory_is_what_can_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_weights, "MEMORY_INFO", tmp_path / "meminfo")
    pages = doctor_weights._free_bytes()
    assert pages % 1024**4 > 0
    (tmp_path / "meminfo").write_text("MemTotal: 90 kB\nMemFree: 10 kB\nMemAvailable:   70 kB\n")
    assert doctor_weights._free_bytes() == 70 * 1024


def test_weights_in_two_forms_count_once(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(500))
    assert doctor_weights._weights_bytes(tmp_path) == 500
    (tmp_path / "model.safetensors").write_bytes(bytes(300))
    assert doctor_weights._weights_bytes(tmp_path) == 300


# ---- The command ----


@pytest.mark.usefixtures("without_model")
def test_the_preview_shows_a_row_of_each_set_chats_first(make_job, tmp_path):
    content = make_job()
    pretrain, chats = content["data"]["train"]
    ready = {"files": tokenized(tmp_path, "ready", 3), "kind": "tokenized"}
    content["data"]["train"] = [pretrain, ready, pretrain, chats]
    (rows,) = [each for each in doctor.examine(Job.model_validate(content)) if isinstance(each, doctor.FirstRows)]
    console = Console(file=io.StringIO(), width=200)
    rows.preview(console)
    shown = re.findall(r"of (data\.train\[\d\] \(\w+\))", console.file.getvalue())
    assert shown == ["data.train[3] (chat)", "data.train[0] (pretrain)", "data.train[1] (tokenized)"]


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
