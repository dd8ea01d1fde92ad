"""The loop of a run without Ray: its records, checkpoints and resumes, and callbacks that a test brings along."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from mmray.config.job import Job
from mmray.prepared import PreparedDataset
from mmray.run.callback import Callback, DoneStep, Evaluation, Loop, Step
from mmray.run.folder import RunFolder
from mmray.run.history import in_words, read_history
from mmray.training.bins_log import read_trained
from tests.conftest import Inputs
from tests.here import prepare_here, train_here


class Diary(Callback):
    """Writes down each moment it is called in, and has checkpoints carry the losses it saw."""

    def __init__(self, file: Path) -> None:
        self.file, self.losses = file, [[0, 0.0]]

    def note(self, loop: Loop, *entry: Any) -> None:
        if loop.run.is_first:
            with self.file.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def at_start(self, loop: Loop) -> None:
        self.note(loop, "at_start", loop.step, self.losses[-1][0])

    def flag(self) -> int:
        return 7

    def before_step(self, loop: Loop, step: Step) -> None:
        assert step.flags[self.name] == [7] * loop.run.ranks.size
        self.note(loop, "before_step", step.number, step.trained.all_bins)

    def after_step(self, loop: Loop, done: DoneStep) -> None:
        self.losses.append([done.number, done.metrics.loss])
        self.note(loop, "after_step", done.number, done.metrics.loss)

    def on_evaluation(self, loop: Loop, evaluation: Evaluation) -> None:
        self.note(loop, "on_evaluation", evaluation.step, evaluation.loss)

    def on_checkpoint(self, loop: Loop, name: str, seconds: float) -> None:
        self.note(loop, "on_checkpoint", loop.step, name)

    def at_end(self, loop: Loop) -> None:
        self.note(loop, "at_end", loop.step, loop.stop_reason)

    def close(self) -> None:
        self.file.with_suffix(".closed").touch()

    def state(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def restore(self, state: dict[str, Any]) -> None:
        self.losses = state["losses"]

    def entries(self) -> list[list[Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()]


class StopsAt(Callback):
    """Asks the run to stop: before a step, or after it."""

    def __init__(self, step: int, moment: str) -> None:
        self.step, self.moment = step, moment

    def before_step(self, loop: Loop, step: Step) -> None:
        if self.moment == "before" and step.number == self.step:
            loop.stop("enough")

    def after_step(self, loop: Loop, done: DoneStep) -> None:
        if self.moment == "after" and done.number == self.step:
            loop.stop("enough")


class AsksTheFolder(Callback):
    """Asks the run to stop as `jobs/train.py` does on a signal, in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def before_step(self, loop: Loop, step: Step) -> None:
        if step.number == self.step and loop.run.ranks.rank == 1:
            loop.run.folder.ask_to_stop("SIGTERM")


