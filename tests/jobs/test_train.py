"""Training under Ray Train: whole, stopped and resumed, with another number of workers, and with a worker killed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from transformers import AutoModelForImageTextToText

from jobs.checks import open_prepared
from jobs.trace import run_tracer
from jobs.training import train
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.prepared import PreparedDataset
from mmray.run.callback import Callback
from mmray.run.checkpoints import newest_looking_whole
from mmray.run.history import read_history
from mmray.run.metrics import read_metrics
from mmray.training.bins_log import read_trained
from mmray.training.model import build_model
from mmray.training.settings import ModelSettings
from pipelines import measures
from tests.conftest import Inputs, RayHead
from tests.here import prepare_here, train_here
from tests.jobs.counting import Counting, KilledOnce, Mistaken
from tests.scraping import wait_until_told

KILL_IN_STEP = 5


@pytest.fixture(scope="module")
def folder(ray_head: RayHead, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the prepared datasets that all runs here train on."""
    folder = tmp_path_factory.mktemp("train")
    prepare_here(Job.model_validate(job_content(inputs, folder, "any")))
    return folder


def job_content(inputs: Inputs, folder: Path, run: str, **changes: object) -> dict[str, object]:
    return inputs.job(folder, **{"output__run": str(folder / run), **changes})  # type: ignore[arg-type]


def run_job(
    inputs: Inputs, folder: Path, run: str, callbacks: Sequence[Callback] = (), **changes: object
) -> list[dict[str, Any]]:
    """Train a job to its end; the lines of its metrics."""
    job = Job.model_validate(job_content(inputs, folder, run, **changes))
    train(job, open_prepared(job), callbacks=callbacks)
    return read_metrics(folder / run / "metrics.jsonl")


@pytest.fixture(scope="module")
def whole(inputs: Inputs, folder: Path) -> list[dict[str, Any]]:
    """Twelve steps in one go on two workers."""
    return run_job(inputs, folder, "whole", name="whole")


def assert_same_steps(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("epoch", "tokens", "trained_tokens", "bins", "lr"):
            assert ours[key] == theirs[key], (ours["step"], key)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * tolerance), ours["step"]


def test_a_run_writes_its_metrics_and_keeps_the_last_checkpoints(whole: list[dict[str, Any]], folder: Path) -> None:
    assert [line["step"] for line in whole] == list(range(1, 13))
    assert set(whole[0]) == {
        *("step", "epoch", "loss", "tokens", "trained_tokens", "bins", "workers"),
        *("samples", "skipped_samples"),
        *("lr", "grad_norm", "step_seconds", "data_wait_seconds"),
        *("token_accuracy", "peak_memory", "tokens_per_second", "model_flops_per_second"),
        "loss_by_set",
    }
    assert whole[-1]["loss"] < whole[0]["loss"]
    cursors = [json.loads(path.read_text())["step"] for path in (folder / "whole").glob("checkpoint_*/cursor.json")]
    assert sorted(cursors) == [10, 12]
    history = read_history(folder / "whole")
    assert [event["event"] for event in history] == ["start", "checkpoint", "checkpoint", "checkpoint", "finish"]
    assert [event["step"] for event in history] == [0, 5, 10, 12, 12]
    assert {event["name"] for event in history[2:4]} == {path.name for path in (folder / "whole").glob("checkpoint_0*")}
    assert_each_bin_once_an_epoch(folder / "whole")


def test_prometheus_is_told_the_same_numbers(whole: list[dict[str, Any]]) -> None:
    """At the node's endpoint, after the workers are gone."""
    only: tuple[str, ...] = ()
    summed = {
        measures.TOKENS: "tokens", measures.TRAINED_TOKENS: "trained_tokens", measures.SAMPLES: "samples",
        measures.STEP_SECONDS: "step_seconds",
    }  # fmt: skip
    expected: dict[measures.Measure, object] = {
        measure: {only: pytest.approx(sum(line[key] for line in whole))} for measure, key in summed.items()
    }
    waited = pytest.approx(sum(line["data_wait_seconds"] for line in whole))
    expected |= {
        measures.STEPS: {only: 12}, measures.CHECKPOINTS: {only: 3},
        measures.DATA_WAIT_SECONDS: {("0",): waited, ("1",): ANY},
        measures.STAGE_BUSY_SECONDS: {("render",): ANY, ("mask",): ANY},
    }  # fmt: skip
    wait_until_told(expected, job_name="whole")


def assert_each_bin_once_an_epoch(run: Path) -> None:
    """By what the ranks were given in the steps that count, in order, over the whole history."""
    bins = len(PreparedDataset(str(run.parent / "prepared" / "train")))
    steps = read_trained(run)
    assert [step.step for step in steps] == list(range(1, 13))
    epoch = -(-bins // 4)
    for first in range(0, 12, epoch):
        seen = sorted(number for step in steps[first : first + epoch] for number in step.all_bins)
        assert seen == list(range(bins)) if first + epoch <= 12 else len(set(seen)) == len(seen)
    assert len(steps) > epoch, "the run must be longer than an epoch"


def resumes(run: Path) -> list[int]:
    """The steps at which a run was resumed."""
    return [event["step"] for event in read_history(run) if event["event"] == "resume"]


def test_a_killed_worker_a_damaged_checkpoint_and_another_number_of_workers_change_nothing(
    whole: list[dict[str, Any]], ray_head: RayHead, inputs: Inputs, folder: Path
) -> None:
    """In the first part, on two workers, one is killed. After it the newest checkpoint is damaged and what Ray Train
    remembers is torn: the run goes on from the checkpoint before, on three workers, by which the global batch of 4 bins
    does not divide evenly. A callback of the test's own has its count carried through all of it."""
    run, counting = folder / "chained", Counting(folder / "counted")
    killed = KilledOnce(KILL_IN_STEP, rank=1, file=folder / "killed")
    every = {"training__checkpoint_every_steps": 3}
    lines = run_job(inputs, folder, "chained", [counting, killed], training__steps=9, training__max_failures=2, **every)
    assert killed.file.exists()
    assert_same_steps(lines, whole[:9], tolerance=1e-6)
    assert resumes(run) == [3]

    newest = newest_looking_whole(run)
    assert newest is not None
    shard = next(newest.glob("deepspeed/*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    (run / "checkpoint_manager_snapshot.json").write_text('{"ray_ver')
    resources = {"workers": 3, "cpus_per_worker": 0.5, "encode_actors": 2}
    lines = run_job(inputs, folder, "chained", [counting], resources=resources)
    events = {event["event"]: event for event in read_history(run)}
    assert events["damaged_checkpoint"]["checkpoint"] == newest.name
    assert events["damaged_checkpoint"]["problem"] == f"deepspeed/{shard.name} was changed: its checksum is another"
    assert resumes(run)[1:] == [6]
    assert_same_steps(lines, whole, tolerance=1e-3)
    assert_same_steps(lines[:6], whole[:6], tolerance=1e-6)
    assert [step.workers for step in read_trained(run)] == [2] * 6 + [3] * 6
    assert_each_bin_once_an_epoch(run)
    counted = [tuple(map(int, line.split(":"))) for line in counting.file.read_text().splitlines()]
    assert len(counted) > 12, "steps were done again"
    assert {step for step, _ in counted} == set(range(1, 13))
    assert all(step == count for step, count in counted)


def test_a_finished_run_has_nothing_left_to_do(whole: list[dict[str, Any]], inputs: Inputs, folder: Path) -> None:
    """Not even workers start: its history stays as it is."""
    history = read_history(folder / "whole")
    assert run_job(inputs, folder, "whole") == whole
    assert read_history(folder / "whole") == history


def test_a_run_can_end_with_its_model(
    whole: list[dict[str, Any]], inputs: Inputs, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a run that is finished already; a model that is there is kept, one of earlier steps gives way."""
    model = folder / "whole" / "model"
    for _ in range(2):
        run_job(inputs, folder, "whole", output__export={"at_end": True})
        told = " ".join(capsys.readouterr().out.split())
        assert "finished, the model is in" in told
        assert "whole/model: step 12, fp32" in told
    written = (model / "config.json").stat().st_mtime_ns
    loaded = AutoModelForImageTextToText.from_pretrained(model)
    assert sum(weight.numel() for weight in loaded.parameters()) > 1000
    run_job(inputs, folder, "whole", output__export={"at_end": True})
    assert (model / "config.json").stat().st_mtime_ns == written
    sidecar = json.loads((model / "mmray.json").read_text())
    (model / "mmray.json").write_text(json.dumps(sidecar | {"step": 10}))
    run_job(inputs, folder, "whole", output__export={"at_end": True})
    assert json.loads((model / "mmray.json").read_text()) == sidecar


def test_another_order_in_the_middle_of_a_run_is_refused(
    whole: list[dict[str, Any]], inputs: Inputs, folder: Path
) -> None:
    with pytest.raises(UserError, match=r"its seed is 0, this job's is 5; put seed back"):
        run_job(inputs, folder, "whole", training__seed=5, training__max_failures=0)


def test_a_mistake_of_one_worker_ends_the_run_at_once_and_a_first_loss_as_of_random_weights_is_told(
    inputs: Inputs, folder: Path
) -> None:
    """Although failures may be tried again three times, and the other rank waits for it in a collective. What mmray
    warns of in workers, at the first step, is kept."""
    config = str(inputs.folder / "model")
    build_model(ModelSettings(config=config, dtype="fp32")).save_pretrained(folder / "untrained")
    model = {"path": str(folder / "untrained"), "processor": str(inputs.folder / "processor"), "dtype": "fp32"}
    mistaken = Mistaken(step=3, rank=1)  # in which rank 0 has recorded the first
    with pytest.raises(UserError, match=r"^this row cannot be trained on; mend it$"):
        run_job(inputs, folder, "mistaken", [mistaken], model=model, training__max_failures=3)
    start, first_loss = read_history(folder / "mistaken")
    assert (start["event"], first_loss["event"]) == ("start", "first_loss")
    line = read_metrics(folder / "mistaken" / "metrics.jsonl")[0]
    assert first_loss["loss"] == line["loss"]
    assert "as random weights: ln(vocabulary) is 6.41" in first_loss["problem"]
    assert first_loss["problem"] in (folder / "mistaken/warnings.log").read_text()


def test_settings_that_differ_from_the_prepared_ones_are_refused(inputs: Inputs, folder: Path) -> None:
    other = Job.model_validate(job_content(inputs, folder, "other", packing__visual_capacity=300))
    with pytest.raises(UserError, match=r"packing\.visual_capacity: 256 -> 300"):
        open_prepared(other)


def test_a_processor_of_another_model_is_refused(inputs: Inputs, folder: Path) -> None:
    job = Job.model_validate(job_content(inputs, folder, "other"))
    config = {"model_type": "idefics3"}
    other = job.model_copy(update={"model": job.model.model_copy(update={"config": config})})
    with pytest.raises(UserError, match=r"the model is a idefics3, but Qwen2VLProcessor is a processor of qwen2_vl"):
        open_prepared(other)


def test_a_cluster_that_is_too_small_is_told_before_anything_starts(inputs: Inputs, folder: Path) -> None:
    resources = {"workers": 9, "cpus_per_worker": 1}
    job = Job.model_validate(job_content(inputs, folder, "large", resources=resources))
    with pytest.raises(UserError, match=r"training needs 11 CPU \(it has 4\)"):
        train(job, open_prepared(job))


def test_other_data_in_the_middle_of_a_run_is_asked_for(
    whole: list[dict[str, Any]], inputs: Inputs, folder: Path
) -> None:
    """Without the flag it is refused, with it the new data's first epoch begins; any step can be traced after. That
    Ray's workers go on with other data is shown in test_mixture.py."""
    other = {"output__prepared": str(folder / "other"), "packing__token_capacity": 480, "training__steps": 14}
    job = Job.model_validate(job_content(inputs, folder, "whole", **other))
    prepare_here(job)
    new = open_prepared(job)["train"]
    difference = "the difference:.*packing.token_capacity: 512 -> 480.*--continue-on"
    with pytest.raises(UserError, match=rf"(?s)that of {new.path} is {new.fingerprint}; {difference}"):
        train(job, open_prepared(job))
    train_here(job, ranks=2, continue_on=True)
    assert read_metrics(folder / "whole" / "metrics.jsonl")[:12] == whole
    last = read_trained(folder / "whole")[12:]
    assert [(step.step, step.data) for step in last] == [(13, new.fingerprint), (14, new.fingerprint)]
    event = next(event for event in read_history(folder / "whole") if event["event"] == "continue_on")
    assert (event["step"], event["prepared"], event["bins"]) == (12, new.path, len(new))
    tracer = run_tracer(job)
    for step in (*last, read_trained(folder / "whole")[2]):
        assert {sample.bin for sample in tracer.samples(step.step)} == set(step.all_bins)
    with pytest.raises(UserError, match=r"--trace 15: steps are counted from 1, as in metrics.jsonl, to 14"):
        list(tracer.samples(15))
    longer = run_tracer(Job.model_validate(job_content(inputs, folder, "whole", **other | {"training__steps": 15})))
    assert {sample.bin for sample in longer.samples(15)}.isdisjoint(last[0].all_bins + last[1].all_bins)