class Breaks(Callback):
    """Raises in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, loop: Loop, done: DoneStep) -> None:
        if done.number == self.step:
            raise RuntimeError("broken on purpose")


@pytest.fixture(scope="module")
def folder(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    job = job_in(inputs, folder, "unused")
    for split in ("train", "eval"):
        prepare_here(job, split)
    return folder


def job_in(inputs: Inputs, folder: Path, run: str, **changes: object) -> Job:
    rows = [{"files": str(inputs.folder / "data" / "pages.jsonl"), "kind": "pretrain"}]
    settings = {
        "training__steps": 8, "training__checkpoint_every_steps": 3, "training__eval_every_steps": 4,
        "data__eval": rows, "output__run": str(folder / run), **changes,
    }  # fmt: skip
    return Job.model_validate(inputs.job(folder, **settings))


def checkpoint_files(run: Path, step: int) -> set[str]:
    (checkpoint,) = run.glob(f"checkpoint_{step:08d}_*")
    return {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    measured = ("_seconds", "_per_second", "peak_memory")
    return [{key: value for key, value in line.items() if not key.endswith(measured)} for line in lines]


@pytest.fixture(scope="module")
def whole(inputs: Inputs, folder: Path) -> list[dict[str, Any]]:
    """Eight steps of two ranks in one go, of which two are traced, without a callback of a test."""
    return train_here(job_in(inputs, folder, "whole", training__profile={"steps": [2, 3]}), ranks=2)


def test_a_run_without_ray_leaves_the_files_of_one_with_it(whole: list[dict[str, Any]], folder: Path) -> None:
    run = folder / "whole"
    assert [(line["step"], "eval_loss" in line) for line in whole] == [
        (1, False), (2, False), (3, False), (4, False), (4, True), *((step, False) for step in range(5, 9)), (8, True),
    ]  # fmt: skip
    assert [(event["event"], event["step"], event["workers"]) for event in read_history(run)] == [
        ("start", 0, 2), ("profile", 3, 2), ("checkpoint", 3, 2), ("checkpoint", 6, 2), ("checkpoint", 8, 2),
        ("finish", 8, 2),
    ]  # fmt: skip
    assert {path.name[:19] for path in run.glob("checkpoint_*")} == {"checkpoint_00000006", "checkpoint_00000008"}
    trained = read_trained(run)
    bins = range(len(PreparedDataset(str(folder / "prepared" / "train"))))
    epoch = math.ceil(len(bins) / 4)
    assert sorted(number for step in trained[:epoch] for number in step.all_bins) == list(bins)[: 4 * len(trained)]
    assert {step.workers for step in trained} == {2}


def test_the_traced_steps_are_in_a_file_that_perfetto_opens(whole: list[dict[str, Any]], folder: Path) -> None:
    (event,) = [event for event in read_history(folder / "whole") if event["event"] == "profile"]
    assert event["file"] == "profile/steps-2-3.json.gz"
    assert in_words(event) == "a trace of the steps up to 3 is in profile/steps-2-3.json.gz"
    events = json.loads(gzip.decompress((folder / "whole" / event["file"]).read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"Optimizer.step#AdamW.step", "aten::addmm"} <= names


def test_the_speed_of_steps_is_that_of_their_tokens_and_seconds(whole: list[dict[str, Any]]) -> None:
    """A step of more tokens takes more operations, whatever its time; losses of sets add up to that of the step."""
    steps = [line for line in whole if "loss" in line]
    for line in steps:
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["step_seconds"])
        assert 0 <= line["token_accuracy"] <= 1
        assert line["peak_memory"] > 1e8
        assert set(line["loss_by_set"]) == {"0", "1"}
        known = [loss for loss in line["loss_by_set"].values() if loss is not None]
        assert min(known) * (1 - 1e-5) <= line["loss"] <= max(known) * (1 + 1e-5)
    needed = {line["tokens"]: line["model_flops_per_second"] * line["step_seconds"] for line in steps}
    few, many = min(needed), max(needed)
    assert 0 < needed[few] < needed[many]


def test_a_checkpoint_without_states_of_callbacks_has_no_file_for_them(
    whole: list[dict[str, Any]], folder: Path
) -> None:
    files = checkpoint_files(folder / "whole", 8)
    assert {"cursor.json", "prepared.json", "training_state.json"} <= files
    assert "callbacks.json" not in files
    assert {name.partition("/")[0] for name in files if "/" in name} == {"deepspeed", "files", "rng"}


def test_a_callback_of_its_own_sees_all_steps_in_order_and_its_state_comes_back(
    whole: list[dict[str, Any]], inputs: Inputs, folder: Path, tmp_path: Path
) -> None:
    """It breaks after step 5, resumes from the checkpoint of step 3, on one rank more."""
    diary = Diary(tmp_path / "first")
    with pytest.raises(AssertionError, match="broken on purpose"):
        train_here(job_in(inputs, folder, "kept"), diary, Breaks(5), ranks=2)
    assert diary.file.with_suffix(".closed").exists()
    moments = [(name, step) for name, step, _ in diary.entries()]
    assert moments == [
        ("at_start", 0),
        *((name, step) for step in (1, 2, 3) for name in ("before_step", "after_step")), ("on_checkpoint", 3),
        ("before_step", 4), ("on_evaluation", 4), ("after_step", 4), ("before_step", 5), ("after_step", 5),
    ]  # fmt: skip
    assert "callbacks.json" in checkpoint_files(folder / "kept", 3)

    second = Diary(tmp_path / "second")
    lines = train_here(job_in(inputs, folder, "kept"), second, ranks=2)
    assert without_times(lines) == without_times(whole)
    entries = second.entries()
    assert entries[0] == ["at_start", 3, 3]
    assert [step for name, step, _ in entries if name == "after_step"] == [4, 5, 6, 7, 8]
    assert entries[-1] == ["at_end", 8, None]
    (checkpoint,) = (folder / "kept").glob("checkpoint_00000008_*")
    kept = json.loads((checkpoint / "callbacks.json").read_text())
    assert kept == {"Diary": {"losses": [[0, 0.0], *([s["step"], s["loss"]] for s in whole if "loss" in s)]}}
    assert [step.all_bins for step in read_trained(folder / "kept")] == [
        step.all_bins for step in read_trained(folder / "whole")
    ]


@pytest.mark.parametrize(("moment", "done"), [("before", 4), ("after", 5)])
def test_a_callback_may_stop_the_run_which_is_saved_and_goes_on_exactly_there(
    whole: list[dict[str, Any]], inputs: Inputs, folder: Path, tmp_path: Path, moment: str, done: int
) -> None:
    run = f"stopped-{moment}"
    diary = Diary(tmp_path / "diary")
    train_here(job_in(inputs, folder, run), StopsAt(5, moment), diary, ranks=2)
    assert [step.step for step in read_trained(folder / run)] == list(range(1, done + 1))
    assert diary.entries()[-1] == ["at_end", done, "enough"]
    last = [(event["event"], event["step"]) for event in read_history(folder / run)][-2:]
    assert last == [("checkpoint", done), ("stop", done)]
    assert read_history(folder / run)[-1]["reason"] == "enough"
    lines = train_here(job_in(inputs, folder, run), ranks=2)
    assert [event["step"] for event in read_history(folder / run) if event["event"] == "resume"] == [done]
    assert without_times(lines) == without_times(whole)
    assert len((folder / run / "trained.jsonl").read_text().splitlines()) == 8, "no step was done twice"


def test_a_run_whose_folder_is_asked_to_stop_ends_the_step_it_is_in_and_goes_on_there(
    whole: list[dict[str, Any]], inputs: Inputs, folder: Path
) -> None:
    """Asked in step 5, it is saved at 5. As long as the folder asks, no step is done."""
    job, run = job_in(inputs, folder, "asked"), RunFolder(folder / "asked")
    train_here(job, AsksTheFolder(5), ranks=2)
    stop = read_history(run.path)[-1]
    assert (stop["event"], stop["step"], stop["reason"]) == ("stop", 5, "SIGTERM")
    assert in_words(stop) == "stopped after step 5 (SIGTERM); all that is done is saved"
    train_here(job, ranks=2)
    assert [(event["event"], event["step"]) for event in read_history(run.path)][-2:] == [("resume", 5), ("stop", 5)]
    run.forget_stop()
    assert without_times(train_here(job, ranks=2)) == without_times(whole)
    assert len((run.path / "trained.jsonl").read_text().splitlines()) == 8, "no step was done twice"


def test_two_callbacks_of_one_name_are_refused(inputs: Inputs, folder: Path) -> None:
    with pytest.raises(AssertionError, match=r"different names, got History.*StopsAt, StopsAt"):
        train_here(job_in(inputs, folder, "twice"), StopsAt(1, "after"), StopsAt(2, "after"))
